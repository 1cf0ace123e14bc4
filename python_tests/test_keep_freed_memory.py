"""`keep_freed_memory`: pages are asked for once. In processes of its own, for it cannot be undone."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch, uasparse_kernels as ua
{call}
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(7 * 2**20) for _ in range(3)]  # 28 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(min([faults() for _ in range(6)][2:]))  # a small block may once stand in the way of a large one
"""


def count(call: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT.format(call=call)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_are_asked_for_once():
    assert count("") > 1000
    assert count("assert ua.keep_freed_memory()") < 100
