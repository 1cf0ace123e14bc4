"""Where sparse kernels stop paying: the table, its file, and the choice made from it."""

import importlib
import json
import math
import threading
import warnings

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
def test_convolutions_of_one_tap_have_a_crossover_of_their_own(cache):
    table = json.loads(json.dumps(_cpu.DEFAULT))
    table["masked_conv2d"]["float32"]["1x1"] = {"one tap, 256": 0.6, "one tap, 1024": 0.3, "taps": 0.4}
    _crossovers.save(_cpu.processor(), table)
    # By the harmonic mean of the channels: 0.6 at 256, 0.3 at 1024, 0.2 + 102.4 / mean between and beyond.
    for channels, outputs, kernel, density, kernel_wanted in (
        (256, 256, 1, 0.59, "cpu"),
        (256, 256, 1, 0.61, "dense"),
        (384, 768, 1, 0.39, "cpu"),  # 512: 0.4
        (384, 768, 1, 0.41, "dense"),
        (96, 192, 1, 0.99, "cpu"),  # 128: 1
        (4096, 4096, 1, 0.23, "dense"),
        (256, 256, 3, 0.39, "cpu"),
        (256, 256, 3, 0.41, "dense"),
    ):
        layer = ua.SparseConv2d(channels, outputs, kernel, sparsity=1 - density)
        chosen = ua.explain(layer, torch.randn(2, channels, 3, 3))[0].kernel
        assert chosen == kernel_wanted and layer.storage == {"cpu": "packed", "dense": "dense"}[chosen]


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
    truth = {"1": 0.3, "2-16": 1.0, ">16": 0.55, "one tap, 256": 1.0, "one tap, 1024": 0.9, "taps": 0.45}
    asked = set()

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
@pytest.mark.parametrize(
    ("op", "width"), [("masked_linear", ">16"), ("masked_conv2d", "one tap, 256"), ("masked_conv2d", "taps")]
)
def test_tune_times_both_kernels(op, width):
    heard = []
    with _common.listening(lambda name, choice: heard.append((name, choice.kernel))):
        for kernel in ("cpu", "dense"):
            module._call(op, torch.float32, "1x1", width, 0.1, kernel)()
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
    with _common.listening(lambda op, choice: heard.append(choice.reason)):
        masked_linear(torch.randn(2, 8), torch.randn(pattern.nnz), pattern)
    assert heard and heard != ["forced"]
    assert _common._asking == 0


# --- a cache that is damaged, or cannot be ---------------------------------------------------------------------------


def damaged(change):
    """A file with the defaults as this processor's table, changed by `change`."""
    table = json.loads(json.dumps(_cpu.DEFAULT))
    change(table)
    return json.dumps({"format": 1, "devices": {_cpu.processor(): table}})


def cell(value):
    return damaged(lambda table: table["masked_linear"]["float32"]["1x1"].update({">16": value}))


@needs_compiled
@pytest.mark.parametrize(
    "content",
    [
        damaged(lambda table: table.pop("masked_conv2d")),
        damaged(lambda table: table["masked_linear"]["float32"].pop("blocks")),
        damaged(lambda table: table["masked_linear"]["float32"]["1x1"].pop("1")),
        damaged(lambda table: table.update(masked_linear=0.5)),
        *map(cell, ("0.5", -0.1, 1.5, math.nan, math.inf, None, True, [0.5], {"1": 0.5}, 10**400)),
        '{"format": 1, "devices": []}',
        json.dumps({"format": 1, "devices": {_cpu.processor(): 0.5}}),
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_table_warns_once_and_the_defaults_serve(cache, content):
    """As a whole: no cell of a damaged table is used."""
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match=r"crossovers.json is not used .*tune\(\)") as caught:
        for op, dtypes in _cpu.DEFAULT.items():
            for structure, widths in dtypes["float32"].items():
                for width, density in widths.items():
                    limit, source = _cpu.crossover(op, torch.float32, structure, width)
                    assert limit == density and "default" in source
    assert len(caught) == 1
    layer = ua.SparseLinear(16, 8, sparsity=0.5)
    layer(torch.randn(20, 16)).sum().backward()


@needs_compiled
@pytest.mark.parametrize("fault", ["no home", "a folder in its place", "below a file", "unreadable"])
def test_where_no_cache_can_be_the_measured_table_serves_this_process(tmp_path, monkeypatch, fault):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_crossovers, "_unsaved", {})
    file = tmp_path / "uasparse_kernels" / "crossovers.json"
    if fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(_crossovers.Path, "home", no_home)
    elif fault == "a folder in its place":
        (file / "x").mkdir(parents=True)
    elif fault == "below a file":
        file.parent.write_text("")
    else:
        monkeypatch.setattr(_crossovers.Path, "is_file", lambda _: (_ for _ in ()).throw(PermissionError(13, "denied")))
        monkeypatch.setattr(_crossovers.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    _crossovers._warn.cache_clear()
    _cpu._crossover.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _choose(0.01).kernel == "cpu"
        ua.SparseLinear(16, 8, sparsity=0.5)(torch.randn(2, 16))
    assert len(caught) == (fault in ("no home", "unreadable"))  # the others are as if nothing was ever measured
    monkeypatch.setattr(module, "_sparse_is_faster", lambda *cell: cell[-1] < 0.02)
    with pytest.warns(RuntimeWarning, match=r"hold for this process only"):
        table = ua.tune(verbose=False)
    choice = _choose(0.1)
    assert choice.kernel == "dense" and "measured" in choice.reason
    assert table["masked_linear"]["float32"]["1x1"]["1"] < 0.05
    left = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
    assert all(name == "crossovers.json" for name in left)  # no half-written file
    _cpu._crossover.cache_clear()


# --- what a thread asks for is its own -------------------------------------------------------------------------------


def test_forced_and_listening_are_of_their_thread():
    pattern = SparsityPattern.random((8, 8), 0.5)
    x, weight = torch.randn(2, 8), torch.randn(pattern.nnz)
    elsewhere = []

    def other():
        with _common.listening(lambda op, choice: elsewhere.append(choice.reason)):
            masked_linear(x, weight, pattern)

    heard = []
    with _common.forced("reference"), _common.listening(lambda op, choice: heard.append(choice.reason)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        masked_linear(x, weight, pattern)
    assert heard == ["forced"] and len(elsewhere) == 1 and elsewhere != ["forced"]


def test_explain_beside_forwards_and_backwards_of_other_threads():
    """One model in all threads: each explanation has the calls of its own, by the right names."""
    model = ua.sparsify(torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 12)), 0.5)
    model.eval()
    x, stop, failures = torch.randn(3, 12), threading.Event(), []

    def work(call):
        try:
            while not stop.is_set():
                call()
        except BaseException as error:
            failures.append(error)

    def step():
        loss = torch.utils.checkpoint.checkpoint(model, x.clone().requires_grad_(), use_reentrant=False).sum()
        torch.autograd.grad(loss, list(model.parameters()))

    calls = [lambda: model(x), step, lambda: ua.explain(model, x)]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    found = [[where for where, *_ in ua.explain(model, x)] for _ in range(100)]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == [] and all(names == ["0", "2"] for names in found)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_explain_leaves_the_modes_as_they_were():
    model = torch.nn.Sequential(ua.SparseLinear(8, 8, sparsity=0.5), torch.nn.Dropout(), torch.nn.BatchNorm1d(8))
    model[1].eval()
    ua.explain(model, torch.randn(4, 8))
    assert [module.training for module in (model, *model)] == [True, True, False, True]
    assert torch.equal(model[2].running_mean, torch.zeros(8))
    with pytest.raises(ValueError):
        ua.explain(model, torch.randn(4, 5))
    assert [module.training for module in (model, *model)] == [True, True, False, True]
