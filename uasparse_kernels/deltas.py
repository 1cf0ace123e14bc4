"""Sparse fine-tuning of a whole model: every layer gets a sparse delta, everything else is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from uasparse_kernels._coverage import check_names
from uasparse_kernels._grid import check_block
from uasparse_kernels._keep import Keep, check_not_wrapped
from uasparse_kernels._model import Model, check_model
from uasparse_kernels.convert import _candidates, logger
from uasparse_kernels.nn.delta import SparseDelta, put_in_place
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.registry import kind_of


def add_sparse_deltas(
    model: Model,
    density: float,
    *,
    block: Sequence[int] = (1, 1),
    scores: Mapping[str, Tensor] | None = None,
    exempt: Iterable[str] = (),
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Gives every ``nn.Linear`` and ``nn.Conv2d`` of a pretrained model a :class:`SparseDelta`, in place, and freezes
    all else.

    To train anything else (a new head, norms), call ``requires_grad_(True)`` on it afterwards. Give the optimiser the
    parameters that require gradients. A layer that ``sparsify`` would leave dense (its weight is shared or read by
    another module, or its class is another) gets no delta, and that is logged.

    Args:
        density: share of trained weights of each layer, in (0, 1].
        block: of the patterns; a layer whose sizes the block does not divide gets no delta.
        scores: a tensor for each weight, keyed by its name in ``model.named_parameters()`` and of its shape. Each layer
            trains where its scores are largest, such as gradients (RoSA, arXiv 2401.04679). Without, patterns are
            random.
        exempt: fully qualified names of layers that get no delta, or of modules whose layers do not.
        filter: called with name and layer; a layer for which it returns False gets no delta.

    Returns:
        The model (a lone layer's delta).

    Raises:
        ValueError: for unknown names, scores that are missing or do not fit, sparse layers, and if no layer is left.
            The model is then unchanged.
    """
    check_model(model)
    check_block(block)
    if not 0 < density <= 1:
        raise ValueError(f"Expected a density in (0, 1], got {density}.")
    for name, module in model.named_modules():
        if isinstance(module, SparseDelta | SparseLayer):
            raise ValueError(f"{name or 'The model'} is a {type(module).__name__} already; merge or densify it first.")
    check_not_wrapped(model)
    exempt = check_names(model, exempt)
    chooser = Keep(model, "random", scores)
    candidates, skipped = _candidates(model)
    chosen = {}
    for name, module in candidates.items():
        kind = kind_of(type(module))
        if kind is None or kind.cls not in (nn.Linear, nn.Conv2d):
            skipped[name] = f"sparse deltas serve nn.Linear and nn.Conv2d, not {type(module).__name__}"
            continue
        rows = module.weight.shape[0] // getattr(module, "groups", 1)
        if name in exempt or (filter is not None and not filter(name, module)):
            continue
        if rows % block[0] or module.weight.shape[1] % block[1]:
            skipped[name] = f"its weight {tuple(module.weight.shape)} is not made of {block[0]}x{block[1]} blocks"
        else:
            chosen[name] = module
    if not chosen:
        raise ValueError("Expected an nn.Linear or nn.Conv2d that can take a delta, got none.")
    patterns = {name: chooser.pattern(name, module, density, block, None) for name, module in chosen.items()}
    for name, reason in skipped.items():
        logger.warning("%s gets no sparse delta: %s", name or "the layer", reason)
    model.requires_grad_(False)
    deltas = {id(m): SparseDelta(m, pattern=patterns[name]) for name, m in chosen.items()}
    return put_in_place(model, deltas)
