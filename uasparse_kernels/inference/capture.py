"""Captures a model's eval graph by torch.export."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

from uasparse_kernels.convert import densify
from uasparse_kernels.inference.compact import dense
from uasparse_kernels.inference.graph import Graph, Node, Ref, fill, fill_all, resolve
from uasparse_kernels.inference.plan import captured_shapes


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_batch: bool) -> Graph:
    """The eval graph of a densified copy of ``model``, by torch.export."""
    settled = densify(_settled(model)).eval()
    first = next(t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor))
    batch = first.shape[0] if first.dim() else 0
    if dynamic_batch and not batch:
        raise ValueError("Expected a first input with a batch, got a number; pass dynamic_batch=False.")
    dim = torch.export.Dim("batch", min=1, max=1 << 20)
    dynamic = torch.export.ShapesCollection()  # by tensor, whatever the signature of the model's forward

    def varies(t: Any) -> bool:
        return dynamic_batch and isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch

    def apart(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # A copy: export takes a tensor that is given twice for one input. And it takes sizes of 0 and 1 for constants.
        copied = torch.cat([t, t]) if varies(t) and batch == 1 else t.clone()
        if varies(t):
            dynamic[copied] = {0: dim}
        return copied

    inputs = pytree.tree_map(apart, example_inputs)
    try:
        with torch.no_grad(), one_cudnn_precision():
            # In their values' order; a functional graph, else as it was written.
            program = torch.export.export(
                settled, inputs, dynamic_shapes=dynamic if dynamic_batch else None
            ).run_decompositions({})
    except Exception as error:
        hint = " If the model's batch cannot vary, pass dynamic_batch=False." if dynamic_batch else ""
        raise ValueError(f"torch.export could not capture the model.{hint} It said: {error}") from error
    graph = _convert(program)
    one = pytree.tree_map(lambda t: t[:1] if varies(t) else t, example_inputs)
    if dynamic_batch and not _is_like(settled, graph, one):
        if batch == 1:
            raise ValueError(
                "The model's own code treats a batch of 1 apart (as x.squeeze() does), so that one capture cannot "
                "serve other batches too: pass dynamic_batch=False, or an example with a batch of 2 or more."
            )
        graph.least_batch = 2
    return graph


def _is_like(model: nn.Module, graph: Graph, inputs: tuple[Any, ...]) -> bool:
    """True where the graph gives what the model gives for these inputs. Export takes it for granted that a batch which
    varies is 2 or more."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            wanted = pytree.tree_leaves(model(*inputs))
        except Exception:  # what the model cannot do, the graph need not
            return False
        torch.manual_seed(0)
        found: dict[str, Any] = {name: dense(constant) for name, constant in graph.constants.items()}
        given = pytree.tree_leaves(inputs)
        found |= dict(zip(graph.inputs, given, strict=True))
        for node in graph.nodes:
            found[node.name] = resolve(node.target)(*fill(node.args, found), **fill_all(node.kwargs, found))
    got = [found[leaf.name] if isinstance(leaf, Ref) else leaf for leaf in graph.outputs]
    shapes = captured_shapes(graph, given) or {}  # which a plan goes by
    return (
        len(got) == len(wanted)
        and all(_close(*pair) for pair in zip(got, wanted, strict=True))
        and all(list(found[name].shape) == shape for name, shape in shapes.items())
    )


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    size = b.abs().nan_to_num(0, 0, 0).max().item() if b.is_floating_point() and b.numel() else 0.0
    return not b.is_floating_point() or torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


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


def _convert(program: Any) -> Graph:
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    parameters |= dict(signature.inputs_to_lifted_tensor_constants)
    inputs, nodes, constants, names, outputs = [], [], {}, {}, None
    shapes: list[list[int | None]] = []
    dtypes: list[torch.dtype] = []
    sizes: dict[str, str] = {}
    within: dict[str, nn.Module] = {}  # graphs that control flow runs
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
                # A copy of what is no part of the model, which was copied.
                lifted = node.name in signature.inputs_to_lifted_tensor_constants
                constants[node.name] = state[name].detach().clone() if lifted else state[name].detach()
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
            arguments, keywords = _plain(list(node.args), within), _plain(dict(node.kwargs), within)
            if node.target == torch.ops.aten.add.Tensor:  # which a layer may take in, its operands in one dtype
                for i, operand in enumerate(node.args):
                    value, to = getattr(operand, "meta", {}).get("val"), node.meta["val"].dtype
                    if isinstance(value, Tensor) and value.dim() and value.dtype != to:
                        converted = f"{node.name}_operand_{i}"
                        nodes.append(Node(converted, "aten._to_copy.default", [arguments[i]], {"dtype": to}))
                        arguments[i], sizes[converted] = Ref(converted), sizes[operand.name]
            nodes.append(Node(node.name, _name(node.target), arguments, keywords))
        elif node.op == "output":
            outputs = _plain(list(node.args[0]), within)
        elif node.op == "get_attr" and isinstance(part := getattr(program.graph_module, node.target), nn.Module):
            within[node.name] = part
        else:
            raise ValueError(f"The captured graph has a {node.op} node ({node.target}), which cannot be run.")
    spec = program.call_spec
    return Graph(inputs, nodes, outputs, constants, shapes, dtypes, spec.in_spec, spec.out_spec, names, sizes)


def _plain(argument: Any, within: dict[str, nn.Module]) -> Any:
    if isinstance(argument, torch.fx.Node):
        return within.get(argument.name) or Ref(argument.name)
    if isinstance(argument, list | tuple):
        return [_plain(a, within) for a in argument]
    if isinstance(argument, dict):
        return {k: _plain(v, within) for k, v in argument.items()}
    if isinstance(argument, torch.SymInt):
        raise ValueError(
            "The captured graph computes with the batch in a way that cannot be kept; pass dynamic_batch=False."
        )
    return argument


def _name(target: Any) -> str:
    # Results may be laid out otherwise than in the capture.
    if target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        target = torch.ops.aten.reshape.default
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"control.{target.name()}"
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return f"operator.{target.__name__}"
    raise ValueError(f"The captured graph calls {target}, which an optimised model cannot run.")
