"""The benchmarks run, on the smallest problems, and what the pages show is what was stored."""

import json
import sys

import pytest
import torch

from benchmarks import (
    bench_batch_norm,
    bench_distributed,
    bench_masked_conv2d,
    bench_masked_linear,
    bench_models,
    bench_networks,
    bench_profile,
    bench_step,
    bench_threads,
    harness,
    plots,
)

ROW = {"shape": "a", "pass": "step", "sparsity": 0.9, "gflops": 3.0, "of_roof": 0.5}
ROW |= harness.compare({"dense": 4.0, "dense [in, out]": 3.0, "ours": 1.0, "torch CSR": 2.0})


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--folder", "file/within"], "Expected a folder that can be written, got file/within"),
        (["--threads", "0"], "'--threads'"),
        (["serve-threads"], "'.[benchmark,training,serve-rivals]' brings what suites need"),
    ],
)
def test_what_cannot_run_or_be_kept_is_refused_before_it_is_measured(arguments, said, monkeypatch, tmp_path, capsys):
    typer = pytest.importorskip("typer")
    from benchmarks.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(sys.modules, "benchmarks.bench_serve_threads", None)  # as without what it imports
    monkeypatch.setattr(harness, "matmul_roof", lambda: pytest.fail("measured"))
    (tmp_path / "file").touch()
    app = typer.Typer()
    app.command()(main)
    with pytest.raises(SystemExit) as stop:
        app(["linear", *arguments])
    assert stop.value.code and said in f"{capsys.readouterr().err} {stop.value.code}"


def test_compare_takes_the_faster_dense_layout():
    assert ROW["speedup_over"] == {"dense": 3.0, "torch CSR": 2.0}


def test_interleave_calls_each_variant_alike():
    calls = []
    times = harness.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, rounds=3)
    assert times.keys() == {"a", "b"} and calls.count("a") == calls.count("b")


def test_every_variant_of_a_linear_layer_runs():
    row = bench_masked_linear.row(20, 48, 32, 0.9, training=True, seconds=0)
    assert {"dense", "torch CSR"} <= row["speedup_over"].keys() and row["gflops"] > 0


def test_the_rival_computes_the_same():
    layer = bench_masked_linear.rivals.CsrLinear(pattern := harness.ua.SparsityPattern.random((32, 48), 0.2))
    sparse = harness.ua.SparseLinear(48, 32, pattern=pattern)
    sparse.weight.data, sparse.bias.data = layer.weight.data, layer.bias.data
    x = torch.randn(5, 48, requires_grad=True)
    grads = []
    for module in (layer, sparse):
        out = module(x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, module.weight, module.bias]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_every_variant_of_a_convolution_runs():
    row = bench_masked_conv2d.row(bench_masked_conv2d.Case(8, 8, 8, batch=2), 0.9, seconds=0)
    assert row["speedup_over"]["dense"] > 0


@pytest.mark.parametrize("case", [case for case in bench_step.CASES if case.name.startswith(("MLP", "ViT"))], ids=str)
def test_steps_run(case):
    assert bench_step.row(case, seconds=0)["ms"].keys() == {"dense", "ours"}


@pytest.mark.distributed
def test_processes_send_the_active_weights_and_no_more():
    row = bench_distributed.row("MLP 784-1024-1024-11", 0.95, seconds=0, rounds=1)
    assert row["bytes_sent"]["ours"] == row["bytes_of_active_weights"] < 0.06 * row["bytes_sent"]["dense"]
    assert row["speedup_over"]["dense"] > 0


@pytest.mark.parametrize("which", bench_batch_norm.PASSES)
def test_every_variant_of_batch_norm_runs(which):
    row = bench_batch_norm.row((3, 4, 5, 6), which, seconds=0)
    assert row["ms"].keys() == {"torch", "torch channels_last", "ours"} and row["of_copy_roof"] > 0


def test_parts_of_a_step_are_told_apart():
    def network():
        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True)]
        layers += [torch.nn.Conv2d(8, 8, 3), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(72, 10)]
        return torch.nn.Sequential(*layers)

    small = bench_networks.Network("small", network, (4, 3, 10, 10), ("0", "6"))
    rows = list(bench_profile.rows(small, 0, 40.0))
    found = {row["part"]: row for row in rows}
    maps = 4 * 8 * 8 * 8 * 4
    assert found["ReLU, forward"]["mb"] == pytest.approx(2e-6 * maps)
    # Output and input, the gradient, and what is written in its place.
    assert found["batch norm and what is gated with it, backward"]["mb"] == pytest.approx(4e-6 * maps, rel=0.02)
    assert found["ReLU alone, backward"]["mb"] == found["ReLU alone, backward"]["ms"] == 0
    assert all(found[part]["ms"] > 0 for part in ("sparse layers, backward", "dense layers", "optimiser", "rest"))
    assert plots.markdown(rows).count("\n| ") == len(rows)


def test_parts_of_the_recipe_are_timed():
    pytest.importorskip("pytorch_ood")
    from benchmarks import bench_recipe

    row = bench_recipe.row(bench_recipe.Case("convnet", (1, 28, 28), 32, 2), "rigl", seconds=0, epochs=5, rounds=1)
    assert row["ms"].keys() == {"rigl" + arm for arm in bench_recipe.ARMS}
    assert -0.02 < row["more_memory"]["rigl+vote+hard-shuffle"] < 0.02 and min(row["ms"].values()) > 0
    text = plots.markdown([row])
    assert text.count("\n| convnet") == len(bench_recipe.ARMS)


SMALL = (
    "hf.GPT2LMHeadModel", "hf.LlamaForCausalLM tied", "hf.T5ForConditionalGeneration", "hf.Wav2Vec2ForCTC",
    "hf.WhisperForConditionalGeneration", "nn.Conv1d + Linear", "nn.Embedding + LSTM + Linear", "timm.efficientvit_b0",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_networks_work_when_sparse(name):
    row = bench_models.row(name)
    assert row["verdict"] == "ok" and row["layers"] and f"{row['covered']:.1%}" in plots.markdown([row])


def test_every_network_has_its_verdict():
    rows = json.loads((harness.RESULTS / "models.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == list(bench_models.NETWORKS)
    assert not [row for row in rows if row["verdict"] != "ok"]


def test_a_network_that_fails_says_so(monkeypatch):
    class Odd(torch.nn.Linear):
        def train(self, mode=True):
            self.scale = 2.0 if mode else 3.0
            return super().train(mode)

    failing = {
        "nothing to convert": bench_models.torchs(lambda: torch.nn.Sequential(torch.nn.LSTM(4, 4)), 2, 3, 4),
        "no layer": bench_models.torchs(lambda: torch.nn.ModuleDict({"a": Odd(4, 4), "b": torch.nn.LSTM(4, 4)}), 2, 4),
    }
    monkeypatch.setattr(bench_models, "NETWORKS", failing)
    assert "ValueError" in bench_models.row("nothing to convert")["verdict"]
    assert bench_models.row("no layer")["verdict"] == "no layer became sparse"
    found = [torch.tensor([1.0, 2.0])]
    assert bench_models._error(found, [torch.tensor([1.0, 4.0])]) == 0.5
    assert bench_models._error(found, [torch.zeros(2)]) == bench_models._error([], []) == float("inf")


def test_threads_are_set_back():
    before = torch.get_num_threads()
    row = bench_threads.row("x", {"ours": lambda: torch.ones(3).sum()}, 0.0)
    assert torch.get_num_threads() == before and "ours" in row["two_threads_over_one"]


def test_tables_and_plots(tmp_path, capsys):
    rows = [ROW | {"sparsity": s} for s in (0.5, 0.8, 0.9)]
    plots.table("linear", rows)
    assert "3.00" in capsys.readouterr().out
    assert [path.stat().st_size > 1000 for path in plots.draw("linear", rows, tmp_path)] == [True]
    assert plots.draw("linear", rows[:1], tmp_path) == []
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb")
    assert plots.insert("x", plots.markdown(rows), page) and not plots.insert("y", "", page)
    assert "| a step | **3.0** (2.0) | **3.0** (2.0) | **3.0** (2.0) |\n<!-- end of x -->\nb" in page.read_text()


@pytest.mark.parametrize("page", harness.PAGES, ids=lambda page: page.name)
def test_pages_show_what_was_stored(page, tmp_path):
    text = page.read_text()
    copy = tmp_path / page.name
    copy.write_text(text)
    plots.insert_stored(copy)
    assert copy.read_text() == text


def test_the_page_of_processes_shows_what_was_stored():
    page = (harness.RESULTS.parents[1] / "docs" / "processes.md").read_text()
    for row in json.loads((harness.RESULTS / "zen5" / "distributed.json").read_text())["rows"]:
        sent, ms = row["bytes_sent"], row["ms"]
        assert sent["ours"] == row["bytes_of_active_weights"]
        assert f"{sent['dense']:,} | {sent['ours']:,} | {ms['dense']:.1f} | {ms['ours']:.1f} |" in page
