"""The ops. Each has a module of its name: public function, choice of kernel, reference, shape function, derivative."""

from uasparse_kernels.ops import _flops as _flops
from uasparse_kernels.ops.batch_norm import batch_norm, batch_norm_reference, batch_norm_relu
from uasparse_kernels.ops.masked_conv2d import masked_conv2d, masked_conv2d_reference
from uasparse_kernels.ops.masked_linear import masked_linear, masked_linear_reference
from uasparse_kernels.ops.max_pool2d import max_pool2d
from uasparse_kernels.ops.prune_grow import PruneGrowResult, prune_grow, prune_grow_reference
from uasparse_kernels.ops.topk_indices import topk_indices, topk_indices_many, topk_indices_reference
from uasparse_kernels.ops.unknown_aware_loss import unknown_aware_loss, unknown_aware_loss_reference

__all__ = [
    "PruneGrowResult",
    "batch_norm",
    "batch_norm_reference",
    "batch_norm_relu",
    "masked_conv2d",
    "masked_conv2d_reference",
    "masked_linear",
    "masked_linear_reference",
    "max_pool2d",
    "prune_grow",
    "prune_grow_reference",
    "topk_indices",
    "topk_indices_many",
    "topk_indices_reference",
    "unknown_aware_loss",
    "unknown_aware_loss_reference",
]
