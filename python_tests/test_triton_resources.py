"""Every Triton kernel compiles ahead of time for sm_80 and sm_90 without spills and within the shared memory.

One tile a kernel and dtype; ``python -m benchmarks.triton_resources`` takes all of them.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

from benchmarks import triton_resources as resources

CASES = {f"{case.kernel} {case.label}": case for case in resources.cases(quick=True)}
KERNELS = {case.kernel: case for case in CASES.values()}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_fits(name, arch):
    case = CASES[name]
    found = resources.resources(resources.compile_case(case, arch))
    assert found["spill_bytes"] == 0
    assert found["shared_bytes"] <= resources.SHARED_LIMIT_BYTES[arch]
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
