"""Settings of the Triton kernels, read at every call."""

from __future__ import annotations

# How float32 products are computed: "ieee" (exact products, no tensor cores), "tf32" (10-bit mantissas), "tf32x3"
# (three tf32 products, near float32 in accuracy), or None: as torch.backends.cuda.matmul.fp32_precision and
# torch.backends.cudnn.conv.fp32_precision say, which know the first two.
float32_precision: str | None = None
