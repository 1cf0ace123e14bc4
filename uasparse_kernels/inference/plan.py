"""From steps and concrete sizes to a plan: what the compiled interpreter runs, and what torch runs between.

layers.py, planes.py and tokens.py say what becomes of each step; builder.py is what they build with, maps.py how
results lie in memory.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor

from uasparse_kernels.inference.builder import Builder, Entry, Plan
from uasparse_kernels.inference.fuse import Affine, Layer, Step
from uasparse_kernels.inference.graph import Graph, Ref, fill, fill_all, resolve
from uasparse_kernels.inference.layers import add_layer
from uasparse_kernels.inference.planes import add_affine, add_node


def make_plan(graph: Graph, steps: list[Step], shapes: dict[str, Any], dtype: torch.dtype) -> Plan:
    """The plan of ``steps`` for results of these ``shapes`` (:func:`shapes_of`)."""
    b = Builder(graph, shapes, dtype)
    wanted = set(graph.results())
    for step in steps:
        if isinstance(step, Layer):
            add_layer(b, step)
        elif isinstance(step, Affine):
            add_affine(b, step)
        elif step.target == "aten.sym_size.int" and isinstance(step.args[1], int):
            size = shapes[step.args[0].name][step.args[1]]
            b.torch_call(Entry(step.name, "torch", "size", None, ()), lambda size=size: size, [], {}, step.name)
        elif not add_node(b, step):
            entry = Entry(step.name, "torch", step.target, None, ())
            b.torch_call(entry, resolve(step.target), step.args, step.kwargs, step.name)
    seen = set()
    for name in wanted:
        b.tensor(name)
        if (view := b.views.get(name)) is not None:
            if view.map in seen:  # no two results share memory: one may be a copy of the other
                b.torch_call(Entry(name, "torch", "a copy", None, ()), torch.clone, [Ref(name)], {}, name)
            seen.add(view.map)
    return b.finish(wanted)


def shapes_of(graph: Graph, inputs: list[Tensor]) -> dict[str, Any]:
    """The shapes of all results for inputs of these sizes."""
    # Torch's shape functions import its compiler, which takes a second and 80 MB: most models need none of them.
    return captured_shapes(graph, inputs) or shapes_by_run(graph, inputs)


def captured_shapes(graph: Graph, inputs: list[Tensor]) -> dict[str, Any] | None:
    """The shapes that the graph was captured with, at the inputs' batch; None where one depends on more than that."""
    sizes: dict[str, int] = {}
    try:
        written = {name: _tuple(text) for name, text in graph.shapes.items()}
        for name, tensor in zip(graph.inputs, inputs, strict=True):
            symbols = zip(written[name], tensor.shape, strict=True)
            sizes |= {size.id: found for size, found in symbols if isinstance(size, ast.Name)}
        shapes = {name: [_value(size, sizes) for size in parts] for name, parts in written.items()}
    except (LookupError, ValueError, ArithmeticError, SyntaxError, RecursionError):
        return None
    same = all(shapes[name] == list(tensor.shape) for name, tensor in zip(graph.inputs, inputs, strict=True))
    return shapes if same else None


def _tuple(text: str) -> list[ast.expr]:
    body = ast.parse(text, mode="eval").body
    if not isinstance(body, ast.Tuple):
        raise ValueError(f"expected a tuple, got {text!r:.80}")
    return body.elts


def _value(size: ast.AST, sizes: dict[str, int]) -> int:
    """Of a size such as ``197*s0``; LookupError for others than sums and products of integers and known symbols."""
    match size:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.BinOp(left=left, op=ast.Add() | ast.Mult() | ast.FloorDiv() as op, right=right):
            a, b = _value(left, sizes), _value(right, sizes)
            return a + b if isinstance(op, ast.Add) else a * b if isinstance(op, ast.Mult) else a // b
    raise LookupError(type(size).__name__)


def shapes_by_run(graph: Graph, inputs: list[Tensor]) -> dict[str, Any]:
    """The same by running the graph on the meta device, which computes shapes alone."""
    known = {**graph.constants, **dict(zip(graph.inputs, inputs, strict=True))}
    env: dict[str, Any] = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in known.items()}
    for node in graph.nodes:
        keywords = {k: "meta" if k == "device" else v for k, v in fill_all(node.kwargs, env).items()}
        env[node.name] = resolve(node.target)(*fill(node.args, env), **keywords)
    return {name: list(t.shape) for name, t in env.items() if isinstance(t, Tensor)}
