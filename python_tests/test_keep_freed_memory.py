"""`keep_freed_memory`: pages are asked for once. In processes of its own, for it cannot be undone."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch, uasparse_kernels as ua
{call}
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**18) for mib in (28, 28, 100)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(*[faults() for _ in range(6)])
"""


def rounds(call: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", COUNT.format(call=call)], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_asked_for_once():
    # The C library alone gives all back once, then keeps more or less of it. With the call a small block may stand in
    # the way of a large one for a round or two; after that all have their places.
    assert rounds("")[1] > 20_000
    assert max(rounds("assert ua.keep_freed_memory()")[3:]) < 100
