"""The captured graph: plain nodes that a file can hold, and their constants."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from uasparse_kernels.convert import densify
from uasparse_kernels.inference.compact import Constant


@dataclasses.dataclass(frozen=True)
class Ref:
    """An argument that is another node's result."""

    name: str


@dataclasses.dataclass
class Node:
    """A call of ``target`` ("aten.relu.default", "operator.mul"); references stand for the results of others."""

    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]

    def refs(self) -> Iterator[str]:
        for leaf in pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda x: isinstance(x, Ref)):
            if isinstance(leaf, Ref):
                yield leaf.name


@dataclasses.dataclass
class Graph:
    inputs: list[str]
    nodes: list[Node]
    outputs: Any  # nested lists, tuples and dictionaries of Ref and constants
    constants: dict[str, Constant]
    input_shapes: list[list[int | None]]  # None: any batch
    input_dtypes: list[torch.dtype]
    in_spec: str  # pytree of the arguments, as JSON
    out_spec: str
    names: dict[str, str]  # of constants: fully qualified names in the model
    shapes: dict[str, str]  # of results, for comparison: sizes may be symbols

    def users(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in node.refs():
                found.setdefault(name, []).append(node.name)
        for name in self.results():
            found.setdefault(name, []).append("output")
        return found

    def results(self) -> list[str]:
        """The names of the outputs."""
        leaves = pytree.tree_leaves(self.outputs, is_leaf=lambda x: isinstance(x, Ref))
        return [leaf.name for leaf in leaves if isinstance(leaf, Ref)]


def resolve(target: str) -> Callable[..., Any]:
    """The function of a target's name; only torch's aten ops, those of this package and plain operators."""
    space, *path = target.split(".")
    if space == "operator" and len(path) == 1 and path[0] in _OPERATORS:
        return getattr(operator, path[0])
    if space in ("aten", "uasparse") and len(path) == 2 and path[0] not in _REFUSED:
        return getattr(getattr(getattr(torch.ops, space), path[0]), path[1])
    raise ValueError(f"Expected an aten op or an operator, got {target!r}.")


_REFUSED = {"from_file", "serve_run"}  # a model's file opens no other, and runs no plan but ours
_OPERATORS = {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge"}


def fill(argument: Any, env: dict[str, Any]) -> Any:
    """The argument with the values of ``env`` in place of references."""
    if isinstance(argument, Ref):
        return env[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(fill(a, env) for a in argument)
    return argument


def fill_all(kwargs: dict[str, Any], env: dict[str, Any]) -> dict[str, Any]:
    return {k: fill(v, env) for k, v in kwargs.items()}


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_batch: bool) -> Graph:
    """The eval graph of a densified copy of ``model``, by torch.export."""
    dense = densify(_settled(model)).eval()
    flat = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor)]
    dynamic: Any = None
    batch = flat[0].shape[0] if flat and flat[0].dim() else 0
    if dynamic_batch:
        if not batch:
            raise ValueError(
                f"dynamic_batch: expected a first input with a batch of at least 1, got {tuple(flat[0].shape)}."
            )
        dim = torch.export.Dim("batch", min=1, max=1 << 20)

        def varies(t: Any) -> bool:
            return isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch

        # Export takes sizes of 0 and 1 for constants.
        example_inputs = pytree.tree_map(lambda t: torch.cat([t, t]) if varies(t) and batch == 1 else t, example_inputs)
        dynamic = pytree.tree_map(
            lambda t: {0: dim} if isinstance(t, Tensor) and t.dim() and t.shape[0] == max(batch, 2) else None,
            example_inputs,
        )
    try:
        with torch.no_grad(), one_cudnn_precision():
            # In their values' order; a functional graph, else as it was written.
            program = torch.export.export(dense, example_inputs, dynamic_shapes=dynamic).run_decompositions({})
    except Exception as error:
        hint = " If the model's batch cannot vary, pass dynamic_batch=False." if dynamic_batch else ""
        raise ValueError(f"torch.export could not capture the model.{hint} It said: {error}") from error
    return _convert(program, dynamic_batch, batch)


def _settled(model: nn.Module) -> nn.Module:
    """A copy whose weights are parameters: with the masks of torch.nn.utils.prune, and parametrisations, applied."""
    # What a hook computed and put in a parameter's place refuses to be copied.
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    model = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            # By hand: the copy has the model's own class, from which remove_parametrizations would take the property.
            parametrized: Any = module.parametrizations
            weights = {name: getattr(module, name).detach() for name in parametrized}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return model


@contextlib.contextmanager
def one_cudnn_precision() -> Iterator[None]:
    """Export reads a flag that torch refuses to tell unless convolutions and RNNs on a GPU both have TF32 on."""
    both: list[Any] = [getattr(torch.backends.cudnn, part) for part in ("conv", "rnn")]
    before = [part.fp32_precision for part in both]
    for part in both:
        part.fp32_precision = "tf32"
    try:
        yield
    finally:
        for part, precision in zip(both, before, strict=True):
            part.fp32_precision = precision


def _convert(program: Any, dynamic_batch: bool, batch: int) -> Graph:
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    parameters |= dict(signature.inputs_to_lifted_tensor_constants)
    inputs, nodes, constants, names, outputs = [], [], {}, {}, None
    shapes: list[list[int | None]] = []
    dtypes: list[torch.dtype] = []
    sizes: dict[str, str] = {}
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise ValueError(
            "Expected a model that changes no buffer and no input in eval mode; does it begin with a layer of "
            "inplace=True?"
        )
    for node in program.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            sizes[node.name] = str(tuple(node.meta["val"].shape))
        if node.op == "placeholder":
            if node.name in parameters:
                name = parameters[node.name]
                constants[node.name] = state[name].detach()
                names[node.name] = name
            else:
                value = node.meta.get("val")
                inputs.append(node.name)
                if not isinstance(value, Tensor):
                    raise ValueError(
                        f"Expected tensors as inputs, got {type(value).__name__} for {node.name}; leave it out, or "
                        "wrap the model in a module that fixes it."
                    )
                shapes.append([s if isinstance(s, int) else None for s in value.shape])
                dtypes.append(value.dtype)
        elif node.op == "call_function":
            nodes.append(Node(node.name, _name(node.target), _plain(list(node.args)), _plain(dict(node.kwargs))))
        elif node.op == "output":
            outputs = _plain(list(node.args[0]))
        else:
            raise ValueError(f"The captured graph has a {node.op} node ({node.target}), which cannot be run.")
    spec = program.call_spec
    return Graph(
        inputs, nodes, outputs, constants, shapes, dtypes,
        pytree.treespec_dumps(spec.in_spec), pytree.treespec_dumps(spec.out_spec), names, sizes,
    )  # fmt: skip


def _plain(argument: Any) -> Any:
    if isinstance(argument, torch.fx.Node):
        return Ref(argument.name)
    if isinstance(argument, list | tuple):
        return [_plain(a) for a in argument]
    if isinstance(argument, dict):
        return {k: _plain(v) for k, v in argument.items()}
    if isinstance(argument, torch.SymInt):
        raise ValueError("The captured graph depends on a size in a way that cannot be held.")
    return argument


def _name(target: Any) -> str:
    # Results may be laid out otherwise than in the capture.
    if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        target = torch.ops.aten.reshape.default
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return f"operator.{target.__name__}"
    raise ValueError(f"The captured graph calls {target}, which cannot be held.")
