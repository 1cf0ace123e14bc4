"""Sparse layers, the unknown-aware loss, and faster batch norms and pooling."""

from uasparse_kernels.nn.attention import SparseMultiheadAttention
from uasparse_kernels.nn.delta import SparseDelta
from uasparse_kernels.nn.layers import SparseConv2d, SparseLayer, SparseLinear
from uasparse_kernels.nn.loss import UnknownAwareLoss
from uasparse_kernels.nn.norm import BatchNorm2d, BatchNormReLU2d
from uasparse_kernels.nn.pool import MaxPool2d

__all__ = [
    "BatchNorm2d",
    "BatchNormReLU2d",
    "MaxPool2d",
    "SparseConv2d",
    "SparseDelta",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "UnknownAwareLoss",
]
