"""Hugging Face's ``Conv1D`` (GPT-2's linear layer, whose weight is transposed) with a sparse weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uasparse_kernels.nn.layers import from_dense
from uasparse_kernels.nn.linear import SparseLinear
from uasparse_kernels.nn.registry import add_kind
from uasparse_kernels.pattern import SparsityPattern


class SparseTransposedLinear(SparseLinear):
    """A :class:`SparseLinear` in the place of a ``transformers.pytorch_utils.Conv1D``.

    The pattern, and a dense-stored ``weight``, are ``[out, in]``. Checkpoints, scores and :meth:`dense_weight` have the
    shape of ``Conv1D``'s weight, ``[in, out]``.
    """

    dense_class: Any = None  # set by from_dense: the class is not imported here

    @classmethod
    def from_dense(
        cls,
        module: Any,
        *,
        sparsity: float | None = None,
        pattern: SparsityPattern | None = None,
        block: Sequence[int] = (1, 1),
        storage: str = "auto",
    ) -> SparseTransposedLinear:
        """A sparse layer with the active weights and the bias of a dense one, as :meth:`SparseLinear.from_dense`."""
        build = partial(cls, *module.weight.shape)
        layer = from_dense(module, build, sparsity=sparsity, pattern=pattern, block=block, storage=storage)
        layer.dense_class = type(module)
        return layer

    @staticmethod
    def pattern_view(weight: Tensor) -> Tensor:
        return weight.t()

    @staticmethod
    def dense_view(weight: Tensor) -> Tensor:
        return weight.t()

    def _empty_dense(self, options: dict[str, Any]) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):  # draws nothing
            module = Conv1D(self.out_features, self.in_features)
        return module.to(options["dtype"]).to_empty(device=options["device"])


def _to_dense(layer: SparseTransposedLinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return layer.to_dense(Conv1D)


add_kind("transformers.pytorch_utils.Conv1D", SparseTransposedLinear, _to_dense)
