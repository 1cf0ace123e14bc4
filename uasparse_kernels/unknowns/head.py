"""Where a network's classes are told apart: its last linear layer."""

from __future__ import annotations

from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.unknowns.errors import UnknownsError


def head_of(model: nn.Module) -> nn.Module:
    """Returns the last linear layer (dense or sparse); its input are the penultimate features. Raises UnknownsError."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear | ua.SparseLinear)]
    if not heads:
        raise UnknownsError(f"{type(model).__name__} has no linear layer, so no penultimate features to score.")
    return heads[-1]
