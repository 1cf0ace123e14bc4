"""Every GPU kernel compiles ahead of time for sm_80 and sm_90 without spills and within what the hardware has.

One tile a kernel and dtype is compiled here; the table of all of them is kept by
``python -m benchmarks.triton_resources`` and must cover what the package has today.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

import triton

from benchmarks import triton_resources as resources
from uasparse_kernels import _library

CASES = {f"{case.kernel} {case.label}": case for case in resources.cases(quick=True)}
KERNELS = {case.kernel: case for case in CASES.values()}


def test_table_covers_every_tile():
    wanted = {resources.key(case, arch) for case in resources.cases() for arch in resources.ARCHITECTURES}
    known = resources.read_table()
    assert wanted == set(known), "run python -m benchmarks.triton_resources"
    assert all(resources.fits(row) for row in known.values())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_fits(name, arch):
    case = CASES[name]
    found = resources.measure(case, arch)
    assert resources.fits(found)
    if triton.__version__ == resources.table_version():
        assert found == resources.read_table()[found["key"]]
    if "BLOCK" in case.constants and case.constants["PRECISION"] == "ieee" and "bf16" in case.label:
        # bfloat16 is on the tensor cores, Hopper's own where the arch has them; and fed by 16-byte copies.
        assert found["wgmma" if arch == 90 else "mma"] > 0
        assert found["async_16_byte_copies"] > 0 or "strided" in name


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_of_one(name):
    """Triton makes integers that are 1 constants of the kernel, which changes their types."""
    case = KERNELS[name]
    resources.compile_case(case, 90, ones=case.integers)
    resources.compile_case(case, 90, ones=case.integers[:1])


@pytest.mark.skipif(not getattr(_library.compiled, "cuda_archs", ""), reason="needs the CUDA parts")
def test_cuda_kernels_do_not_spill():
    """Those of csrc/cuda, as they were built; an assertion in a kernel needs a stack for its message."""
    found = resources.cuda_kernels(_library.compiled.__file__)
    products = [name for name in found if "product_kernel" in name or "sampled_kernel" in name]
    # Three types by three tiles, and the kernels for few tokens, for each architecture.
    assert len(products) == 2 * (9 + 3)
    assert all(found[name] == 0 for name in products)
