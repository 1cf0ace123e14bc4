"""The GPU suites and the measurement of crossovers on tiny problems on the CPU, so that no minute of a GPU goes to a
mistake in them."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import tarfile
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bench_gpu_csr,
    bench_gpu_masked_conv2d,
    bench_gpu_masked_linear,
    bench_gpu_networks,
    bench_gpu_small,
    bench_gpu_step,
    bench_gpu_topk_indices,
    bench_gpu_training,
    bench_gpu_unknown_aware_loss,
    gpu,
    gpu_check,
    gpu_plots,
    gpu_warm,
    harness,
    plots,
)
from uasparse_kernels.ops import _cuda
from uasparse_kernels.ops._cuda_crossovers import measure_crossovers

pytestmark = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("uasparse::masked_linear", "CPU"),
    reason="needs the compiled ops",
)
ROOFS = {"fp32_tflops": 1.0, "bf16_tflops": 1.0, "unstructured_tflops": 1.0, "copy_gbs": 1.0}


class Once:
    """In place of a clock: every variant is called once, and those that ran here give the result of ``same_as``."""

    def __init__(self, same_as: str, names: set[str]):
        self.same_as, self.names = same_as, names

    def medians_ms(self, variants):
        results = {}
        for name in self.names & variants.keys():
            result = variants[name]()
            results[name] = result if isinstance(result, torch.Tensor) else result[0]
        assert results.keys() == self.names
        for result in results.values():
            torch.testing.assert_close(result, results[self.same_as], rtol=1e-3, atol=1e-3)
        return dict.fromkeys(variants, 2.0)


class Timed:
    """In place of a clock: every variant is called once."""

    def medians_ms(self, variants, rounds):
        return {name: 2.0 for name, call in variants.items() if call() is not None}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize(
    ("tokens", "block", "step"), [(2048, 16, False), (20, 16, True), (30, 1, False), (20, 1, True)]
)
def test_linear(tokens, block, step):
    names = {"dense", "masked by w * m", "ours, dense-stored", "ours"}
    cell = bench_gpu_masked_linear.Cell(64, 32, tokens, "fp32", 0.5, block, step)
    row = bench_gpu_masked_linear.measure(cell, Once("dense", names), ROOFS)
    bench_gpu_masked_linear.show(row)
    assert row["of_roof"] > 0 and row.get("error", 0) < 1e-6
    if not step:
        assert ("torch CSR" if block == 1 else "torch BSR") in row["ms"]


def test_convolutions():
    names = {"dense", "masked by w * m", "ours, dense-stored", "ours"}
    for stride in (1, 2):
        cell = bench_gpu_masked_conv2d.Cell(32, 5, stride, "fp32", 0.5, 16, stride == 1)
        row = bench_gpu_masked_conv2d.measure(cell, Once("dense", names), ROOFS, batch=2)
        bench_gpu_masked_linear.show(row)


@pytest.mark.parametrize("model", ["MLP", "transformer MLP", "conv stage"])
@pytest.mark.parametrize("block", [1, 16])
def test_steps(model, block):
    names = {"masked by w * m", "ours, dense-stored", "ours"}
    cell = bench_gpu_step.Cell(model, 32, 3, "fp32", 0.25, block)
    row = bench_gpu_step.measure(cell, Once("masked by w * m", names), ROOFS)
    bench_gpu_masked_linear.show(row)
    assert row["times_dense"]["ours"] == 1 and row["of_roof"] > 0


@pytest.mark.parametrize("model", ["conv stage", "ViT-B/16 blocks", "ResNet-50"])
def test_networks(model, monkeypatch):
    """Compiled and eager steps of the sparse network have one loss, and so have the dense ones."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet
    small = functools.partial(resnet.ResNet, resnet.BasicBlock, [1, 1, 1, 1])
    monkeypatch.setattr(torchvision.models, "resnet50", small)  # for time
    monkeypatch.setattr(bench_gpu_networks, "VIT_BLOCKS", 1)
    cell = bench_gpu_networks.Cell(model, 64 if model == "ResNet-50" else 32, 2, "fp32", 0.25, 16)

    class Losses:
        def medians_ms(self, variants):
            losses = {name: call() for name, call in variants.items()}
            for name in ("dense", "ours"):
                assert 0 < losses[name] < 100
                torch.testing.assert_close(losses[name], losses[f"{name}, eager"], rtol=1e-3, atol=1e-3)
            return dict.fromkeys(variants, 2.0)

    row = bench_gpu_networks.measure(cell, Losses(), ROOFS)
    bench_gpu_networks.show(row)
    assert row["sparse_layers"] >= 4 and row["active_weights"] < 0.3 * row["sparse_weights"]
    assert "compiled (default)" in plots.markdown([row])


def test_small_batches():
    cell = next(bench_gpu_small.cells())._replace(out=32, inp=64)
    assert (cell.tokens, cell.block, cell.step) == (1, 1, False)
    row = bench_gpu_small.measure(cell._replace(kind="fp32"), Once("dense", {"dense", "ours"}), ROOFS)
    bench_gpu_small.show(row)


def test_cells():
    linear, conv, steps = (
        list(suite.cells()) for suite in (bench_gpu_masked_linear, bench_gpu_masked_conv2d, bench_gpu_step)
    )
    assert all(cell.out % cell.block == cell.inp % cell.block == 0 for cell in linear)
    assert all(cell.channels % cell.block == 0 for cell in conv)
    assert len(set(linear)) == len(linear) and len(set(conv)) == len(conv) and len(set(steps)) == len(steps)
    commands = gpu_warm.commands("somewhere")
    assert any(command[3:6] == ["--only", "bf16", "64"] for command in commands)
    arguments = argparse.Namespace(only=["bf16", "64"], steps=True)
    assert next(gpu.only(linear, arguments)) == bench_gpu_masked_linear.Cell(4096, 4096, 8192, "bf16", 0.1, 64, True)


def test_suite_keeps_rows_as_it_goes(tmp_path, monkeypatch):
    """A cell that fails leaves a line; rows are drawn."""
    monkeypatch.setattr(gpu, "Clock", lambda: Once("dense", {"dense", "ours"}))
    monkeypatch.setattr(gpu, "roofs", lambda _: ROOFS)
    cells = [bench_gpu_masked_linear.Cell(48, 32, 20, "fp32", density, 16) for density in (0.5, 0.25, 0.1)]

    def measure(cell, clock, roof):
        if cell.density == 0.25:
            raise RuntimeError("no such kernel")
        return bench_gpu_masked_linear.measure(cell, clock, roof)

    arguments = argparse.Namespace(seconds=60, folder=tmp_path)
    gpu.run_suite("gpu-linear", cells, measure, bench_gpu_masked_linear.show, arguments)
    rows = json.loads((tmp_path / "gpu-linear.json").read_text())["rows"]
    assert [row["density"] for row in rows] == [0.5, 0.1]
    pytest.importorskip("matplotlib")
    assert gpu_plots.draw("gpu-linear", tmp_path).stat().st_size > 1000


def test_crossovers_have_the_shape_of_the_predictions():
    seen = []
    table = measure_crossovers("cpu", features=32, vectors=20, channels=16, report=lambda t: seen.append(str(t)))
    assert seen[-1] == str(table) and len(seen) > 10
    for op, arithmetics in table.items():
        for arithmetic, blocks in arithmetics.items():
            assert blocks.keys() <= _cuda.PREDICTED[op][arithmetic].keys()
            assert all(0 <= density <= 1 for density in blocks.values())
    assert measure_crossovers("cpu", seconds=0, features=64, vectors=20).keys() == {"masked_linear"}


def test_stages_of_gpu_check(tmp_path, monkeypatch):
    """Every module of a stage is there and takes its arguments; a stage that fails or hangs does not stop the rest."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = gpu_check.stages(tmp_path)
    assert [stage.name for stage in stages if "gpu-" in stage.name] == [
        *("gpu-loss", "gpu-csr", "gpu-training", "gpu-networks", "gpu-small"),
        *("gpu-linear", "gpu-conv", "gpu-step", "gpu-topk"),
    ]
    assert sum(stage.seconds for stage in stages[:3]) < 240
    named = [part for stage in stages for part in stage.command if part.startswith("python_tests/")]
    assert named and all((gpu_check.ROOT / part).is_file() for part in named)
    names = [stage.name for stage in gpu_check.ordered(stages, None, ["gpu-conv"])]
    assert names[:3] == ["facts", "build", "gpu-conv"] and len(names) == len(stages)
    assert [stage.name for stage in gpu_check.ordered(stages, ["tests"], [])] == ["tests"]
    with pytest.raises(SystemExit, match="expected stages of facts, build"):
        gpu_check.ordered(stages, None, ["gpu-con"])
    for stage in stages:
        if stage.command[1] == "-m":
            assert importlib.util.find_spec(stage.command[2]) is not None
            if "--seconds" in stage.command:
                assert gpu.parser(None).parse_args(stage.command[3:]).folder == tmp_path
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    monkeypatch.setattr(
        gpu_check,
        "stages",
        lambda _: [
            gpu_check.Stage("bad", [sys.executable, "-c", "raise SystemExit(3)"], 20),
            gpu_check.Stage("slow", slow, 3),
            gpu_check.Stage("good", [sys.executable, "-c", "print('done')"], 20),
        ],
    )
    monkeypatch.setattr(gpu_check, "MINIMUM_SECONDS", 1)
    monkeypatch.setenv("UASPARSE_COMMIT", "0123abc")
    facts = harness.machine()
    monkeypatch.setattr(harness, "machine", lambda: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder, archive = tmp_path / "results", tmp_path / "out" / "gpu-check.tgz"
    archive.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--folder", str(folder), "--archive", str(archive)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code
    found = json.loads((folder / "stages.json").read_text())
    assert [result["result"] for result in found["stages"]] == [3, "out of time", 0]
    assert found["machine"]["uasparse_kernels"] == "0123abc"
    assert (folder / "slow.log").read_text() == "begun\n" and (folder / "good.log").read_text() == "done\n"
    with tarfile.open(archive) as tar:
        assert {"results/stages.json", "results/good.log"} <= set(tar.getnames())


def test_training():
    """As a worker runs it, with another network for time."""
    config = bench_gpu_training.config_of("eager")
    assert bench_gpu_training.config_of("compiled") == replace(config, compile=True)
    config = replace(config, model="convnet", batch_size=32, delta_t=2, precision="float32")
    called = []
    ms = bench_gpu_training.timed(config, 2, lambda: called.append(1))
    assert ms > 0 and called == [1]
    row = {"runs": 3, "mode": "eager", "ms": {"step": ms}, "images_per_second": 9.0, "minutes_of_100_epochs": 5.0}
    assert "| 3 | eager |" in plots.markdown([row])


def test_selection():
    cell = bench_gpu_topk_indices.Cell("two layers", (1000, 77), 0.1)
    bench_gpu_topk_indices.show(bench_gpu_topk_indices.measure(cell, Timed(), ROOFS))


def test_loss():
    cell = bench_gpu_unknown_aware_loss.Cell(30, 11, "fp32")

    class Clocks(Once):
        def medians_ms(self, variants):
            if "scaled" in variants:
                return {"scaled": 2.0} if variants["scaled"]() else {}
            return super().medians_ms(variants)

    names = {"eager reference", "ours", "two launches"}
    row = bench_gpu_unknown_aware_loss.measure(cell, Clocks("eager reference", names), ROOFS)
    bench_gpu_unknown_aware_loss.show(row)
    assert row["error"] < 1e-6 and "scaled" in row["times_faster_than"]


def test_csr():
    cells = list(bench_gpu_csr.cells())
    assert len(set(cells)) == len(cells)
    names = {"dense", "ours", "CSR", "CSR, bare", "CSR, no transposes"}
    for cell in cells[:2]:
        cell = cell._replace(out=32, inp=64, tokens=20, density=0.1)
        row = bench_gpu_csr.measure(cell, Once("dense", names), ROOFS)
        bench_gpu_csr.show(row)
        assert row["error"] < 1e-6 and row["repeats"]
