"""Sparse layers and the unknown-aware loss."""

from uasparse_kernels.nn.layers import SparseConv2d, SparseLayer, SparseLinear
from uasparse_kernels.nn.loss import UnknownAwareLoss

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear", "UnknownAwareLoss"]
