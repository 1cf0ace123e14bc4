"""Calls that are a linear layer or a convolution in other words, said in those that the kernels serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from uasparse_kernels.inference.compact import dense
from uasparse_kernels.inference.graph import Graph, Node, Ref


def normalise(graph: Graph) -> Graph:
    """The graph with ``conv2d`` of height 1 for ``conv1d``, and ``linear`` for ``addmm`` with a weight (Hugging Face's
    ``Conv1D``)."""
    nodes = [part for node in graph.nodes for part in _conv1d(graph, node) or _addmm(graph, node) or [node]]
    graph.nodes[:] = nodes
    used = graph.users()
    for name in [name for name in graph.constants if name not in used]:
        del graph.constants[name]
        graph.names.pop(name, None)
    return graph


def _conv1d(graph: Graph, node: Node) -> list[Node] | None:
    if node.target not in ("aten.conv1d.default", "aten.conv1d.padding") or node.kwargs:
        return None
    defaults: list[Any] = [None, [1], [0], [1], 1]
    input, weight, *rest = node.args
    bias, stride, padding, dilation, groups = rest + defaults[len(rest) :]
    values = _constant(graph, weight)
    if values is None or _rank(graph, input.name) != 3:
        return None
    if isinstance(padding, str):
        total = 0 if padding == "valid" else dilation[0] * (values.shape[2] - 1)
        if total % 2:
            return None
        padding = [total // 2]
    tall, wide = f"{node.name}_of_height_1", f"{node.name}_as_conv2d"
    weight = _put(graph, weight.name, "_of_height_1", values.unsqueeze(2))
    graph.shapes[tall], graph.shapes[wide] = (_with_height(graph.shapes[name]) for name in (input.name, node.name))
    geometry = [[1, *stride], [0, *padding], [1, *dilation], groups]
    return [
        Node(tall, "aten.unsqueeze.default", [input, 2], {}),
        Node(wide, "aten.conv2d.default", [Ref(tall), weight, bias, *geometry], {}),
        Node(node.name, "aten.squeeze.dim", [Ref(wide), 2], {}),
    ]


def _addmm(graph: Graph, node: Node) -> list[Node] | None:
    if node.target != "aten.addmm.default" or node.kwargs or len(node.args) != 3:
        return None
    bias, input, weight = node.args
    values, added = _constant(graph, weight), _constant(graph, bias)
    if values is None or added is None or tuple(added.shape) != (values.shape[1],) or not isinstance(input, Ref):
        return None
    transposed = _put(graph, weight.name, "_transposed", values.t().contiguous())
    return [Node(node.name, "aten.linear.default", [input, transposed, bias], {})]


def _constant(graph: Graph, argument: Any) -> Tensor | None:
    found = graph.constants.get(argument.name) if isinstance(argument, Ref) else None
    return None if found is None else dense(found)


def _put(graph: Graph, name: str, suffix: str, values: Tensor) -> Ref:
    graph.constants[name + suffix] = values
    graph.names[name + suffix] = graph.names.get(name, name)
    return Ref(name + suffix)


def _rank(graph: Graph, name: str) -> int:
    return len(graph.shapes.get(name, "").split(","))


def _with_height(shape: str) -> str:
    batch, channels, length = shape.strip("()").split(", ")
    return f"({batch}, {channels}, 1, {length})"
