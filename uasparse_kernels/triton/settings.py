"""Settings of the Triton kernels, read at every call."""

from __future__ import annotations

import torch

# How float32 products are computed: "ieee" (exact products, no tensor cores), "tf32" (10-bit mantissas), "tf32x3"
# (three tf32 products, near float32 in accuracy), or None: as torch.backends.cuda.matmul.fp32_precision and
# torch.backends.cudnn.conv.fp32_precision say, which know the first two.
float32_precision: str | None = None


def resolve_float32_precision(op: str) -> str:
    """ "ieee", "tf32" or "tf32x3" for an op "masked_linear" or "masked_conv2d"."""
    if float32_precision is not None:
        return float32_precision
    backend = torch.backends.cuda.matmul if op == "masked_linear" else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"
