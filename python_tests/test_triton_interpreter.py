"""Runs the tests of the Triton kernels under Triton's interpreter, in a process that leaves this one as it is."""

import os
import pathlib
import subprocess
import sys

import numpy
import pytest

from uasparse_kernels import _library

triton = pytest.importorskip("triton")
HERE = pathlib.Path(__file__).parent
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.skipif(
    VERSION < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4),
    reason="the interpreter of Triton before 3.7 fails with numpy 2.4 and later",
)
@pytest.mark.parametrize("names", ["masked_conv2d", "masked_linear pattern dispatch"])  # two processes for two cores
def test_kernels(names):
    if _library.compiled is None:
        pytest.skip("needs the compiled ops")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += [f"{HERE}/test_triton_{name}.py" for name in names.split()]
    run = subprocess.run(
        command, cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
