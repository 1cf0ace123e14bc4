"""The optimised model: checks its input, keeps a plan for each size of it, runs the plan."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from uasparse_kernels import _library
from uasparse_kernels._model import check_model
from uasparse_kernels.inference import files
from uasparse_kernels.inference.builder import LOAD, LOOKUP, ROWS, STORE, Call, Plan
from uasparse_kernels.inference.capture import capture
from uasparse_kernels.inference.compact import compact, dense
from uasparse_kernels.inference.fuse import by_sample, fuse
from uasparse_kernels.inference.graph import Graph, Ref, fill, fill_all
from uasparse_kernels.inference.normal import normalise
from uasparse_kernels.inference.package import package
from uasparse_kernels.inference.plan import make_plan, shapes_of

_PLANS = 8  # sizes of the input whose plans are kept
_NEAR_BYTES = 8 << 20
_NO_EXPORT = (
    "An optimised model has steps of its own, which torch.export cannot see: its package() compiles it for C++, and "
    "other engines take the model that it was made from, by torch.onnx.export(densify(copy.deepcopy(model)), ...)."
)
_NO_STATE = (
    "An optimised model has no state_dict: keep it by its save(path) and load_optimized(path), or keep the state of "
    "the model that it was made from."
)


class LayerTime(NamedTuple):
    """A step of an optimised model: the layer, its kernel and why, its density, what it takes in, its share of time."""

    layer: str
    kernel: str
    reason: str
    density: float | None
    fused: tuple[str, ...]
    ms: float
    share: float


def optimize_for_inference(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> OptimizedModel:
    """A copy of a model for inference on the CPU: sparse kernels with everything fused, planned memory.

    Batch norms are folded, activations and residual additions are done in the kernels' stores, and feature maps stay in
    the kernels' layout from layer to layer. Weights are looked at as they are: a dense layer whose weight has zeros
    enough runs sparse, whoever pruned it. What the kernels do not know runs by torch as captured. The model is
    unchanged and may be changed or freed afterwards.

    Args:
        model: in eval mode, on the CPU, float32 (or float64).
        example_inputs: a tensor, or a tuple of positional arguments, as ``torch.export`` takes them.
        dynamic_batch: the first dimension of every input that has the first input's batch may vary in calls. Where an
            input's first dimension is 1 whatever the batch, give an example with a batch of 2 or more. Where the
            model's own code treats a batch of 1 apart (as ``x.squeeze()`` does), such a batch is refused.

    Returns:
        A module that is called as the model is, with positional arguments. It computes in the dtype that it was
        captured in, whatever autocast says. It computes no gradients, and refuses inputs that require them. Several
        threads may call it at once.

    Raises:
        ValueError: for a model in training mode or on another device, or that ``torch.export`` cannot capture.
        TypeError: for what is no module, and for parameters and inputs of other dtypes than float32, or float64.
        RuntimeError: where the package was built without its compiled part.
    """
    if not _library.has_kernel_for("serve_run", "cpu"):
        raise RuntimeError("optimize_for_inference needs the compiled part of uasparse_kernels; build the package.")
    check_model(model)
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"Expected a model in eval mode, got {training[0]!r} in training mode; call model.eval().")
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError("Expected example inputs with at least one tensor.")
    for tensor in tensors:
        if 0 in tensor.shape:
            raise ValueError(f"Expected example inputs with sizes and a batch of at least 1, got {list(tensor.shape)}.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *(("an input", t) for t in tensors)]:
        if tensor.device.type != "cpu":
            raise ValueError(f"Expected everything on the CPU, got {name} on {tensor.device}; call model.cpu().")
    dtypes = {t.dtype for t in (*model.parameters(), *tensors) if t.is_floating_point()}
    if dtypes not in ({torch.float32}, {torch.float64}, set()):
        raise TypeError(
            "Expected parameters and inputs all of float32, or all of float64, got "
            f"{', '.join(sorted(map(str, dtypes)))}; call model.float(), and .float() of the inputs."
        )
    return OptimizedModel(normalise(capture(model, arguments, dynamic_batch)))


class OptimizedModel(nn.Module):
    """What :func:`optimize_for_inference` returns."""

    _is_optimized_copy = True  # its weights are in its graph: no parameters, no state

    def __init__(self, graph: Graph):
        super().__init__()
        self.training = False
        graph.constants = {name: compact(constant) for name, constant in graph.constants.items()}
        self._graph = graph
        self._steps = fuse(graph)
        used = {name for step in self._steps for name in step.refs()} | set(graph.results())
        self._constants = {name: dense(graph.constants[name]) for name in used if name in graph.constants}
        dtypes = {t.dtype for t in graph.constants.values()}
        self._dtype = torch.float64 if torch.float64 in dtypes and torch.float32 not in dtypes else torch.float32
        self._by_sample = graph.least_batch == 1 and by_sample(graph, self._steps)
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._arenas: list[Tensor] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: plans are made anew, from what is left."""
        return self.__dict__ | {"_plans": OrderedDict(), "_arenas": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_lock": threading.Lock()})

    def extra_repr(self) -> str:
        """What it is called with."""
        graph, said = self._graph, []
        for name, shape, dtype in zip(graph.inputs, graph.input_shapes, graph.input_dtypes, strict=True):
            sizes = ", ".join("batch" if size is None else str(size) for size in shape)
            said.append(f"{name}: {str(dtype).removeprefix('torch.')} [{sizes}]")
        return ", ".join(said)

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise ValueError("An optimised model has no training mode; train the model that it was made from.")
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_STATE)  # an empty state would be taken for a whole one

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_STATE)

    @_library.apart_when_compiled  # its steps are compiled already
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(_NO_EXPORT)
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.forward(*args, **kwargs)
        inputs = self._inputs(args, kwargs)
        with torch.no_grad():  # results are usual tensors, which a loss may take
            return self._run_parts(inputs)

    def _run_parts(self, inputs: list[Tensor]) -> Any:
        part = self._part(inputs)
        if part is None:
            return self._run(self._plan(inputs), inputs, None)
        results = []
        for start in range(0, inputs[0].shape[0], part):
            some = [t[start : start + part] for t in inputs]
            results.append(pytree.tree_leaves(self._run(self._plan(some), some, None)))
        whole = [torch.cat(tensors) for tensors in zip(*results, strict=True)]
        return pytree.tree_unflatten(whole, self._graph.out_spec)

    def _part(self, inputs: list[Tensor]) -> int | None:
        """Samples that run together where a batch can be parted: so many that their maps stay in a near cache."""
        if not self._by_sample or inputs[0].shape[0] == 1:
            return None
        one = self._plan([t[:1] for t in inputs])
        part = max(1, _NEAR_BYTES // (one.arena * self._dtype.itemsize))
        return None if part >= inputs[0].shape[0] else part

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        graph = self._graph
        try:
            inputs = self._graph.in_spec.flatten_up_to((args, kwargs))
        except ValueError as error:
            raise ValueError(
                f"Expected {len(graph.inputs)} inputs, by position and nested as in the example that the model was "
                f"optimised with, got {len(args)} by position and {len(kwargs)} by name: {error}"
            ) from None
        batch = None
        for name, value, shape, dtype in zip(graph.inputs, inputs, graph.input_shapes, graph.input_dtypes, strict=True):
            if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
                got = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"Expected {name} to be a dense tensor on the CPU, got {got}.")
            if _wants_derivatives(value):
                raise ValueError(
                    f"Expected {name} not to require gradients, for an optimised model computes none: call it under "
                    f"torch.no_grad() or with {name}.detach(); for derivatives call the original model."
                )
            if value.dtype != dtype:
                raise TypeError(f"Expected {name} of dtype {dtype}, got {value.dtype}; convert it with .to({dtype}).")
            same = len(shape) == value.dim() and all(s in (None, v) for s, v in zip(shape, value.shape, strict=True))
            varies = shape[:1] == [None]
            wrong = varies and (batch not in (None, value.shape[0]) or value.shape[0] < graph.least_batch)
            if not same or 0 in value.shape or wrong:
                wanted = ", ".join("batch" if s is None else str(s) for s in shape)
                one = f"the batch is {graph.least_batch} or more, the same for all inputs; " if None in shape else ""
                if varies and same and 0 < value.shape[0] < graph.least_batch:
                    one += "the model's own code treats a batch of 1 apart; "
                raise ValueError(
                    f"Expected {name} of shape [{wanted}], got {list(value.shape)}; {one}other sizes need a model "
                    "optimised with such an example."
                )
            if varies:
                batch = value.shape[0]
        return inputs

    def _plan(self, inputs: list[Tensor]) -> Plan:
        key = tuple(t.shape for t in inputs)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                # So that a plan's tensors have a version: without one the kernels check them at each call.
                with torch.inference_mode(False), torch.no_grad():
                    shapes = shapes_of(self._graph, inputs)
                    plan = make_plan(self._graph, self._steps, shapes, self._dtype)
                    self._merge(plan)
                self._plans[key] = plan
                while len(self._plans) > _PLANS:
                    self._plans.popitem(last=False)
            else:
                self._plans.move_to_end(key)
        return plan

    @staticmethod
    def _merge(plan: Plan) -> None:
        """Joins neighbouring programs into one call of the interpreter, beside the single ones that explain() times."""
        plan.merged = []
        for call in plan.calls:
            before = plan.merged[-1] if plan.merged else None
            apart = call.program is None or before is None or before.program is None
            if apart or {name for name, _ in before.outputs} & set(call.inputs):
                plan.merged.append(Call(**{f: getattr(call, f) for f in call.__dataclass_fields__}))
                continue
            program = call.program.clone()
            # A tensor's index is a step's own: it counts from those of the steps before it.
            at = {LOAD: 1, STORE: 9, ROWS: 1, LOOKUP: 1}.get(int(program[0]))
            if at is not None and int(program[at]) >= 0:
                program[at] += len(before.outputs) if int(program[0]) == STORE else len(before.inputs)
            assert before.program is not None
            before.program = torch.cat([before.program, program])
            before.inputs += call.inputs
            before.outputs += call.outputs
            before.drop += call.drop

    def _run(self, plan: Plan, inputs: list[Tensor], times: list[float] | None) -> Any:
        env: dict[str, Any] = dict(zip(self._graph.inputs, inputs, strict=True))
        env |= self._constants
        with self._lock:
            arena = next((a for a in self._arenas if a.numel() >= plan.arena), None)
            if arena is not None:
                self._arenas = [a for a in self._arenas if a is not arena]
            elif self._arenas:
                self._arenas.pop()  # the larger one takes its place: as many as calls at once
        if arena is None:
            arena = torch.empty(plan.arena, dtype=self._dtype, device="cpu")
        run = torch.ops.uasparse.serve_run.default
        for call in plan.merged if times is None else plan.calls:
            start = time.perf_counter() if times is not None else 0.0
            if call.program is not None:
                given = [env[name].contiguous() for name in call.inputs]
                made = [torch.empty(shape, dtype=self._dtype, device="cpu") for _, shape in call.outputs]
                for (name, _), tensor in zip(call.outputs, made, strict=True):
                    env[name] = tensor
                if torch.compiler.is_exporting():  # AOTInductor hands an empty list over as none
                    given, made = given or [arena.new_empty(0)], made or [arena.new_empty(0)]
                run(arena, call.program, plan.ints, plan.values, given, made)
            else:
                assert call.function is not None
                env[call.result] = call.function(*fill(call.arguments, env), **fill_all(call.keywords, env))
            for name in call.drop:
                env.pop(name, None)
            if times is not None:
                times.append(time.perf_counter() - start)
        with self._lock:
            self._arenas.append(arena)
        leaves = [env[leaf.name] if isinstance(leaf, Ref) else leaf for leaf in self._graph.outputs]
        return pytree.tree_unflatten(leaves, self._graph.out_spec)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to a safetensors file: its graph and its weights, sparse ones by their nonzeros.

        Nothing in it depends on the machine: kernels and layouts are chosen where it is loaded.
        """
        content = {"kind": "optimized", "graph": files.graph_to_json(self._graph), "torch": torch.__version__}
        files.write(path, self._graph.constants, content)

    def package(self, path: str | os.PathLike[str], batch: int = 1) -> None:
        """Compiles the model by AOTInductor to a ``.pt2`` package, which C++ programs run without Python.

        Its inputs have the captured sizes and this batch, and are contiguous; its outputs are a flat list. A program
        loads this package's compiled part (``_C_torch*.abi3.so``) before it, as examples/serve_cpp does, on a machine
        that has this one's instruction sets.

        Raises:
            ValueError: for a path that does not end in ``.pt2``, or a batch below 1 (or below 2 where the model's own
                code treats a batch of 1 apart).
            RuntimeError: where there is no C++ compiler.
        """
        package(OptimizedModel(self._graph), path, batch)

    def explain(self, *args: Any, **kwargs: Any) -> list[LayerTime]:
        """Runs the model a few times, step by step: kernel, density, what is fused, and share of the time of each."""
        inputs = self._inputs(args, kwargs)
        rounds = []
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            plan = self._plan(inputs)
            for _ in range(5):
                times: list[float] = []
                self._run(plan, inputs, times)
                rounds.append(times)
        best = [sorted(column)[len(rounds) // 2] for column in zip(*rounds, strict=True)]
        total = sum(best) or 1.0
        return [
            LayerTime(e.layer, e.kernel, e.reason, e.density, e.fused, 1e3 * t, t / total)
            for e, t in zip((call.entry for call in plan.calls), best, strict=True)
        ]


def _wants_derivatives(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # of torch.func: vmap too
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def load_optimized(path: str | os.PathLike[str]) -> OptimizedModel:
    """The model that :meth:`OptimizedModel.save` wrote.

    Raises:
        ValueError: for a file that is damaged, of another version, not of an optimised model, or whose graph this torch
            cannot run.
    """
    tensors, content = files.read(path)
    if content.get("kind") != "optimized":
        raise ValueError(f"{os.fspath(path)} holds no optimised model; read weights with load_sparse(model, path).")
    try:
        return OptimizedModel(files.graph_from_json(content["graph"], tensors))
    except Exception as error:  # a graph can be wrong in every way
        made = content.get("torch")
        if made and made != torch.__version__:
            raise ValueError(
                f"{os.fspath(path)} was written with torch {made}, and this torch, {torch.__version__}, cannot run its "
                f"graph: {error!r:.300}; optimise and save the model with this one."
            ) from error
        raise ValueError(f"{os.fspath(path)} is damaged: its graph cannot be run: {error!r:.300}.") from error
