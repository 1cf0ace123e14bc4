"""A captured graph: plain nodes that a file can hold, and their constants (capture.py makes one)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

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
    in_spec: pytree.TreeSpec  # of the arguments
    out_spec: pytree.TreeSpec
    names: dict[str, str]  # of constants: fully qualified names in the model
    shapes: dict[str, str]  # of results, for comparison: sizes may be symbols
    least_batch: int = 1  # 2 where the model's own code treats a batch of 1 apart

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
    """The function of a target's name; only torch's aten ops, those of this package, plain operators, and torch's
    control flow, which runs graphs within the graph."""
    space, *path = target.split(".")
    if space == "control" and len(path) == 1:
        return getattr(torch.ops.higher_order, path[0])
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
