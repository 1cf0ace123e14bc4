"""Shared by the tests of the Triton kernels: where they run (interpreter or GPU), poisoned memory, error bounds.

Each test runs on ``device`` "cpu" under Triton's interpreter, if TRITON_INTERPRET=1 was set before Triton was imported
(test_triton_interpreter.py starts such a process), and on "cuda" where there is a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not INTERPRETED, reason="test_triton_interpreter.py runs it in a process of its own"),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]
# Unit round-off of a result, and of what a product's operands are rounded to.
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PRODUCT = {"ieee": 0.0, "tf32": 2**-9, "tf32x3": 2**-19}


def repair_interpreter() -> None:
    """Makes bfloat16 what it is on a GPU.

    Triton 3.8's interpreter keeps bfloat16 as uint16, multiplies these as integers in tl.dot, and cuts float32 off
    where the hardware rounds to nearest.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return widened(source)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(rounded, tl.bfloat16)
        return plain_cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_impl)


if INTERPRETED:
    repair_interpreter()


@pytest.fixture
def poison():
    """torch.empty gives NaN (and the largest integers), so that what no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def assert_close(name, got, want, size, terms, precision="ieee"):
    """``got`` is within the round-off of its dtype of ``want`` (float64), a sum of ``terms`` products.

    ``size`` is the sum of the magnitudes of these products.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    # float32 accumulation, whatever the operands; one rounding of the result.
    tolerance = 2 * (terms + 2) * ROUNDOFF[torch.float32] + ROUNDOFF[got.dtype]
    if got.dtype == torch.float32:
        tolerance += PRODUCT[precision]
    # Results under float16's normal numbers are rounded absolutely.
    floor = 2**-24 if got.dtype == torch.float16 else 1e-30
    error = (got.double() - want).abs()
    bad = ~(error <= tolerance * size + floor)
    if bad.any():
        worst = float(error.nan_to_num(nan=torch.inf).max())
        raise AssertionError(f"{name}: {int(bad.sum())} of {bad.numel()} are off, by up to {worst:.3g}")
