"""Which dense layers have a sparse form, and how one becomes the other."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Kind(NamedTuple):
    """A class of dense layers that can become sparse.

    ``from_dense(module, *, sparsity|pattern, block, storage)`` and ``to_dense(layer)`` convert; ``pattern_view`` gives
    the dense weight in the pattern's shape.
    """

    cls: type[nn.Module] | str
    from_dense: Callable[..., Any]
    to_dense: Callable[[Any], nn.Module]
    pattern_view: Callable[[Tensor], Tensor]
    built_in: bool = True


_KINDS: dict[type[nn.Module] | str, Kind] = {}  # by class, or by its full name where that is another package's


class Registration(NamedTuple):
    """What :func:`register_layer` returns."""

    cls: type[nn.Module]

    def remove(self) -> None:
        """Forgets the class. Layers that were made of it become dense again only once it is registered anew."""
        _KINDS.pop(self.cls, None)


def register_layer(
    cls: type[nn.Module], from_dense: Callable[..., Any], to_dense: Callable[[Any], nn.Module]
) -> Registration:
    """Registers your own class of layers with ``sparsify``, ``densify`` and everything that builds on them.

    Not needed for ``nn.Linear``, ``nn.Conv2d``, ``nn.Conv1d`` and Hugging Face's ``Conv1D``, nor for subclasses of them
    that change no behaviour (only ``__init__``, ``reset_parameters`` or constants): these become sparse, and
    ``densify`` restores their class.

    If your layer does something else than the built-in ones, write a sparse subclass of them. A convolution with its
    own padding only overrides ``padded``. One with its own ``forward`` must also define ``weight_gradient``, by which
    RigL and others grow; if its forward is the built-in one with other values for the weight,
    ``weight_gradient = SparseConv2d.weight_gradient`` does.

    Example:
        >>> class SparseConv2dSame(ua.SparseConv2d):
        ...     def padded(self, input):
        ...         return timm.layers.pad_same(input, self.kernel_size, self.stride, self.dilation), (0, 0)
        >>> ua.register_layer(Conv2dSame, SparseConv2dSame.from_dense, lambda layer: layer.to_dense(Conv2dSame))

    Args:
        cls: the class of dense layers, exactly: a subclass with its own behaviour needs its own registration. Its
            parameter ``weight`` is ``[out, in]`` or ``[out, in / groups, kh, kw]`` (for subclasses of ``nn.Conv1d`` and
            of Hugging Face's ``Conv1D``, as there).
        from_dense: called with a module of that class and the keywords of ``SparseLinear.from_dense`` (``sparsity`` or
            ``pattern``, ``block``, ``storage``); returns the sparse layer, with values. ``sparsify`` checks the result
            before it changes the model: a sparse layer with a pattern of the weight's shape, as requested.
        to_dense: called with that sparse layer; returns the dense layer, with values. It is of ``cls``, or of another
            class if only that one does the same. ``layer.to_dense(cls)`` does it for a class with the built-in class's
            arguments. Device, dtype, ``requires_grad`` of weight and bias, and the training flag are set for you.

    Returns:
        A handle; its ``remove()`` undoes the registration.

    Raises:
        TypeError: if cls is not a class of modules, or one of the others is not callable.
        ValueError: if cls already has a sparse form, or is one.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"Expected a class of nn.Module to register, got {cls!r}.")
    for name, function in (("from_dense", from_dense), ("to_dense", to_dense)):
        if not callable(function):
            raise TypeError(f"Expected {name} to be a function, got {function!r}.")
    if hasattr(cls, "pattern_view"):
        raise ValueError(f"Expected a class of dense layers, got {_name(cls)}, a sparse one.")
    if _registered(cls) is not None:
        raise ValueError(
            f"{_name(cls)} has a sparse form already; to give it another, remove() what register_layer() returned, or "
            "register a subclass."
        )
    base = next((kind for c in cls.__mro__ if (kind := _registered(c)) is not None), None)
    view = base.pattern_view if base is not None else _as_it_is
    _KINDS[cls] = Kind(cls, from_dense, to_dense, view, built_in=False)
    return Registration(cls)


def add_kind(cls: type[nn.Module] | str, layer: Any, to_dense: Callable[[Any], nn.Module]) -> None:
    """Registers one of ours: the sparse class has the rest."""
    _KINDS[cls] = Kind(cls, layer.from_dense, to_dense, layer.pattern_view)


def kind_of(cls: type) -> Kind | None:
    """How a class of dense layers becomes sparse; None where it does not."""
    for base in cls.__mro__:
        if (kind := _registered(base)) is None:
            continue
        if base is cls:
            return kind
        return None if _behaviour(cls, base) else kind._replace(to_dense=lambda layer: _become(kind, layer, cls))
    return None


def why_not(module: nn.Module) -> str | None:
    """Why a module of a class that looks like one of ours has no sparse form; None where it does not look like it, or
    has one."""
    cls = type(module)
    base = next((base for base in cls.__mro__ if _registered(base) is not None), None)
    if base is None:
        return None
    if parametrize.is_parametrized(module):
        return "it is parametrised"
    if base is not cls and (names := _behaviour(cls, base)):
        return (
            f"its class {_name(cls)} defines {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}, which a sparse "
            "layer may have to do too; register_layer() teaches it"
        )
    if "forward" in module.__dict__:
        return "its forward was replaced (module.forward = ...)"
    held = [name for name in (*module._parameters, *module._buffers) if name not in ("weight", "bias")]
    kind = kind_of(cls)
    if (held or module._modules) and kind is not None and (kind.built_in or kind.cls is not cls):
        masked = '; prune.remove(layer, "weight") makes its mask permanent' if "weight_mask" in held else ""
        return f"it holds {', '.join([*held, *module._modules])} besides weight and bias{masked}"
    return None


def make_sparse(name: str, module: Any, **options: Any) -> Any:
    """The sparse form of a dense layer, checked.

    Raises:
        TypeError, ValueError: if ``from_dense`` of its class does not keep to what :func:`register_layer` says.
    """
    cls = type(module)
    kind = kind_of(cls)
    assert kind is not None
    layer = kind.from_dense(module, **options)
    called = f"{name or cls.__name__}: from_dense of {_name(cls)}"
    if not hasattr(layer, "pattern_view"):
        raise TypeError(f"{called}: expected a sparse layer with a pattern, got a {type(layer).__name__}.")
    shape = tuple(kind.pattern_view(module.weight).shape)
    if layer.pattern.shape != shape:
        raise ValueError(f"{called}: expected a pattern of the weight's shape {shape}, got {layer.pattern.shape}.")
    wanted = options.get("pattern")
    if wanted is not None:
        is_meta = "meta" in (wanted.device.type, layer.pattern.device.type)
        same = is_meta or torch.equal(wanted.blocks(), layer.pattern.blocks().to(wanted.device))
        if wanted.block != layer.pattern.block or not same:
            raise ValueError(f"{called}: expected a layer of the pattern that was given, got another.")
    elif (
        layer.pattern.block != tuple(options["block"])
        or abs(layer.pattern.density - 1 + options["sparsity"]) * math.prod(layer.pattern.grid) > 1.001
    ):
        raise ValueError(
            f"{called}: expected sparsity {options['sparsity']:g} in blocks {tuple(options['block'])}, got "
            f"{1 - layer.pattern.density:g} in {layer.pattern.block}."
        )
    order = [next(i for i, c in enumerate(type(layer).__mro__) if f in vars(c)) for f in ("forward", "weight_gradient")]
    if order[0] < order[1]:
        raise TypeError(
            f"{called}: {type(layer).__name__} has a forward of its own, and must say what the gradient of its weight "
            "is: weight_gradient(input, grad_output, first, last), or weight_gradient = SparseConv2d.weight_gradient "
            "(SparseLinear's) where the forward is that of the built-in layer with other values for the weight."
        )
    layer.dense_class = cls
    _finish(module, layer)
    return layer


def make_dense(layer: Any) -> nn.Module:
    """The dense layer of the class that a sparse one was made of.

    Raises:
        ValueError: where the class is not registered here.
    """
    kind = kind_of(layer.dense_class)
    if kind is None:
        raise ValueError(
            f"Expected {_name(layer.dense_class)}, of which this {type(layer).__name__} was made, to be registered; "
            "call register_layer() first."
        )
    module = kind.to_dense(layer)
    if not isinstance(module, nn.Module) or hasattr(module, "pattern_view"):
        raise TypeError(f"to_dense of {_name(layer.dense_class)}: expected a dense layer, got {type(module).__name__}.")
    module.to(layer.weight.device, layer.weight.dtype)
    _finish(layer, module)
    return module


def _finish(source: Any, target: Any) -> None:
    for name in ("weight", "bias"):
        old, new = source._parameters.get(name), target._parameters.get(name)
        if old is not None and new is not None:
            new.requires_grad_(old.requires_grad)
    target.train(source.training)


def _become(kind: Kind, layer: Any, cls: type[nn.Module]) -> nn.Module:
    module = kind.to_dense(layer)
    module.__class__ = cls
    return module


def _registered(cls: type) -> Kind | None:
    return _KINDS.get(cls) or _KINDS.get(_name(cls))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


# What a class may define without any layer of it doing something else than its base. In Python's words, and torch's.
_NO_BEHAVIOUR = {"__init__", "reset_parameters", "extra_repr", "__repr__", "__constants__"}
_PYTHONS = {
    "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__",
}  # fmt: skip


def _behaviour(cls: type, base: type) -> list[str]:
    """Names by which a subclass may do something else than a class that it is derived from."""
    found: list[str] = []
    for part in cls.__mro__:
        if part in base.__mro__ or part is Generic:
            continue
        if not issubclass(part, base):
            found.append(part.__name__)
            continue
        for name, value in vars(part).items():
            constant = isinstance(value, int | float | str | tuple | types.NoneType) and not hasattr(base, name)
            if name not in _NO_BEHAVIOUR | _PYTHONS and not constant:
                found.append(name)
    return list(dict.fromkeys(found))
