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

# Read for a path that sparsify has them leave.
_FUSED = (nn.TransformerEncoderLayer.forward, nn.TransformerEncoder.forward)
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
            for layer in _named(module, path):
                found.setdefault(".".join(filter(None, (name, layer))), type(module).__name__)
    return found


def _named(module: nn.Module, path: str) -> list[str]:
    """The names that a path stands for, in which a ``*`` is any child."""
    if "*" not in path:
        return [path]
    pattern = re.compile(re.escape(path).replace(r"\*", r"[^.]+"))
    return [name for name, _ in module.named_modules() if pattern.fullmatch(name)]


@functools.cache
def _paths_read(cls: Any) -> frozenset[str]:
    """Of a class, the ``path`` of every ``self.path.weight`` that its forward reads as a tensor.

    ``layers.0`` is also what ``self.layers[0]`` reads, and ``layers.*`` what a loop over ``self.layers`` does.
    """
    if cls.__module__.startswith("uasparse_kernels."):
        return frozenset()
    paths, waiting, seen = set(), ["forward"], {"forward"}
    while waiting:
        function = getattr(cls, waiting.pop(), None)
        tree = _source_tree(function)
        if tree is None:
            continue
        leaves = function in _FUSED
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
    """Every ``self.a.b`` of a method, as its node and ``["a", "b"]``; of names that stand for such a path too."""
    function = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    arguments = [] if function is None else [*function.args.posonlyargs, *function.args.args]
    known: dict[str, list[str]] = {arguments[0].arg if arguments else "self": []}
    bindings = list(_bindings(tree))
    for _ in range(3):  # a name may stand for a path that begins with another
        for name, value, inside in bindings:
            path = _path(value, known)
            if path is not None and name not in known:
                known[name] = [*path, "*"] if inside else path
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (path := _path(node, known)):
            yield node, path


def _path(node: ast.AST, known: dict[str, list[str]]) -> list[str] | None:
    """``["a", "0", "b"]`` of ``self.a[0].b``; None for what does not begin with a known name."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        path = _path(node.value, known)
        return None if path is None else [*path, node.attr]
    if isinstance(node, ast.Subscript):
        path, index = _path(node.value, known), node.slice
        told = isinstance(index, ast.Constant) and isinstance(index.value, str | int)
        return None if path is None else [*path, str(index.value) if told else "*"]  # type: ignore[attr-defined]
    return None


def _bindings(tree: ast.AST) -> Iterator[tuple[str, ast.AST, bool]]:
    """Names, what is assigned to them, and whether they stand for the items in it (in a loop)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            yield from _pairs(node.targets[0], node.value, inside=False)
        elif isinstance(node, ast.For | ast.comprehension):
            yield from _pairs(node.target, node.iter, inside=True)


def _pairs(target: ast.AST, value: ast.AST, *, inside: bool) -> Iterator[tuple[str, ast.AST, bool]]:
    called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    if isinstance(target, ast.Name):
        yield target.id, value, inside
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call) and inside and called in ("enumerate", "zip"):
        targets = target.elts[1:] if called == "enumerate" else target.elts
        for part, items in zip(targets, value.args, strict=False):
            yield from _pairs(part, items, inside=True)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and not inside:
        for part, item in zip(target.elts, value.elts, strict=False):
            yield from _pairs(part, item, inside=False)


def _is_harmless(node: ast.AST, parent: ast.AST | None) -> bool:
    """Whether a weight's values and shape have no part in what is done with it."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "type")
    return isinstance(parent, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
