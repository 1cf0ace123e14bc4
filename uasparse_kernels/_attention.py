"""Opens ``nn.MultiheadAttention`` for sparsify: its projections become layers, by names that its arguments may use."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from uasparse_kernels._coverage import DENSE_BECAUSE
from uasparse_kernels._model import check_model
from uasparse_kernels._readers import read_weights
from uasparse_kernels.nn.attention import (
    SparseMultiheadAttention,
    dense_state,
    join_projections_,
    projections_state,
    split_projections_,
)
from uasparse_kernels.nn.layers import SparseLayer

logger = logging.getLogger("uasparse_kernels")

_PARTS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
Function = TypeVar("Function", bound=Callable[..., Any])


def with_open_attention(function: Function) -> Function:
    """For a function of a model that makes layers sparse, or raises an error and leaves the model as it is.

    Every ``nn.MultiheadAttention`` that can be is open meanwhile, and stays so where a projection became sparse; the
    others are what they were, to the parameter. In ``scores`` weights go by the dense module's names.
    """

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_model(model)
        if any(is_lazy(parameter) for parameter in model.parameters()):
            raise ValueError("The model has parameters without sizes (lazy layers); run it once first.")
        reasons = why_closed(model)
        opened = _open(model, [name for name, reason in reasons.items() if not reason])
        try:
            result = function(model, *args, **_renamed(model, kwargs))
        except BaseException:
            for attention in opened:
                attention.close()
            raise
        for attention in opened:
            if not any(isinstance(layer, SparseLayer) for layer in attention.module.projections().values()):
                attention.close()
        for name, reason in reasons.items():
            if reason:
                logger.warning("%s cannot be made sparse: %s", name or "the attention", reason)
                module: Any = model.get_submodule(name)
                DENSE_BECAUSE[module] = DENSE_BECAUSE[module.out_proj] = reason
        return result

    return wrapped  # type: ignore[return-value]


class _Opened:
    """An open attention, and what it was before."""

    def __init__(self, module: Any, separate: bool):
        self.module = module
        self._before = dict(module._parameters), dict(module._modules), type(module.out_proj)
        split_projections_(module, separate)

    def close(self) -> None:
        for layer in self.module.projections().values():
            if layer in DENSE_BECAUSE and layer is not self.module.out_proj:
                DENSE_BECAUSE[self.module] = DENSE_BECAUSE[layer]
        self.module._parameters, self.module._modules, kind = self._before
        self.module.out_proj.__class__ = kind
        self.module.__class__ = nn.MultiheadAttention


def _open(model: nn.Module, names: list[str]) -> list[_Opened]:
    cross = {id(m.multihead_attn) for m in model.modules() if isinstance(m, nn.TransformerDecoderLayer)}
    modules = [model.get_submodule(name) for name in names]
    return [_Opened(module, id(module) in cross) for module in modules]


def why_closed(model: nn.Module) -> dict[str, str]:
    """Every dense attention of a model by name, with the reason why its projections must stay dense, or ""."""
    attentions = {name: m for name, m in model.named_modules() if type(m) is nn.MultiheadAttention}
    if not attentions:
        return {}
    readers = read_weights(model, apart_from=nn.MultiheadAttention)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for name, module in attentions.items():
        prefix = f"{name}." if name else ""
        found[name] = ""
        if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
            found[name] = f"its out_proj is a {type(module.out_proj).__name__}"
            continue
        weights = [module.out_proj.weight, *(getattr(module, f"{part}_weight") for part in _PARTS[:-1])]
        counts = [users[id(weight)] for weight in weights if weight is not None]
        if read := [readers[prefix + part] for part in _PARTS if prefix + part in readers]:
            found[name] = f"the forward of {read[0]} reads its weights, instead of calling it"
        elif 0 in counts:
            found[name] = "a weight of it is no parameter (is it parametrised?)"
        elif max(counts) > 1:
            found[name] = "a weight of it is shared"
    return found


def _renamed(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of sparsify with the scores of an attention by the names of its layers."""
    if options.get("scores") is None:
        return options
    scores = dict(options["scores"])
    for name, module in model.named_modules():
        if not isinstance(module, SparseMultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        scores |= projections_state(module, scores, prefix)
    return options | {"scores": scores}


def join_attention(model: nn.Module) -> None:
    """Turns attentions whose projections are all dense ``nn.Linear`` into ``nn.MultiheadAttention`` again, in place."""
    for module in model.modules():
        is_ours = type(module) is SparseMultiheadAttention
        if is_ours and all(type(layer) is nn.Linear for layer in module.projections().values()):
            join_projections_(module)


def as_dense_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state, whose weights are dense, as its dense form would name it."""
    return _named(model, state, dense_state)


def as_own_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    return _named(model, state, projections_state)


def _named(model: nn.Module, state: dict[str, Tensor], names: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    state = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseMultiheadAttention):
            state |= names(module, state, f"{name}." if name else "")
    return state
