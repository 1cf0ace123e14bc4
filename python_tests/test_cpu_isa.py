"""The CPU kernels as they are on processors with less than this one."""

import os
import pathlib
import subprocess
import sys

import pytest

from uasparse_kernels import _library

HERE = pathlib.Path(__file__).parent


# Tests of selection and the loss that run another kernel on another instruction set.
SELECTION = "topk_of_any or above_any or growth_of_any or misleads or extreme or (float64_reference and mean)"
ARITHMETIC = "(masked or batch_norm) and not instruction and not opcheck and not compile"


@pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """The tests of ops where the kernels are told to use less than this CPU has (they choose once per process)."""
    command = [sys.executable, "-m", "pytest", "-m", "not cuda", "-k", f"({ARITHMETIC}) or {SELECTION}"]
    command += ["-p", "no:cacheprovider"]
    ops = ("masked_linear", "masked_conv2d", "batch_norm", "prune_grow", "unknown_aware_loss")
    command += [str(HERE / f"test_{op}.py") for op in ops]
    done = subprocess.run(command, env={**os.environ, "UASPARSE_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")
def test_an_unknown_instruction_set_is_an_error():
    command = [sys.executable, "-c", "import uasparse_kernels"]
    done = subprocess.run(command, env={**os.environ, "UASPARSE_CPU_ISA": "sse2"}, capture_output=True, text=True)
    assert done.returncode == 1 and "expected portable, avx2 or avx512, got 'sse2'" in done.stderr
