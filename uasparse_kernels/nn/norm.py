"""Batch norm, and a ReLU or ReLU6 after it, that are served by our kernels where they are faster than torch's."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from uasparse_kernels import _library, ops
from uasparse_kernels.nn.layers import as_leaf
from uasparse_kernels.ops._common import transformed

_Arguments = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float]


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, faster in training on a CPU for contiguous float32 maps (``ops.batch_norm``)."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        return ops.batch_norm(input, *self._arguments(input))

    def _arguments(self, input: Tensor) -> _Arguments:
        """Of ``ops.batch_norm`` after the input; a batch in training is counted."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        # As in torch: statistics that are not tracked are only used, where there are some, in evaluation.
        used = not self.training or self.track_running_stats
        return (
            self.weight,
            self.bias,
            self.running_mean if used else None,
            self.running_var if used else None,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )


class BatchNormReLU2d(BatchNorm2d):
    """``relu(batch_norm(input) + residual)`` as one layer (``ops.batch_norm_relu``), with a batch norm's state.

    ``forward(input)`` stands for ``BatchNorm2d`` and ``ReLU``; ``forward(input, residual)`` has the addition of a
    residual block between them.

    Raises:
        TypeError: in ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would take it for a batch norm alone.
    """

    @property
    def num_features(self) -> int:  # type: ignore[override]
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                "A BatchNormReLU2d cannot become a SyncBatchNorm, which has no ReLU: use BatchNorm2d and ReLU as two "
                "layers, then convert them."
            )
        return self.__dict__["num_features"]

    @num_features.setter
    def num_features(self, value: int) -> None:
        self.__dict__["num_features"] = value

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.batch_norm_relu(input, *self._arguments(input), residual)


class ReLU(nn.ReLU):
    """``nn.ReLU``; with ``inplace=True`` its gradient costs no pass over memory of its own where it comes after ours.

    That is after a batch norm (``ops.batch_norm``), or the addition of a residual to one. What anybody could have seen
    between them, with hooks or as a tensor, is there as before: then torch's own backward is taken.
    """

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.inplace and _sees_batch_norm(input):
            return torch.ops.uasparse.relu_.default(input)
        return super().forward(input)


class ReLU6(nn.ReLU6):
    """``nn.ReLU6``, as :class:`ReLU` is; torch's own in-place one copies its input for the backward besides."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.inplace and self.min_val == 0 < self.max_val and _sees_batch_norm(input):
            return torch.ops.uasparse.relu_.default(input, self.max_val)
        return super().forward(input)


def _sees_batch_norm(input: Tensor) -> bool:
    """Whether the op may look for a batch norm behind ``input``."""
    return (
        type(input) is Tensor
        and input.requires_grad
        and not torch.compiler.is_compiling()
        and transformed() is None
        and _library.has_kernel("batch_norm", input)
    )
