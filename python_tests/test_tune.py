"""Where sparse kernels stop paying: the table, its file, and the choice made from it."""

import importlib
import json

import pytest
import torch

import uasparse_kernels as ua
from uasparse_kernels import SparsityPattern, _crossovers, _library
from uasparse_kernels.ops import _common, _cpu, masked_linear
from uasparse_kernels.ops.masked_linear import choose, masked_linear_reference

module = importlib.import_module("uasparse_kernels.tune")
needs_compiled = pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _cpu._crossover.cache_clear()
    yield tmp_path / "uasparse_kernels" / "crossovers.json"
    _cpu._crossover.cache_clear()


def _choose(density, batch=128, dtype=torch.float32, *, packed=True):
    return choose((batch, 512), dtype, "cpu", SparsityPattern.random((256, 512), density), packed=packed)


@needs_compiled
def test_dense_above_the_crossover(cache):
    limit = _cpu.DEFAULT["masked_linear"]["float32"]["1x1"][">16"]
    below, above = _choose(limit - 0.01), _choose(limit + 0.01)
    assert (below.kernel, above.kernel) == ("cpu", "dense")
    assert "default" in below.reason and f"{limit:.3g}" in above.reason


@needs_compiled
def test_a_narrow_batch_has_a_crossover_of_its_own(cache):
    assert _choose(0.9, batch=1).kernel == "cpu" and _choose(0.9, batch=128).kernel == "dense"
    assert _choose(0.1, batch=1, packed=False).kernel == "dense"


@needs_compiled
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("density", [0.8, 1.0])
def test_the_dense_kernel_computes_the_same(storage, density):
    layer = ua.SparseLinear(48, 40, pattern=SparsityPattern.random((40, 48), density), storage=storage)
    x = torch.randn(32, 48, requires_grad=True)
    assert ua.explain(layer, x)[0].kernel == "dense"
    layer(x).square().sum().backward()
    found = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    masked_linear_reference(x, layer.weight, layer.pattern, layer.bias).square().sum().backward()
    torch.testing.assert_close(found, (x.grad, layer.weight.grad))


def test_storage_is_packed_where_that_is_faster(cache):
    assert ua.SparseLinear(64, 64, sparsity=0.9).storage == "packed"
    assert ua.SparseLinear(64, 64, sparsity=0.01).storage == "dense"


@needs_compiled
def test_a_measured_table_is_used_and_kept_with_others(cache):
    table = json.loads(json.dumps(_cpu.DEFAULT))
    table["masked_linear"]["float32"]["1x1"][">16"] = 0.05
    _crossovers.save("another device", {"x": 1})
    assert _crossovers.save(_cpu.processor(), table) == cache
    choice = _choose(0.1)
    assert choice.kernel == "dense" and "measured" in choice.reason
    assert _crossovers.load("another device") == {"x": 1}
    assert [file.name for file in cache.parent.iterdir()] == ["crossovers.json"]


@needs_compiled
@pytest.mark.parametrize("content", ["", "[1]", '{"format": 0}', '{"format": 1}'])
def test_a_bad_file_warns_and_the_defaults_serve(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"crossovers.json is not used .*tune\(\)"):
        assert _choose(0.01).kernel == "cpu"


@needs_compiled
def test_tune_measures_every_cell(cache, monkeypatch):
    """Which density each cell is asked at, and what is made of the answers; the timing itself is not tested."""
    truth, asked = {"1": 0.3, "2-16": 1.0, ">16": 0.55}, set()

    def faster(op, dtype, structure, width, density):
        asked.add((op, dtype, structure, width))
        return density < truth[width] or truth[width] == 1

    monkeypatch.setattr(module, "_sparse_is_faster", faster)
    table = ua.tune(verbose=False)
    cells = [cell for op in table.values() for dtype in op.values() for row in dtype.values() for cell in row.items()]
    assert len(asked) == len(cells)
    assert all(abs(density - truth[width]) <= 2**-5 for width, density in cells)
    assert _crossovers.load(_cpu.processor()) == table
    assert "measured" in _choose(0.1).reason


@needs_compiled
@pytest.mark.parametrize("op", ["masked_linear", "masked_conv2d"])
def test_tune_times_both_kernels(op, monkeypatch):
    heard = []
    monkeypatch.setattr(_common, "listeners", [lambda name, choice: heard.append((name, choice.kernel))])
    for kernel in ("cpu", "dense"):
        module._call(op, torch.float32, "1x1", ">16", 0.1, kernel)()
    assert (op, "cpu") in heard and (op, "dense") in heard


def test_tune_needs_compiled_kernels(monkeypatch):
    monkeypatch.setattr(_library, "compiled", None)
    with pytest.raises(RuntimeError, match="install with a C"):
        ua.tune()


def test_forced_is_undone_by_an_error():
    pattern = SparsityPattern.random((8, 8), 0.5)
    with pytest.raises(ZeroDivisionError), _common.forced("reference"):
        raise ZeroDivisionError
    heard = []
    _common.listeners.append(lambda op, choice: heard.append(choice.reason))
    try:
        masked_linear(torch.randn(2, 8), torch.randn(pattern.nnz), pattern)
    finally:
        _common.listeners.pop()
    assert heard != ["forced"]
