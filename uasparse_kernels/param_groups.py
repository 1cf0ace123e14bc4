"""Parameter groups for weight decay that know packed weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from uasparse_kernels._model import check_model
from uasparse_kernels.nn.layers import SparseLayer


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Makes two parameter groups for any torch optimiser: with weight decay and without.

    The rule is that of timm and nanoGPT: matrices decay (linear and convolution layers, packed ones included, and
    embeddings), parameters of one dimension (norms) and all biases do not. As in timm, parameters named by a module's
    ``no_weight_decay()``, or with an attribute ``_no_weight_decay``, do not decay either. Frozen parameters are left
    out::

        optimizer = torch.optim.AdamW(ua.param_groups(model, weight_decay=0.05), lr=1e-3)

    A rule that counts dimensions takes packed 1x1 weights, ``[nnz]``, for norms, and does not decay them. They have one
    dimension all the same: optimisers that treat matrices specially (Muon, Shampoo, Adafactor) would take ``[nnz, 1]``
    for a matrix, but refuse one dimension, or treat it entry by entry, which is correct.

    Args:
        model: a parameter that is shared counts once; ``no_decay`` may have any name of it.
        weight_decay: of the first group; the second has 0.
        no_decay: names of further parameters that do not decay.

    Returns:
        ``[{"params": ..., "weight_decay": weight_decay}, {"params": ..., "weight_decay": 0.0}]``

    Raises:
        ValueError: for a negative weight_decay, or a name that is no parameter's.
    """
    check_model(model)
    if weight_decay < 0:
        raise ValueError(f"Expected weight_decay >= 0, got {weight_decay}.")
    unknown = sorted(set(no_decay) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if unknown:
        raise ValueError(f"No parameter of the model is named {', '.join(map(repr, unknown))}.")
    excluded, packed = set(no_decay), set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            excluded |= {".".join(filter(None, (prefix, name))) for name in listed()}
        if isinstance(module, SparseLayer):
            packed.add(id(module.weight))
    of_all_names = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in excluded}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = (parameter.dim() > 1 or id(parameter) in packed) and name.rpartition(".")[2] != "bias"
        decays = is_matrix and id(parameter) not in of_all_names and not getattr(parameter, "_no_weight_decay", False)
        groups[0 if decays else 1].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
