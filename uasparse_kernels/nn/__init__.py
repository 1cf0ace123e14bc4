"""Sparse layers, the unknown-aware loss, and faster batch norms, ReLUs and pooling."""

from uasparse_kernels.nn.attention import SparseMultiheadAttention
from uasparse_kernels.nn.conv1d import SparseConv1d
from uasparse_kernels.nn.conv2d import SparseConv2d
from uasparse_kernels.nn.delta import SparseDelta
from uasparse_kernels.nn.layers import SparseLayer
from uasparse_kernels.nn.linear import SparseLinear
from uasparse_kernels.nn.loss import UnknownAwareLoss
from uasparse_kernels.nn.norm import BatchNorm2d, BatchNormReLU2d, ReLU, ReLU6
from uasparse_kernels.nn.pool import MaxPool2d
from uasparse_kernels.nn.registry import register_layer
from uasparse_kernels.nn.transposed import SparseTransposedLinear

__all__ = [
    "BatchNorm2d",
    "BatchNormReLU2d",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "SparseConv1d",
    "SparseConv2d",
    "SparseDelta",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseTransposedLinear",
    "UnknownAwareLoss",
    "register_layer",
]
