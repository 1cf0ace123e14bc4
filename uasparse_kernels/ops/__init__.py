"""The ops. Each has a module of its name: public function, choice of kernel, reference, shape function, derivative."""

from uasparse_kernels.ops.masked_conv2d import masked_conv2d, masked_conv2d_reference
from uasparse_kernels.ops.masked_linear import masked_linear, masked_linear_reference

__all__ = [
    "masked_conv2d",
    "masked_conv2d_reference",
    "masked_linear",
    "masked_linear_reference",
]
