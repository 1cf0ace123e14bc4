"""The study of structures: networks that start from a dense one, its tables and figure, and its page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("pytorch_ood")

from rich.console import Console

import uasparse_kernels as ua
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.evaluate import load_data, load_model
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.training.run import fit
from uasparse_kernels.training.study import structures
from uasparse_kernels.training.study.compare import compare
from uasparse_kernels.training.study.suites import STRUCTURED_ARMS, SUITES, Suite, changed, plan

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
TINY = FitConfig(
    data="digits", model="convnet", distribution="uniform", epochs=2, delta_t=3, batch_size=64, limit_train=320,
    loss="ce", augment="none",
)  # fmt: skip
SMALL = Suite(
    TINY, ("dense", "rigl", "rigl+4x1", "srigl", "2:4"), (), sparsities=(0.8,), scores=("msp",), lean=True,
    also=(Suite(replace(TINY, epochs=1), ("static+4x1",), (), sparsities=(0.8,), scores=("msp",), lean=True,
                start="dense"),),
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structures")
    torch.set_num_threads(1)
    compare(SMALL, folder, device="cpu", console=Console(quiet=True))
    return folder


def test_the_grid():
    runs = plan(SUITES["structures"])
    assert len({run.folder for run in runs}) == len(runs) == 3 * (1 + 3 * (len(STRUCTURED_ARMS) - 1) + 1 + 6 + 9)
    for arm in STRUCTURED_ARMS:
        assert with_arm(TINY, arm).arm == arm
    started = [run for run in runs if run.start]
    folders = [run.folder for run in runs]
    for run in started:
        assert run.config.epochs == 1 and folders.index(run.start_folder) < folders.index(run.folder)
        assert run.start_folder == f"dense/seed{run.config.seed}"
    wish = Suite(replace(TINY, momentum=0.5), ("rigl",), ())
    new = changed(SUITES["structures"], wish, {"momentum"})
    assert [grid.config.epochs for grid in new.grids] == [4, 4, 1]  # grids keep what is not given
    assert {grid.config.momentum for grid in new.grids} == {0.5}
    assert [run.label for run in plan(changed(SUITES["structures"], wish, {"arm"}))][:2] == ["rigl@0.9", "rigl@0.8"]
    assert not any(run.start for run in plan(changed(SUITES["structures"], wish, {"arm"})))


def test_cifar_on_a_cpu():
    runs = plan(SUITES["cifar-cpu"])
    assert sum(run.config.method == "dense" for run in runs) == 2
    assert all(len(run.config.holdout_classes) in (0, 4) for run in runs) and len(runs) == 32
    assert len({run.config.holdout for run in runs}) == 4
    assert len({run.folder for run in runs}) == len(runs)


def test_cifar_on_a_cpu_runs(tmp_path, monkeypatch):
    """On digits, a few steps: one with classes held out, and the published loss."""
    monkeypatch.setattr("uasparse_kernels.training.data.NUM_GENERATED", 200)  # images of noise
    tiny = FitConfig(data="digits", image_size=16, limit_train=192, epochs=5, warmup_epochs=1, batch_size=32, delta_t=9)
    given = {"data", "image_size", "limit_train", "epochs", "warmup_epochs", "batch_size", "delta_t", "seeds", "score"}
    suite = changed(SUITES["cifar-cpu"], Suite(tiny, (), (), scores=("u", "energy")), given)
    suite = replace(suite, unknowns=("noise",), also=tuple(replace(grid, unknowns=("noise",)) for grid in suite.also))
    kinds = {(run.config.arm, bool(run.config.holdout)): run for run in reversed(plan(suite))}
    assert len(kinds) == 7 and {run.config.model for run in kinds.values()} == {"quicknet-wide"}
    data = load_data(tiny)
    for run in (kinds["rigl+vote+hard-shuffle", True], kinds["rigl+moon+vote", False]):
        results = fit(
            run.config, tmp_path / run.folder, unknowns=run.unknowns, scores=suite.scores, lean=True, device="cpu",
            console=Console(quiet=True), data=None if run.config.holdout else data,
        )  # fmt: skip
        assert ("holdout" in results["unknown"]) == bool(run.config.holdout)
        assert 0 <= results["unknown"]["noise"]["energy"]["auroc"] <= 1


def test_a_network_starts_as_the_largest_weights_of_another(study):
    dense, _, _ = load_model(study / "dense" / "seed0")
    before = {name: value.clone() for name, value in dense.named_parameters()}
    config = replace(with_arm(TINY, "static"), sparsity=0.8)
    sparse = Trainer(config, load_data(config), start=dense).model
    layers = {name: m for name, m in sparse.named_modules() if isinstance(m, ua.nn.SparseLayer)}
    assert len(layers) > 2
    for name, layer in layers.items():
        weight, mask = before[f"{name}.weight"], layer.pattern.to_mask()
        assert torch.equal(layer.dense_weight(), torch.where(mask, weight, 0.0))
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_what_cannot_be_started_from_is_refused(study, tmp_path):
    quiet = Console(quiet=True)
    with pytest.raises(TrainingError, match=r"Expected a mlp .* to start from"):
        fit(replace(TINY, model="mlp", method="static"), tmp_path / "a", start=study / "dense/seed0", console=quiet)
    with pytest.raises(TrainingError, match=r"network of 11 outputs to start static.*, got one of 10"):
        fit(
            with_arm(replace(TINY, warmup_epochs=1), "static+moon"),
            tmp_path / "b",
            start=study / "dense/seed0",
            console=quiet,
        )
    summary = compare(replace(SMALL, arms=(), also=SMALL.also), tmp_path / "c", console=quiet)
    assert summary["unfinished"] == ["static+4x1_from_dense/seed0"]  # its dense network is not there yet


def test_tables_figure_and_page(study, tmp_path):
    page, times = tmp_path / "page.md", tmp_path / "times.json"
    gpu = ROOT / "benchmarks/results/h200/gpu-linear.json"
    page.write_text((ROOT / "docs/structures.md").read_text())
    row = {"shape": "4x1", "sparsity": 0.8, "pass": "step", "speedup_over": {"dense": 2.5}}
    machine = {"processor": "a processor", "isa": "avx512", "threads": 1, "torch": "2"}
    times.write_text(json.dumps({"machine": machine, "rows": [row]}))
    written = structures.write_structures(study, tmp_path, times, gpu, page)
    assert all(path.stat().st_size > 500 for path in written)
    runs = structures.read_stored(tmp_path / "structures.json")
    assert sorted((run.structure, run.sparsity, run.pruned) for run in runs) == [
        ("2:4", 0.5, False), ("4x1", 0.8, False), ("4x1", 0.8, True), ("dense", 0.0, False), ("fan-in", 0.8, False),
        ("unstructured", 0.8, False),
    ]  # fmt: skip
    text = page.read_text()
    accuracy = {run.key: f"{100 * run.accuracy:.2f}" for run in runs}
    mine, plain = (accuracy[name, 0.8, False, 0] for name in ("4x1", "unstructured"))
    assert f"| 80% 4x1 | 1 | {mine} | {float(mine) - float(plain):+.2f} | **2.5** |  |  |  |\n" in text
    assert f"| 80% 4x1 | 1 | {accuracy['4x1', 0.8, True, 0]} | {mine} |\n" in text
    assert "a processor, avx512, one thread" in text and "6 runs are in, 1 seed a row." in text
    assert "| 90% 64x64, bf16 | **3.7** | **3.9** |\n" in text
    # A run more joins those that are stored; the page without its marks is refused.
    more = replace(runs[0], seed=1)
    stored = json.loads((tmp_path / "structures.json").read_text())
    (tmp_path / "structures.json").write_text(json.dumps({"runs": [*stored["runs"], vars(more)]}))
    structures.write_structures(study, tmp_path, times, gpu, page)
    assert "7 runs are in, 1 to 2 seeds a row." in page.read_text()
    page.write_text("nothing")
    with pytest.raises(TrainingError, match="Expected the marks"):
        structures.write_structures(None, tmp_path, times, gpu, page)
    for folder, its_page, said in ((study, tmp_path / "none.md", "at .*none.md"), (None, page, "Expected runs in")):
        with pytest.raises(TrainingError, match=said):
            structures.write_structures(folder, tmp_path / "new", times, gpu, its_page)
    assert not (tmp_path / "new").exists() and page.read_text() == "nothing"


def test_the_page_shows_what_is_stored():
    page, stored = ROOT / "docs/structures.md", ROOT / "docs/evidence/structures.json"
    results = ROOT / "benchmarks/results"
    text = page.read_text()
    times, gpu = results / "zen5/structures.json", results / "h200/gpu-linear.json"
    assert structures.renewed(text, stored, times, gpu) == text


def test_networks_of_every_structure_are_timed(study):
    from benchmarks import bench_structures

    wanted = {("unstructured", 0.8), ("4x1", 0.8), ("fan-in", 0.8), ("2:4", 0.5)}
    rows = list(bench_structures.rows(SMALL, None, 0.0, passes=("step", "forward")))  # random patterns
    found = {(row["shape"], row["sparsity"], row["pass"]) for row in rows}
    assert found == {(*which, kind) for which in wanted for kind in ("step", "forward")}
    few = replace(SMALL, arms=("dense", "rigl+4x1"))
    rows = list(bench_structures.rows(few, study, 0.0, passes=("serving, batch 1",)))  # trained ones
    assert [row["shape"] for row in rows] == ["4x1"] and rows[0]["speedup_over"]["dense"] > 0
