"""From a captured graph to layers: batch norms folded, residual additions and activations joined to them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uasparse_kernels.inference.compact import Compact, Constant, dense
from uasparse_kernels.inference.graph import Graph, Node, Ref

# The order of csrc/cpu/serve.h.
ACTIVATIONS = (
    "none", "relu", "clamp", "leaky", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "gelu_tanh",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Activation:
    kind: str = "none"
    a: float = 0.0
    b: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        functional = torch.nn.functional
        match self.kind:
            case "relu":
                return x.relu()
            case "clamp":
                return x.clamp(self.a, self.b)
            case "leaky":
                return functional.leaky_relu(x, self.a)
            case "hardswish":
                return functional.hardswish(x)
            case "hardsigmoid":
                return functional.hardsigmoid(x)
            case "silu":
                return functional.silu(x)
            case "sigmoid":
                return x.sigmoid()
            case "gelu":
                return functional.gelu(x)
            case "gelu_tanh":
                return functional.gelu(x, approximate="tanh")
        return x


@dataclasses.dataclass
class Layer:
    """A convolution or linear layer with what is fused: act(conv(x) + bias + residual)."""

    name: str  # of the result, the last fused node's
    label: str  # the layer's name in the model
    input: str
    stored: Constant  # the weight without what is folded: [out, in / groups, kh, kw] or [out, in]
    bias: Tensor | None
    conv: dict[str, Any] | None  # stride, padding, dilation, groups; None for a linear layer
    scale: Tensor | None = None  # of a batch norm, by output channel
    residual: str | None = None
    act: Activation = Activation()
    fused: tuple[str, ...] = ()

    def weight(self) -> Tensor:
        """The weight with what is folded, dense: made when it is asked for, as a model of sparse layers keeps none."""
        weight = dense(self.stored)
        if self.scale is None:
            return weight
        folded: Any = (weight if isinstance(self.stored, Compact) else weight.clone()).numpy()
        scale: Any = self.scale.view(-1, *[1] * (weight.dim() - 1)).numpy()
        return torch.from_numpy(np.multiply(folded, scale, out=folded, casting="same_kind"))

    @functools.cached_property
    def kept_weight(self) -> Tensor:
        """The same for torch's kernels, which want it at each call."""
        return self.weight()

    def refs(self) -> Iterable[str]:
        yield self.input
        if self.residual is not None:
            yield self.residual


@dataclasses.dataclass
class Affine:
    """A batch norm that no layer takes in: scale and shift by channel, then an activation."""

    name: str
    label: str
    input: str
    scale: Tensor
    shift: Tensor
    act: Activation = Activation()

    def refs(self) -> Iterable[str]:
        yield self.input


Step = Node | Layer | Affine


def activation_of(node: Node) -> Activation | None:
    def argument(index: int, name: str, default: Any) -> Any:
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    match node.target:
        case "aten.relu.default":
            return Activation("relu")
        case "aten.relu6.default":
            return Activation("clamp", 0.0, 6.0)
        case "aten.hardtanh.default":
            return Activation("clamp", float(argument(1, "min_val", -1.0)), float(argument(2, "max_val", 1.0)))
        case "aten.leaky_relu.default":
            return Activation("leaky", float(argument(1, "negative_slope", 0.01)))
        case "aten.hardswish.default":
            return Activation("hardswish")
        case "aten.hardsigmoid.default":
            return Activation("hardsigmoid")
        case "aten.silu.default":
            return Activation("silu")
        case "aten.sigmoid.default":
            return Activation("sigmoid")
        case "aten.gelu.default":
            return Activation("gelu_tanh" if argument(1, "approximate", "none") == "tanh" else "gelu")
    return None


_NORM = "aten._native_batch_norm_legit_no_training.default"


def fuse(graph: Graph) -> list[Step]:
    """The graph's steps in order, with layers in place of what they take in."""
    users = graph.users()
    by_name = {node.name: node for node in graph.nodes}
    place = {name: i for i, name in enumerate([*graph.constants, *graph.inputs, *by_name])}
    gone: set[str] = set()
    steps: list[Step] = []

    def only_user(name: str) -> Node | None:
        found = users.get(name, [])
        return by_name.get(found[0]) if len(found) == 1 else None

    def norm_after(name: str, node: Node | None, layer: Layer | None = None) -> tuple[str, Tensor, Tensor] | None:
        """The result's name, scale and shift of a batch norm of ``name``."""
        if node is None or node.target != _NORM or node.args[0] != Ref(name):
            return None
        # Over dimension 1, which is not a layer's channels in [N, T, C] or without a batch.
        if layer is not None and graph.shapes.get(name, "").count(", ") != (1 if layer.conv is None else 3):
            return None
        constants = [graph.constants.get(a.name) if isinstance(a, Ref) else None for a in node.args[1:5]]
        parts = [None if part is None else dense(part) for part in constants]
        weight, bias, mean, variance = parts
        rest = [by_name[user] for user in users.get(node.name, []) if user in by_name]
        if mean is None or variance is None or len(rest) != 1 or rest[0].args[1] != 0:
            return None
        scale = (variance.double() + float(node.args[6])).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        if not scale.isfinite().all():  # folded into a zero weight it would be NaN
            return None
        shift = -mean.double() * scale
        return rest[0].name, scale, shift if bias is None else shift + bias.double()

    for node in graph.nodes:
        if node.name in gone:
            continue
        if layer := _layer(graph, node):
            current, fused = node.name, []
            after = only_user(current)
            if layer.stored.dtype.is_floating_point and (norm := norm_after(current, after, layer)):
                assert after is not None
                gone |= {after.name, norm[0]}
                current = norm[0]
                layer.scale = norm[1]
                bias = norm[2] if layer.bias is None else layer.bias.double() * layer.scale + norm[2]
                layer.bias = bias.to(layer.stored.dtype)
                fused.append("batch norm")
                after = only_user(current)
            other = None if after is None else _other_operand(graph, after, current)
            if after is not None and other is not None and place[other] < place[node.name]:
                gone.add(after.name)
                current, layer.residual = after.name, other
                fused.append("residual")
                after = only_user(current)
            if after is not None and (act := activation_of(after)) and after.args[0] == Ref(current):
                gone.add(after.name)
                current, layer.act = after.name, act
                fused.append(
                    act.kind if act.kind != "clamp" else "relu6" if act == Activation("clamp", 0.0, 6.0) else "clamp"
                )
            layer.name, layer.fused = current, tuple(fused)
            steps.append(layer)
        elif node.target == _NORM and (norm := norm_after(node.args[0].name, node)):
            current = norm[0]
            gone.add(current)
            affine = Affine(current, node.name, node.args[0].name, norm[1], norm[2])
            after = only_user(current)
            if after is not None and (act := activation_of(after)) and after.args[0] == Ref(current):
                gone.add(after.name)
                affine.name, affine.act = after.name, act
            steps.append(affine)
        else:
            steps.append(node)
    return steps


_BY_SAMPLE = {
    "aten.add.Tensor", "aten.max_pool2d.default", "aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default",
    "aten.reshape.default", "aten.flatten.using_ints", "aten.clone.default", "aten.cat.default", "aten.mean.dim",
}  # fmt: skip


def by_sample(graph: Graph, steps: list[Step]) -> bool:
    """True where every step is known to treat the samples of a batch apart: a batch may then run in parts."""
    firsts = {graph.shapes.get(name, "").split(",")[0] for name in graph.inputs}
    batch = firsts.pop()
    if firsts or not batch.startswith("(s"):
        return False

    def has_samples(name: str) -> bool:
        """True where the first dimension is the batch, and no other depends on it."""
        first, *rest = graph.shapes.get(name, "").split(",")
        return first == batch and not any(batch[1:] in size for size in rest)

    sizes = {node.name for node in graph.nodes if node.target == "aten.sym_size.int"}
    for step in steps:
        if step.name in sizes and isinstance(step, Node):
            continue
        names = [name for name in step.refs() if name not in sizes]
        if not all(map(has_samples, [step.name, *names])):
            return False
        if isinstance(step, Layer) and step.conv is None and graph.shapes[step.input].count(",") < 1:
            return False
        if isinstance(step, Node):
            if step.target not in _BY_SAMPLE and activation_of(step) is None:
                return False
            if len(names) < len([*step.refs()]) and step.target != "aten.reshape.default":  # computes with the batch
                return False
            if step.target == "aten.cat.default" and (len(step.args) < 2 or step.args[1] != 1):
                return False
            if step.target == "aten.mean.dim" and (0 in step.args[1] or graph.shapes[names[0]].count(",") != 3
                                                   or -4 in step.args[1]):  # fmt: skip
                return False
    return all(isinstance(leaf, Ref) and has_samples(leaf.name) for leaf in graph.outputs)


def _layer(graph: Graph, node: Node) -> Layer | None:
    if node.target not in ("aten.conv2d.default", "aten.linear.default"):
        return None
    weight = node.args[1]
    if not isinstance(weight, Ref) or weight.name not in graph.constants:
        return None
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is not None and bias.name not in graph.constants:
        return None
    conv = None
    if node.target == "aten.conv2d.default":
        defaults: list[Any] = [[1, 1], [0, 0], [1, 1], 1]
        values = list(node.args[3:]) + defaults[len(node.args[3:]) :]
        conv = dict(zip(("stride", "padding", "dilation", "groups"), values, strict=True))
        for name in ("stride", "padding", "dilation"):
            value = list(conv[name])
            conv[name] = tuple(value * 2 if len(value) == 1 else value)
    label = graph.names.get(weight.name, weight.name).removesuffix(".weight")
    return Layer(
        node.name,
        label,
        node.args[0].name,
        graph.constants[weight.name],
        None if bias is None else dense(graph.constants[bias.name]),
        conv,
    )


def _other_operand(graph: Graph, node: Node, name: str) -> str | None:
    """The other operand of an addition of two tensors of one shape."""
    if node.target != "aten.add.Tensor" or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if not (isinstance(a, Ref) and isinstance(b, Ref)) or a == b:
        return None
    other = b.name if a.name == name else a.name
    shapes = graph.shapes
    if other in graph.constants:
        return None
    return other if shapes.get(other) == shapes.get(name) is not None else None
