"""Shared by all tests: fixed seeds, and random patterns and weights of odd sizes."""

import os
import tempfile

import pytest
import torch

import uasparse_kernels as ua

# What was tuned on this machine is not for the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
# Convolutions of float32 are in TF32 on a GPU unless told otherwise; the tests compare with float64.
torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """The networks are so small that threads only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_pattern():
    def make(shape, density=0.3, block=(1, 1), device="cpu"):
        return ua.SparsityPattern.random(shape, density, block=block, device=device)

    return make


# Files of tests that start processes, compile or train for long: two thirds of the time of all.
SLOW = {
    "benchmarks", "compile", "cpu_isa", "cuda_emulation", "distributed", "examples", "fsdp", "gpu_benchmarks",
    "inference_engines", "keep_freed_memory", "lightning", "serve_checks", "training_cli", "training_export",
    "training_fit", "training_names", "training_processes", "training_runs", "training_structures", "training_suites",
    "transformers", "triton_interpreter",
}  # fmt: skip


def is_slow(path):
    return path.stem.removeprefix("test_") in SLOW


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the files of slow tests")


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("--quick") and is_slow(collection_path) else None


def pytest_collection_modifyitems(items):
    """Workers (the first two of them) begin with slow tests and end with quick ones, so that none waits long for
    another. Tests of a CUDA device need one."""
    files = list(dict.fromkeys(item.path for item in items))
    slow = [file for file in files if is_slow(file)]
    quick = [file for file in files if not is_slow(file)]
    places = {file: i for i, file in enumerate([*slow[::2], *quick[::2], *slow[1::2], *quick[1::2]])}
    items.sort(key=lambda item: places[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
