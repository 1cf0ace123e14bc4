"""From steps and concrete sizes to a plan: what the compiled interpreter runs, and what torch runs between.

layers.py, planes.py and tokens.py say what becomes of each step; builder.py is what they build with, maps.py how
results lie in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from uasparse_kernels.inference.builder import Builder, Entry, Plan
from uasparse_kernels.inference.fuse import Affine, Layer, Step
from uasparse_kernels.inference.graph import Graph, Ref, fill, fill_all, resolve
from uasparse_kernels.inference.layers import add_layer
from uasparse_kernels.inference.planes import add_affine, add_node


def make_plan(graph: Graph, steps: list[Step], shapes: dict[str, Any], dtype: torch.dtype) -> Plan:
    """The plan of ``steps`` for results of these ``shapes`` (:func:`shapes_of`)."""
    b = Builder(graph, shapes, dtype)
    wanted = {
        leaf.name
        for leaf in pytree.tree_leaves(graph.outputs, is_leaf=lambda x: isinstance(x, Ref))
        if isinstance(leaf, Ref)
    }
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
    for name in wanted:
        b.tensor(name)
    return b.finish(wanted)


def shapes_of(graph: Graph, inputs: list[Tensor]) -> dict[str, Any]:
    """The shapes of all results for inputs of these sizes, from a run of the graph on no device."""
    env: dict[str, Any] = {name: t.to("meta") for name, t in graph.constants.items()}
    env |= {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in zip(graph.inputs, inputs, strict=True)
    }
    for node in graph.nodes:
        keywords = {k: "meta" if k == "device" else v for k, v in fill_all(node.kwargs, env).items()}
        env[node.name] = resolve(node.target)(*fill(node.args, env), **keywords)
    return {name: list(t.shape) for name, t in env.items() if isinstance(t, Tensor)}
