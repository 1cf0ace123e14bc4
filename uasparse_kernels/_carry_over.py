"""What users put on a layer goes to the layer that takes its place."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from uasparse_kernels.nn.layers import SparseLayer

logger = logging.getLogger("uasparse_kernels")

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def carry_over(old: Any, new: Any) -> None:
    """Hooks (their handles still remove them), and attributes, of the module and of its parameters.

    A hook on the weight's gradient sees it in the storage that it was made for: a dense layer's hook a dense gradient.
    A hook that runs after a gradient was accumulated belongs to an optimiser of the old parameter; it is left, and that
    is logged. What DynamicSparsity put on a sparse layer stays behind where that becomes dense.
    """
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    if not isinstance(new, SparseLayer):
        for key in [key for key, hook in new._forward_hooks.items() if _is_for_sparse_layers(hook)]:
            del new._forward_hooks[key]
            new._forward_hooks_with_kwargs.pop(key, None)
    own = {"_own", "_clean", "_channels_last", "_pad", "dense_class"}
    own = own.union(*map(_attributes, (nn.Conv2d, nn.Conv1d, nn.Linear)))
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in own | new.__dict__.keys()})
    for name in ("weight", "bias"):
        before, after = getattr(old, name), getattr(new, name)
        if before is None:
            continue
        after.__dict__.update(before.__dict__)
        accumulated = (before._post_accumulate_grad_hooks or {}).values()
        if not all(map(_is_for_sparse_layers, accumulated)):
            logger.warning("A hook after the accumulation of a gradient is not carried over to a new %s.", name)
        for hook in (before._backward_hooks or {}).values():
            maker = old
            if isinstance(hook, partial) and hook.func is _call_hook:  # carried over before
                hook, maker = hook.args[:2]
            after.register_hook(partial(_call_hook, hook, maker, new) if name == "weight" else hook)


def _is_for_sparse_layers(hook: Any) -> bool:
    return getattr(hook, "only_for_sparse_layers", False)


@cache
def _attributes(kind: type[nn.Module]) -> set[str]:
    """What a fresh dense layer has by itself."""
    return set(kind(1, 1, **({} if kind is nn.Linear else {"kernel_size": 1}), device="meta").__dict__)


def _call_hook(hook, old: nn.Module, new: nn.Module, grad: Tensor) -> Tensor | None:
    """A hook of the old layer's weight with the gradient of the new one's."""
    result = hook(_store(old, _dense(new, grad)))
    return None if result is None else _store(new, _dense(old, result))


def _dense(layer: nn.Module, grad: Tensor) -> Tensor:
    if not isinstance(layer, SparseLayer):
        return grad
    return layer.dense_view(layer.pattern.unpack(grad) if layer.pattern.is_packed(grad) else grad)


def _store(layer: nn.Module, dense: Tensor) -> Tensor:
    if not isinstance(layer, SparseLayer):
        return dense
    view = layer.pattern_view(dense)
    return layer.pattern.pack(view) if layer.storage == "packed" else view
