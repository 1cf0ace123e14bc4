"""Statistics and verdicts of a study, on made-up runs whose answers are known."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("typer")
pytest.importorskip("pytorch_ood")

from rich.console import Console

from uasparse_kernels.training.config import ARM_PARTS, FitConfig, with_arm
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.study.claims import OURS, PUBLISHED, SEED_NOISE, Claim
from uasparse_kernels.training.study.compare import compare
from uasparse_kernels.training.study.report import claims_table, far_table, known_table, scores_table, write_study
from uasparse_kernels.training.study.statistics import Row, judge, quantities, read_study, t_test
from uasparse_kernels.training.study.suites import Suite
from uasparse_kernels.unknowns.scores import SCORES

BASE = FitConfig(epochs=10, warmup_epochs=1)
GAIN = Claim("gains", "moon+vote", "vote", score="moon", baseline_scores=("msp", "energy"), sets=("mnist", "noise"))
ACCURACY = Claim("as accurate", "moon+vote", "vote", "accuracy", above=SEED_NOISE)


def write_run(
    folder, arm, *, sparsity=0.9, seed=0, holdout="", auroc=None, accuracy=0.9, ece=0.02, scaled=None, seconds=10.0,
    base=BASE,
):  # fmt: skip
    """A results.json as `fit` writes it, of the parts that the statistics read. `auroc`: {set: {score: value}}."""
    config = replace(with_arm(base, arm), sparsity=sparsity, seed=seed, holdout=holdout)
    results = {
        "config": config.to_dict(),
        "known": {"accuracy": accuracy, "ece": ece, "nll": 0.3, "brier": 0.1, "reliability": {}} | (scaled or {}),
        "unknown": {
            name: {score: {"auroc": value, "fpr95": 1 - value} for score, value in scores.items()}
            for name, scores in (auroc or {}).items()
        },
        "compute_seconds_per_epoch": seconds,
        "cost": {"memory_bytes": 900, "index_bytes": 100},
    }
    path = folder / f"{arm}-{sparsity}-{holdout.replace(',', '_')}" / f"seed{seed}"
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))


def write_pairs(folder, differences, spread=0.02):
    """RigL runs of `vote` and of `moon+vote`, whose AUROC by their scores differs by `differences`, one a seed."""
    level = np.random.RandomState(0).normal(0.7, spread, len(differences))  # of the seed: the pairing takes it out
    for seed, difference in enumerate(differences):
        of_baseline = {"msp": level[seed] - 0.1, "energy": level[seed]}
        write_run(folder, "rigl+vote", seed=seed, auroc={"mnist": of_baseline, "noise": of_baseline})
        mine = {"moon": level[seed] + difference, "msp": 0.99}
        write_run(folder, "rigl+moon+vote", seed=seed, auroc={"mnist": mine, "noise": mine})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.03, 0.05, 0.04, 0.06, 0.02, 0.04], "holds"),
        ([-0.03, -0.05, -0.04, -0.06, -0.02, -0.04], "does not hold"),
        ([0.03, -0.05, 0.04, -0.06, 0.02, 0.01], "not decided"),
        ([0.05] * 4, "not decided"),  # too few, whatever they say
        ([], "not decided"),
    ],
)
def test_verdicts(tmp_path, differences, verdict):
    write_pairs(tmp_path, differences)
    write_run(tmp_path, "set", auroc={"mnist": {"msp": 0.5}})  # of no consequence
    (judgement,) = judge([GAIN], read_study(tmp_path).rows)
    assert judgement.verdict == verdict and judgement.pairs == len(differences)
    if len(differences) > 4:
        assert judgement.mean == pytest.approx(100 * np.mean(differences))
        assert judgement.low < judgement.mean < judgement.high


def test_a_claim_about_a_number(tmp_path):
    write_pairs(tmp_path, [0.2] * 6, spread=0.001)
    rows = read_study(tmp_path).rows
    claim = Claim("at least 85", "moon+vote", None, score="moon", sets=("mnist", "kmnist"), above=85.0)  # no kmnist
    assert [j.verdict for j in judge([claim, replace(claim, above=95.0)], rows)] == ["holds", "does not hold"]


def test_interval_and_p_are_those_of_the_mean():
    values = np.random.RandomState(1).normal(3, 2, 400).tolist()
    low, high, p = t_test(values, np.mean(values) - 1.96 * np.std(values) / math.sqrt(400))
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert low == pytest.approx(np.mean(values) - half, abs=0.01)
    assert high == pytest.approx(np.mean(values) + half, abs=0.01)
    assert p == pytest.approx(0.05, abs=0.002)
    # Of three values 1, 2, 3: t = 2 / (1 / sqrt 3), two degrees of freedom.
    assert t_test([1.0, 2.0, 3.0], 0.0)[2] == pytest.approx(0.0742, abs=1e-4)
    assert t_test([2.0, 2.0], 1.0) == (2.0, 2.0, 0.0) and t_test([2.0, 2.0], 2.0) == (2.0, 2.0, 1.0)


def test_many_claims_need_more(tmp_path):
    write_pairs(tmp_path, [0.03, 0.05, 0.00, 0.06, 0.02, 0.04])
    rows = read_study(tmp_path).rows
    (alone,) = judge([GAIN], rows)
    assert alone.verdict == "holds" and alone.p_holm == alone.p
    unknown = replace(GAIN, arm="moon")  # has no pair: it does not count
    others = [replace(GAIN, above=3.3 + at / 100) for at in range(9)]
    family = judge([GAIN, unknown, *others], rows)
    assert family[0].verdict == "not decided" and family[0].p_holm == pytest.approx(10 * alone.p)
    assert family[0].low == alone.low > 0
    assert math.isnan(family[1].p_holm)
    # Holm's second smallest is multiplied by one less, and never below the first.
    two = judge([GAIN, replace(GAIN, above=-0.001)], rows)
    assert two[1].p_holm == pytest.approx(2 * two[1].p) and two[0].p_holm == max(two[1].p_holm, two[0].p)


def test_pairs_share_method_sparsity_seed_and_split(tmp_path):
    for method, gain in (("rigl", 0.01), ("set", 0.02)):
        for sparsity, more in ((0.8, 0.1), (0.9, 0.2)):
            write_run(tmp_path, f"{method}+vote", sparsity=sparsity, auroc={"noise": {"msp": 0.5}})
            auroc = {"noise": {"moon": 0.5 + gain + more}}
            write_run(tmp_path, f"{method}+moon+vote", sparsity=sparsity, auroc=auroc)
    write_run(tmp_path, "rigl+moon+vote", seed=7, auroc={"noise": {"moon": 0.99}})  # without a partner
    split = {"noise": {"moon": 0.99, "msp": 0.5}, "holdout": {"moon": 0.6, "msp": 0.5}}
    for arm in ("rigl+vote", "rigl+moon+vote"):
        write_run(tmp_path, arm, holdout="1,2", auroc=split)
    rows = read_study(tmp_path).rows
    assert sorted(quantities(GAIN, rows)) == pytest.approx([11, 12, 21, 22])
    assert quantities(replace(GAIN, sets=("holdout",)), rows) == pytest.approx([10])


def test_a_table_shows_each_sparsity_and_what_has_no_pair(tmp_path):
    for sparsity, gain in ((0.8, 0.1), (0.99, -0.3)):
        write_run(tmp_path, "set+vote", sparsity=sparsity, auroc={"noise": {"msp": 0.5}})
        write_run(tmp_path, "set+moon+vote", sparsity=sparsity, auroc={"noise": {"moon": 0.5 + gain}})
    rows = read_study(tmp_path).rows
    judgement, other = judge([GAIN, replace(GAIN, text="of another arm", arm="moon")], rows)
    assert judgement.by_sparsity == pytest.approx({0.8: 10, 0.99: -30})
    table = claims_table([judgement, other])
    assert "| at 80 / 99 % |" in table and "| 10.00 / -30.00 |" in table
    assert "| of another arm |" not in table and "No runs for a pair here: of another arm." in table
    one = claims_table(judge([GAIN], [row for row in rows if row.sparsity == 0.8]))
    assert "at 80" not in one and one.splitlines()[0].count("|") == one.splitlines()[-1].count("|") == 8


def test_a_mean_of_some_of_the_runs_says_so(tmp_path):
    for seed in range(3):
        scaled = {"ece_scaled": 0.01, "nll_scaled": 0.3, "temperature": 0.9}
        write_run(tmp_path, "set+vote", seed=seed, scaled=scaled if seed else {"mean_u": 0.000051234})
    row = known_table(read_study(tmp_path).rows).splitlines()[-1]
    assert (
        row.startswith("| set+vote | 90% | 3 | 90.00 ± 0.00 |")
        and "| 0.900 ± 0.000 (2) |" in row
        and "| 0.05 (1) |" in row
    )


def test_far_ood_by_arm_and_score(tmp_path):
    for method, seed, value in (("rigl", 0, 0.6), ("rigl", 1, 0.7), ("set", 0, 0.8)):
        auroc = {"mnist": {"msp": value}, "noise": {"msp": value + 0.1}, "mirrored": {"msp": 0.1}}
        if seed == 1:
            auroc["mnist"]["knn"], auroc["noise"]["knn"] = 0.9, 0.8
        write_run(tmp_path, f"{method}+vote", seed=seed, auroc=auroc)
    write_run(tmp_path, "set+vote", sparsity=0.99, auroc={"mnist": {"msp": 0.5}, "noise": {"msp": 0.5}, "icons": {}})
    write_run(tmp_path, "set+vote", seed=5, holdout="1,2", auroc={"mnist": {"msp": 0.0}, "noise": {"msp": 0.0}})
    table = far_table(read_study(tmp_path).rows)
    assert table.startswith("## Far-OOD at 90 / 99 %: AUROC, mean over mnist, noise\n")
    assert "| arm | msp | knn |" in table  # what no run has is left out
    assert "| vote | 75.0 / 50.0 | 85.0 (1) / - |" in table


def test_every_score_by_arm_far_and_near(tmp_path):
    for seed, msp in ((0, 0.6), (1, 0.7)):
        far = {"msp": msp, "vim": 0.9} if seed else {"msp": msp}
        write_run(tmp_path, "rigl+vote", seed=seed, auroc={"noise": far, "mnist": {"msp": msp}, "mirrored": {"msp": 0}})
    write_run(tmp_path, "dense", sparsity=0.0, auroc={"noise": {"msp": 0.5}, "mnist": {"msp": 0.7}})
    write_run(tmp_path, "rigl+vote", sparsity=0.95, auroc={"noise": {"msp": 0.1}, "mnist": {"msp": 0.1}})
    lines = scores_table(read_study(tmp_path).rows).splitlines()
    assert lines[0] == "## Scores at 90%: AUROC, far-OOD, %" and lines[4] == "| score | dense | rigl+vote |"
    assert lines[2].startswith("Means over mnist, noise, ")
    assert lines[6:] == ["| msp | 60.0 | 65.0 |", "| vim |  | 90.0 |"]
    near = {"noise": {"msp": 0.0}, "mnist": {"msp": 0.0}, "holdout": {"msp": 0.8, "knn": 0.75}}
    write_run(tmp_path, "rigl+vote", holdout="1,2", auroc=near)
    table = scores_table(read_study(tmp_path).rows)
    assert "far-OOD / held-out classes" in table and "| msp | 60.0 / - | 65.0 / 80.0 |" in table
    assert "| knn |  | - / 75.0 |" in table


def test_pairs_without_a_metric_that_came_later_are_left_out(tmp_path):
    claim = Claim("calibrated", "moon+vote", "vote", "ece_scaled")
    for seed in range(4):
        scaled = {"ece_scaled": 0.01 + seed / 100, "nll_scaled": 0.3, "temperature": 0.9}
        write_run(tmp_path, "rigl+vote", seed=seed, scaled=scaled)
        scaled = scaled | {"ece_scaled": 0.01}
        write_run(tmp_path, "rigl+moon+vote", seed=seed, scaled=scaled if seed != 2 else None)
    assert sorted(quantities(claim, read_study(tmp_path).rows)) == pytest.approx([0, 1, 3])


def test_a_dense_network_is_paired_with_every_sparse_one_of_its_seed(tmp_path):
    claim = Claim("costs", "dense", "", score="energy", baseline_scores=("energy",), sets=("noise",))
    for seed in (0, 1):
        write_run(tmp_path, "dense", sparsity=0.0, seed=seed, auroc={"noise": {"energy": 0.8 + seed / 100}})
        for sparsity, value in ((0.8, 0.7), (0.9, 0.6)):
            write_run(tmp_path, "rigl", sparsity=sparsity, seed=seed, auroc={"noise": {"energy": value}})
    assert sorted(quantities(claim, read_study(tmp_path).rows)) == pytest.approx([10, 11, 20, 21])


def test_orientation_and_seed_noise(tmp_path):
    for seed in range(6):
        noise = 0.01 * (-1) ** seed
        write_run(tmp_path, "rigl+vote", seed=seed, accuracy=0.9 + noise, ece=0.02, seconds=10.0)
        write_run(tmp_path, "rigl+moon+vote", seed=seed, accuracy=0.895 + noise, ece=0.05, seconds=10.2)
    rows = read_study(tmp_path).rows
    changed = [
        {}, {"above": 0.0}, {"metric": "ece", "above": 0.0}, {"metric": "step_time", "above": -3.0},
        {"metric": "memory", "above": -3.0},
    ]  # fmt: skip
    accurate, zero, ece, step_time, memory = (judge([replace(ACCURACY, **c)], rows)[0] for c in changed)
    # Half a point lower, where seeds differ by a standard deviation of 1.1.
    assert accurate.threshold == pytest.approx(-math.sqrt(1.2)) and accurate.verdict == "holds"
    assert accurate.mean == pytest.approx(-0.5)
    assert zero.verdict == "does not hold"
    assert ece.mean == pytest.approx(-3.0)
    assert step_time.mean == pytest.approx(-2.0) and step_time.verdict == "holds"
    assert memory.mean == 0.0


def test_claims_name_arms_and_scores_that_exist():
    tokens = {token for kind in ARM_PARTS.values() for token in kind}
    for claim in PUBLISHED + OURS:
        for arm in (claim.arm, claim.baseline or ""):
            assert set(arm.split("+")) - {""} <= tokens
        assert {claim.score, *claim.baseline_scores} - {""} <= set(SCORES)
        assert (claim.metric == "auroc") == bool(claim.sets)


def test_the_page(tmp_path):
    runs, out = tmp_path / "fashion", tmp_path / "docs"
    write_pairs(runs, [0.03, 0.05, 0.04, 0.06, 0.02, 0.04])
    write_run(runs, "rigl+vote", holdout="1,2", auroc={"holdout": {"msp": 0.6}})
    written = write_study(runs, out)
    page = out / "fashion.md"
    text = page.read_text()
    assert text.startswith("# Study: fashion\n")
    claim = next(c for c in PUBLISHED if c.arm == "moon+vote" and c.baseline == "vote" and c.score == "moon")
    assert f"| {claim.text} | **holds** | 4.00 |" in text
    assert "13 runs (0 dense; 90%: 12; 90% with classes held out: 1), seeds 0, 1, 2, 3, 4, 5." in text
    assert "| rigl+vote | 90% | 6 | 90.00 ± 0.00 | 2.00 ± 0.00 | 0.300 ± 0.000 |" in text
    assert "60.0 / 40.0" in text
    assert all(path.is_file() for path in written) and sum(path.suffix == ".png" for path in written) == 2
    assert "rigl+vote,0.9,holdout,msp,auroc,1,0.60000,0.00000" in (out / "fashion.csv").read_text()

    # Once more, from the stored file: the same page.
    stored = out / "fashion.json"
    write_study(stored, out)
    assert page.read_text() == text

    # From a folder with one new run, and one made again: the others stay.
    again = tmp_path / "elsewhere" / "fashion"
    write_run(again, "rigl+vote", seed=6)
    write_run(again, "rigl+vote", seed=5, accuracy=0.5)
    write_study(again, out)
    assert "14 runs" in page.read_text() and len(read_study(stored).rows) == 14
    assert (
        next(row for row in read_study(stored).rows if row.key == ("rigl", "vote", 0.9, 5, "")).known["accuracy"] == 0.5
    )


def test_a_stored_study_of_other_settings_is_left_alone(tmp_path):
    out = tmp_path / "evidence"
    page = out / "fashion.md"
    write_run(tmp_path / "fashion", "rigl")
    write_study(tmp_path / "fashion", out)
    kept = (out / "fashion.json").read_bytes(), page.read_bytes()
    write_run(tmp_path / "other" / "fashion", "rigl", base=replace(BASE, epochs=20))
    with pytest.raises(TrainingError, match=r"epochs: 20 and there 10"):
        write_study(tmp_path / "other" / "fashion", out)
    assert kept == ((out / "fashion.json").read_bytes(), page.read_bytes())
    write_run(tmp_path / "fashion", "rigl", seed=1, base=replace(BASE, lr_max=0.2))
    with pytest.raises(TrainingError, match=r"lr_max"):
        read_study(tmp_path / "fashion")


def test_what_an_arm_sets_is_its_own_and_all_else_is_shared(tmp_path):
    for arm in ("rigl+vote", "rigl+vote+mixed-shuffle", "rigl+vote+patch-shuffle"):
        write_run(tmp_path / "a", arm)
    assert read_study(tmp_path / "a").settings["unknown_share"] == BASE.unknown_share
    write_run(tmp_path / "a", "set+vote+patch-shuffle", base=replace(BASE, unknown_share=0.5))
    with pytest.raises(TrainingError, match=r"unknown_share: 0.125 and there 0.5"):
        read_study(tmp_path / "a")


def test_a_file_that_is_no_study(tmp_path):
    file = tmp_path / "other.json"
    for content in ("[]", "{}", '{"settings": {}, "rows": [{"arm": "vote"}]}'):
        file.write_text(content)
        with pytest.raises(TrainingError, match=r"Expected a study that `report-study` stored"):
            read_study(file)


def test_runs_without_compute_seconds_say_nothing_of_step_times():
    claim = Claim("as fast", "moon+vote", "vote", "step_time", above=-3.0)
    runs = {"known": {}, "auroc": {}, "fpr95": {}, "memory": 1.0}
    rows = [
        Row("rigl", arm, 0.9, seed, "", step_time=time, **runs)
        for seed, times in enumerate([(10.0, 11.0), (10.0, None), (None, 11.0)])
        for arm, time in zip(("vote", "moon+vote"), times, strict=True)
    ]
    assert quantities(claim, rows) == pytest.approx([-10.0])


def test_compare_leaves_out_what_is_stored(tmp_path):
    write_run(tmp_path / "fashion", "rigl+vote")
    write_study(tmp_path / "fashion", tmp_path / "evidence")
    stored, quiet = tmp_path / "evidence" / "fashion.json", Console(quiet=True)
    suite = Suite(BASE, ("rigl+vote",), (), seeds=(0,))
    summary = compare(suite, tmp_path / "runs", console=quiet, stored=stored)
    assert summary["arms"] == {} and summary["unfinished"] == [] and not (tmp_path / "runs" / "rigl+vote").exists()
    summary = compare(replace(suite, seeds=(0, 1)), tmp_path / "runs", console=quiet, stored=stored, minutes=1e-9)
    assert summary["unfinished"] == ["rigl+vote/seed1"]
    with pytest.raises(TrainingError, match=r"batch_size"):
        compare(replace(suite, config=replace(BASE, batch_size=64)), tmp_path / "runs", console=quiet, stored=stored)


@pytest.mark.parametrize("name", ["fashion", "colour", "cifar-cpu", "at-99"])
def test_the_published_pages_are_what_their_stored_runs_say(tmp_path, name):
    docs = Path(__file__).parents[1] / "docs" / "evidence"
    shutil.copy(docs / f"{name}.json", tmp_path)
    write_study(tmp_path / f"{name}.json", tmp_path)
    for file in (f"{name}.md", f"{name}.json", f"{name}.csv"):
        assert (tmp_path / file).read_text() == (docs / file).read_text()


def test_a_study_without_runs(tmp_path):
    with pytest.raises(TrainingError, match=r"Expected finished runs"):
        read_study(tmp_path)
