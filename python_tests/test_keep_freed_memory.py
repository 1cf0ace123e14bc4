"""`keep_freed_memory`: pages are asked for once. In processes of its own, for it cannot be undone."""

import pathlib
import subprocess
import sys

import pytest

from uasparse_kernels import _library

COUNT = """
import resource, torch, uasparse_kernels as ua
{call}
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**18) for mib in (28, 28, 100)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(*[faults() for _ in range(6)])
"""

CONVOLUTIONS = """
import resource, torch, uasparse_kernels as ua
layer, x = ua.SparseConv2d(4, 64, 1, sparsity=0.5), torch.randn(10, 4, 128, 128)
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode():
        layer(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(*[faults() for _ in range(3)])
"""
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def rounds(call: str) -> list[int]:
    return _numbers(COUNT.format(call=call))


def _numbers(script: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_asked_for_once():
    # The C library alone gives all back once, then keeps more or less of it. With the call a small block may stand in
    # the way of a large one for a round or two; after that all have their places.
    assert rounds("")[1] > 20_000
    assert max(rounds("assert ua.keep_freed_memory()")[3:]) < 100


@pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the system gives no huge pages"
)
def test_a_large_output_of_a_convolution_is_on_huge_pages():
    assert min(_numbers(CONVOLUTIONS)) < 5_000  # 40 MiB are 10,240 small pages
