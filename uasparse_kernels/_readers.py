"""Finds the layers whose weight a model reads itself, instead of calling the layer: those must stay dense."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

# What may be asked of a weight whatever its shape.
_HARMLESS = {"device", "dtype", "is_cuda", "is_meta", "layout", "requires_grad"}


def read_weights(model: nn.Module, apart_from: type[nn.Module] | None = None) -> dict[str, str]:
    """Layers whose ``weight`` the forward of a module above them reads (``self.qkv.weight``), and that module's class.

    Of an attention's ``in_proj_weight`` or ``in_proj_bias`` the layer is its ``in_proj``, be there one or not.
    Found in the source of ``forward`` and of the methods that it uses; what is not found there is noticed at the first
    topology update (``DynamicSparsity``).

    Args:
        apart_from: a class (exactly) that may read.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        for path in _paths_read(kind) if kind is not apart_from else ():
            found.setdefault(".".join(filter(None, (name, path))), type(module).__name__)
    return found


@functools.cache
def _paths_read(cls: Any) -> frozenset[str]:
    """Of a class, the ``path`` of every ``self.path.weight`` that its forward reads as a tensor."""
    if cls.__module__.startswith("uasparse_kernels."):
        return frozenset()
    paths, waiting, seen = set(), ["forward"], {"forward"}
    while waiting:
        function = getattr(cls, waiting.pop(), None)
        tree = _source_tree(function)
        if tree is None:
            continue
        leaves = function is nn.TransformerEncoderLayer.forward  # reads for a path that sparsify has it leave
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node, path in _attributes_of_self(tree):
            if len(path) == 1 and path[0] not in seen and callable(getattr(cls, path[0], None)):
                seen.add(path[0])
                waiting.append(path[0])
            layer = _layer_read(path)
            if layer and not leaves and not _is_harmless(node, parents.get(node)):
                paths.add(layer)
    return frozenset(paths)


def _layer_read(path: list[str]) -> str:
    if len(path) < 2:
        return ""
    if path[-1] == "weight":
        return ".".join(path[:-1])
    match = re.fullmatch(r"(\w+_proj)_(weight|bias)", path[-1])
    return ".".join([*path[:-1], match[1]]) if match else ""


def _source_tree(function: object) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError, ValueError):
        return None  # no function, or none written in Python


def _attributes_of_self(tree: ast.AST) -> Iterator[tuple[ast.Attribute, list[str]]]:
    """Every ``self.a.b`` of a method, as its node and ``["a", "b"]``."""
    for node in ast.walk(tree):
        path: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            path.insert(0, at.attr)
            at = at.value
        if path and isinstance(at, ast.Name) and at.id == "self":
            assert isinstance(node, ast.Attribute)
            yield node, path


def _is_harmless(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether a weight's values and shape have no part in what is done with it."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "type")
    return isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
