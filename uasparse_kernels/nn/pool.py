"""Max pooling that is served by our kernel where that is faster than torch's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy

from uasparse_kernels.nn.layers import as_leaf
from uasparse_kernels.ops.max_pool2d import max_pool2d


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d``, faster on a CPU for contiguous float32 maps (``ops.max_pool2d``)."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.return_indices:
            return super().forward(input)
        return max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
