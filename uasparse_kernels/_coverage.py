"""How much of a model is in sparse layers, and why the rest is not."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.registry import kind_of

logger = logging.getLogger("uasparse_kernels")

# Why sparsify left a module as it is. Of a copy of the model it is not known.
DENSE_BECAUSE: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_ENOUGH = 0.8


class Matrix(NamedTuple):
    """A parameter of two or more dimensions, and the shape that it has as a dense one."""

    layer: str
    module: Any
    name: str
    tensor: Tensor
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """Every such parameter once, packed ones too."""
    seen = set()
    for layer, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is None or is_lazy(tensor) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            shape = dense_shape(module) if name == "weight" and isinstance(module, SparseLayer) else tuple(tensor.shape)
            if len(shape) > 1:
                yield Matrix(layer, module, name, tensor, shape)


def dense_shape(layer: Any) -> tuple[int, ...]:
    """Of the weight of a dense or a sparse layer."""
    return layer.dense_shape if isinstance(layer, SparseLayer) else tuple(layer.weight.shape)


def pattern_shape(layer: Any) -> tuple[int, ...]:
    """Of the pattern that a dense or a sparse layer has, or would have."""
    return layer.pattern.shape if isinstance(layer, SparseLayer) else tuple(pattern_view(layer, layer.weight).shape)


def pattern_view(layer: Any, weight: Tensor) -> Tensor:
    """A tensor of the shape of a dense layer's weight, in the pattern's."""
    kind = kind_of(type(layer))
    return weight if kind is None else kind.pattern_view(weight)


def check_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The names of modules and of all modules in them. Where one has several names it is found by each, and called by
    that of ``named_modules()``.

    Raises:
        TypeError: for one string, which would be taken letter by letter.
        ValueError: for names that no module of the model has.
    """
    if isinstance(names, str):
        raise TypeError(f"Expected a list of names, got a string; pass [{names!r}].")
    own = {id(module): name for name, module in model.named_modules()}
    found, unknown = set(), set()
    for name in names:
        try:
            inside = [id(module) for module in model.get_submodule(name).modules()] if name else [id(model)]
            found |= {own[module] for module in inside}
        except (AttributeError, KeyError):  # none, none of the model's, or no name at all
            unknown.add(name)
    if unknown:
        listed = ", ".join(sorted(map(repr, unknown)))
        raise ValueError(f"No layer of the model is named {listed}; see model.named_modules().")
    return found


def warn_of_the_rest(model: nn.Module, covered: Collection[str]) -> None:
    """Logs one line where the layers that sparsify covers hold too few of a model's weights."""
    kinds: Counter[str] = Counter()
    total = 0
    for matrix in matrices(model):
        total += matrix.size
        if matrix.layer not in covered:
            kinds[f"{type(matrix.module).__name__}.{matrix.name}"] += matrix.size
    share = 1 - sum(kinds.values()) / max(1, total)
    if share < _ENOUGH:
        rest = ", ".join(f"{kind} {size / total:.1%}" for kind, size in kinds.most_common(4))
        logger.warning(
            "sparsify covers %.1f%% of the weights in matrices; of the others, %s; summary(model) names all.",
            100 * share,
            rest,
        )


def outputs_without_weights(layers: Mapping[str, SparseLayer]) -> dict[str, tuple[int, int]]:
    """By layer, how many outputs no active weight reaches, and how many there are: where that is half or more.

    Such outputs are constants; behind a layer that has no others, a network no longer sees its input.
    """
    known = {name: layer.pattern for name, layer in layers.items() if not layer.pattern.crow.is_meta}
    if not known:
        return {}
    first, *_ = known.values()
    empty = [(pattern.crow.diff() == 0).sum().to(first.device) for pattern in known.values()]
    counts = zip(known.items(), torch.stack(empty).tolist(), strict=True)
    found = {name: (count * pattern.block[0], pattern.shape[0]) for (name, pattern), count in counts}
    return {name: (count, outputs) for name, (count, outputs) in found.items() if 2 * count >= outputs > 0}


def describe_outputs(found: Mapping[str, tuple[int, int]]) -> str:
    """In words; the first few layers by name."""
    named = [f"{count} of {outputs} in {name or 'the layer'}" for name, (count, outputs) in found.items()]
    return ", ".join(named[:4]) + (f" and in {len(named) - 4} more layers" if len(named) > 4 else "")
