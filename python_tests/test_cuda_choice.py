"""The choice of a kernel on CUDA devices, which needs none."""

import importlib
import json
import pathlib

import pytest
import torch

from uasparse_kernels import SparsityPattern, _crossovers, _library
from uasparse_kernels.ops import _cuda
from uasparse_kernels.triton import available, settings

linear = importlib.import_module("uasparse_kernels.ops.masked_linear")
conv2d = importlib.import_module("uasparse_kernels.ops.masked_conv2d")
pytestmark = pytest.mark.skipif(
    not available() or not torch._C._dispatch_has_kernel_for_dispatch_key("uasparse::masked_linear", "CUDA"),
    reason="needs the compiled ops, a CUDA build of torch, and Triton",
)


def _choose(density, block, dtype=torch.bfloat16, *, packed=True, tokens=8192):
    pattern = SparsityPattern.random((1024, 1024), density, block=block)
    return linear.choose((tokens, 1024), dtype, "cuda", pattern, packed=packed)


def test_blocks_up_to_the_crossover():
    assert _choose(0.1, (64, 64)).kernel == "triton"
    assert _choose(0.9, (64, 64)).kernel == "dense"
    assert "predicted" in _choose(0.1, (64, 64)).reason
    assert _choose(0.1, (16, 16)).kernel == "dense" and _choose(0.02, (16, 16)).kernel == "triton"


def test_unstructured():
    """In float32 up to more density than on tensor cores; convolutions by 1x1 only."""
    if not _library.has_kernel_for("sparse_product_out", "cuda"):
        assert "not built" in _choose(0.001, (1, 1)).reason
        return
    assert _choose(0.0005, (1, 1)).kernel == "dense" and "over the crossover" in _choose(0.0005, (1, 1)).reason
    assert _choose(0.05, (1, 1), torch.float32).kernel == "cuda"
    assert _choose(0.3, (1, 1), torch.float32).kernel == "dense"
    assert _choose(0.05, (1, 1), torch.float64).kernel == "dense"
    for kernel, more, expected in ((1, {}, "cuda"), (1, {"padding": (1, 1)}, "dense"), (3, {}, "dense")):
        pattern = SparsityPattern.random((64, 64, kernel, kernel), 0.0005)
        choice = conv2d.choose((64, 64, 14, 14), torch.float32, "cuda", pattern, packed=True, **more)
        assert choice.kernel == expected and ("serves only 1x1" in choice.reason) == (expected == "dense")


def test_storage_by_default(monkeypatch, request):
    request.addfinalizer(_cuda._crossover.cache_clear)
    assert not _cuda.is_packed_by_default("masked_linear", SparsityPattern.random((64, 64), 0.0005))
    _cuda._crossover.cache_clear()
    for op in ("masked_linear", "masked_conv2d"):
        monkeypatch.setitem(_cuda.PREDICTED[op]["half"], "1", 0.001)
    for shape, block, density, packed in (
        ((64, 64), (1, 1), 0.1, False),
        ((64, 64), (1, 1), 0.0005, True),
        ((64, 64, 1, 1), (1, 1), 0.0005, True),
        ((64, 64, 3, 3), (1, 1), 0.0005, False),
        ((64, 64), (16, 16), 0.5, True),
    ):
        pattern = SparsityPattern.random(shape, density, block=block)
        op = "masked_linear" if len(shape) == 2 else "masked_conv2d"
        assert _cuda.is_packed_by_default(op, pattern) == packed


def test_what_blocks_do_not_serve():
    assert _choose(0.01, (16, 1)).kernel == "dense" and _choose(0.01, (8, 8)).kernel == "dense"
    assert _choose(0.1, (64, 64), torch.float64).kernel == "dense"


def test_small_dense_stored_problems_go_to_the_vendor():
    assert _choose(0.1, (64, 64), packed=False, tokens=8192).kernel == "triton"
    assert _choose(0.1, (64, 64), packed=False, tokens=64).kernel == "dense"
    assert _choose(0.1, (64, 64), packed=True, tokens=64).kernel == "triton"


def test_float32_follows_its_precision(monkeypatch):
    monkeypatch.setattr(settings, "float32_precision", "tf32")
    assert _cuda.arithmetic("masked_linear", torch.float32) == "tf32"
    monkeypatch.setattr(settings, "float32_precision", "ieee")
    assert _cuda.arithmetic("masked_linear", torch.float32) == "fp32"
    monkeypatch.setattr(settings, "float32_precision", None)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, expected in (("tf32", "tf32"), ("ieee", "fp32")):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert _cuda.arithmetic("masked_linear", torch.float32) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_measured_crossovers_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _cuda._crossover.cache_clear()
    monkeypatch.setitem(_cuda.MEASURED, "Some GPU", {"masked_linear": {"half": {"64": 0.5}}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    try:
        choice = _choose(0.4, (64, 64))
        assert choice.kernel == "triton" and "measured on Some GPU" in choice.reason
        assert _choose(0.4, (32, 32)).kernel == "dense"
        _crossovers.save("Some GPU", {"masked_linear": {"half": {"64": 0.3}}})
        choice = _choose(0.4, (64, 64))
        assert choice.kernel == "dense" and "measured on this machine" in choice.reason
    finally:
        _cuda._crossover.cache_clear()


def test_the_table_of_a_device_is_what_was_measured():
    results = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
    files = list(results.glob("*/gpu-crossovers.json"))
    found = {name: table for file in files for name, table in json.loads(file.read_text()).items()}

    def rounded(table):
        return {
            key: rounded(value) if isinstance(value, dict) else float(f"{value:.2g}") for key, value in table.items()
        }

    def assert_within(part, whole):
        for key, value in part.items():
            assert_within(value, whole[key]) if isinstance(value, dict) else None
            assert isinstance(value, dict) or value == whole[key]

    assert files and _cuda.MEASURED
    assert_within(_cuda.MEASURED, rounded(found))


def test_convolutions():
    pattern = SparsityPattern.random((256, 256, 3, 3), 0.1, block=(64, 64))

    def choose(**more):
        return conv2d.choose((64, 256, 14, 14), torch.bfloat16, "cuda", pattern, packed=True, **more)

    assert choose(padding=(1, 1)).kernel == "triton"
    assert choose(groups=2) == ("dense", "no sparse kernel for groups")
