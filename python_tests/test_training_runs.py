"""Runs that are stopped, killed, doubled, damaged, or cannot write: one message, and nothing good is lost."""

import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
from rich.console import Console

from uasparse_kernels.training import report
from uasparse_kernels.training import run as run_module
from uasparse_kernels.training.checkpoint import load_checkpoint, locked, save_checkpoint
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test
from uasparse_kernels.training.errors import CheckpointError, NonFiniteLossError, TrainingError
from uasparse_kernels.training.evaluate import load_model, read_results
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.training.run import fit
from uasparse_kernels.training.study.compare import _Worker, compare
from uasparse_kernels.training.study.suites import Suite

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Console(quiet=True)
TINY = FitConfig(data="digits", model="mlp", epochs=3, delta_t=1, batch_size=64, limit_train=256, loss="ce", vote=False)
VOTING = replace(TINY, vote=True, vote_fraction=0.3, stop_fraction=0.5)


@pytest.fixture(scope="module")
def digits():
    return load_train_test("digits", limit_train=256)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw_run", lambda *_: [])


def run(config, folder, data, **options):
    return fit(config, folder, device="cpu", console=QUIET, data=data, scores=["msp"], **options)


# --- what is not finite is not kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["rigl", "rigl+vote"])
@pytest.mark.parametrize("bad_step", [5, 7, 11])  # in an epoch, in the last step of one, in the last of all
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, digits, monkeypatch, arm, bad_step, value):
    config = replace(with_arm(VOTING, arm), epochs=3)
    update = Trainer._update_weights

    def overflow(trainer):
        """The loss was finite, its gradient is not."""
        if trainer.step == bad_step:
            next(trainer.model.parameters()).grad.view(-1)[0] = value
        update(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update_weights", overflow)
        with pytest.raises(NonFiniteLossError, match=r"NaN or infinite.*in another folder: --resume goes on") as error:
            run(config, tmp_path, digits)
    last = tmp_path / "last.pt"
    state = load_checkpoint(last)
    assert state["epoch"] == bad_step // 4 and f"after epoch {state['epoch']}, is {last}" in str(error.value)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not (tmp_path / "model.pt").exists() and not (tmp_path / "results.json").exists()
    run(config, tmp_path, digits, resume=True)  # without the overflow it goes on from there
    assert (tmp_path / "results.json").is_file()


# --- one run a folder, and it is this one ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "results.json", "metrics.jsonl", "model.pt"])
def test_resume_compares_the_settings_whatever_is_missing(tmp_path, digits, missing):
    run(TINY, tmp_path, digits)
    (tmp_path / missing).unlink()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"last.pt is of a run with other settings: .*seed: 0 and 1"):
        run(replace(TINY, seed=1), tmp_path, digits, resume=True)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / ".lock").exists()
    run(TINY, tmp_path, digits, resume=True)
    assert (tmp_path / missing).exists()


def test_metrics_are_written_anew_from_the_checkpoint(tmp_path, digits):
    run(TINY, tmp_path, digits)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # killed between the two files
    run(TINY, tmp_path, digits, resume=True)
    assert file.read_text() == whole and len(whole.splitlines()) == 3


def test_a_second_run_in_a_folder_is_refused(tmp_path, digits):
    holder = "from uasparse_kernels.training.checkpoint import locked\nfrom pathlib import Path\n"
    holder += f"with locked(Path({str(tmp_path)!r})):"
    process = subprocess.Popen([sys.executable, "-c", holder + " print(0, flush=True), input()"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    try:
        process.stdout.readline()
        for start in (lambda: run(TINY, tmp_path, digits), lambda: compare(suite(1), tmp_path, console=QUIET)):
            with pytest.raises(CheckpointError, match=rf"is in use by the process {process.pid}"):
                start()
        assert not (tmp_path / "last.pt").exists()
    finally:
        process.kill()
        process.communicate()
    (tmp_path / f".last.pt.{process.pid}.tmp").write_bytes(b"half")  # what a kill leaves
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    run(TINY, tmp_path, digits)  # the lock went with its process
    hidden = [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert hidden == [".mine.tmp"]


def test_two_threads_are_two_runs(tmp_path):
    with locked(tmp_path):
        with pytest.raises(CheckpointError, match=rf"in use by the process {os.getpid()}"), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one leaves it
    with locked(tmp_path):
        pass


# --- what cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["file", "file/below", "x" * 300, "loop/x", "results/" + "y/" * 2500])
def test_folders_that_cannot_be(tmp_path, digits, odd):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for start in (run, lambda _, folder, __: compare(suite(1), folder, console=QUIET)):
        with pytest.raises(CheckpointError, match=r"Cannot use .* as a folder of runs"):
            start(TINY, tmp_path / odd, digits)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "last.pt", "metrics.jsonl", "model.pt", "scores.npz", "results.json"])
def test_a_file_that_cannot_be_written_is_one_message(tmp_path, digits, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").touch()
    with pytest.raises((CheckpointError, TrainingError), match=rf"Could not write .*{name}|holds a run already"):
        run(TINY, tmp_path, digits)


def test_a_log_that_cannot_be_written_is_one_message(tmp_path, digits):
    (tmp_path / "fit.log").mkdir()
    with pytest.raises(CheckpointError, match=r"Cannot write .*fit.log"):
        run(TINY, tmp_path, digits)


def test_a_figure_on_a_full_disk_is_one_message(tmp_path):
    figure = report.training_curves(
        [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.5, "lr": 0.1}]
    )
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(CheckpointError, match=r"Could not write .*a.png.*too large"):
            report.save_figure(figure, tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("finished")
    run(VOTING, folder, digits)
    return folder


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("name", ["last.pt", "model.pt"])
def test_a_flipped_bit_is_noticed(finished, tmp_path, name):
    whole, state = (finished / name).read_bytes(), load_checkpoint(finished / name)
    generator, refused = torch.Generator().manual_seed(0), 0
    for place in torch.randint(8 * len(whole), (150,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / name).write_bytes(damaged)
        try:
            assert same(load_checkpoint(tmp_path / name), state)  # in a date, or padding
        except CheckpointError as error:
            refused += name in str(error)
    assert refused > 100


WRONG = (None, "x", -1, 10**9, 0.5, math.nan, [], [1], {}, {"x": 1}, True, torch.ones(3), torch.ones(2, 2).long())


def places(state, path=()):
    """Paths of all values in nested dicts and lists; of the weights of a kind the first."""
    yield path
    items = list(state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ())
    for key, value in items[:3] if len(items) > 12 and path[-1:] != ("config",) else items:
        yield from places(value, (*path, key))


def changed(state, path, value):
    if not path:
        return value
    copy = dict(state) if isinstance(state, dict) else list(state)
    if value is KeyError and len(path) == 1:
        del copy[path[0]]
        return copy
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def test_replaced_fields_of_a_network_are_refused(finished, tmp_path):
    """Each of another type, missing, or in addition: one message, or (a name of a class, say) a network that runs."""
    state, count = load_checkpoint(finished / "model.pt"), 0
    for path in list(places(state))[1:]:
        if path[0] == "config" and len(path) > 1:
            continue  # below
        for value in (*WRONG, KeyError):
            save_checkpoint(tmp_path / "model.pt", changed(state, path, value))
            try:
                model, *_ = load_model(tmp_path)
                model(torch.zeros(2, 1, 8, 8))
            except CheckpointError:
                count += 1
    assert count > 200


def test_replaced_fields_of_a_checkpoint_are_refused(finished, digits, monkeypatch):
    state, count = load_checkpoint(finished / "last.pt"), 0
    trainer = Trainer(VOTING, digits)
    for path in list(places(state))[1:]:
        if path[0] == "config" and len(path) > 1:
            continue
        for value in (*WRONG, KeyError):
            damaged = changed(state, path, value)
            monkeypatch.setattr(run_module, "load_checkpoint", lambda _, damaged=damaged: damaged)
            try:
                if "config" not in damaged:
                    raise CheckpointError("load_checkpoint says so")
                loaded = run_module._check_folder(VOTING, finished, True)
                trainer.load_state_dict(loaded)
            except CheckpointError:
                count += 1
    assert count > 300
    trainer.load_state_dict(state)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "1", "null", '"x"', "{", "[" * 100_000, '{"epochs": "3"}', '{"epochs": null}', '{"sparsity": [1]}',
     '{"seed": 1.5}', '{"vote": 1}', '{"unknown": 1}', '{"block": 1}', '{"lr_max": NaN}'],
)  # fmt: skip
def test_a_config_of_wrong_types_is_refused(finished, tmp_path, digits, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        run(VOTING, tmp_path, digits, resume=True)


@pytest.mark.parametrize("path", [("config",), ("known", "accuracy"), ("unknown",), ("cost", "memory_bytes"), ()])
@pytest.mark.parametrize("value", [None, "x", [], [1], {"x": 1}])
def test_damaged_results_are_refused(finished, tmp_path, path, value):
    results = json.loads((finished / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(changed(results, path, value)))
    with pytest.raises(CheckpointError, match=r"results.json"):
        read_results(tmp_path / "results.json")


# --- workers --------------------------------------------------------------------------------------------------------


def suite(runs, epochs=1):
    config = replace(TINY, epochs=epochs)
    return Suite(config, ("rigl",), (), tuple(range(runs)), scores=("msp",), lean=True)


def test_a_lost_worker_is_one_failure_and_the_rest_goes_on(tmp_path):
    """Of three runs on two workers, the first to begin is killed."""
    killed = []

    def kill():
        for _ in range(6000):  # two minutes: a worker's imports take long on a busy machine
            begun = sorted(tmp_path.glob("*/*/.lock"))
            if begun and (pid := begun[0].read_text()):
                killed.append(begun[0].parent.name)
                os.kill(int(pid), signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    summary = compare(suite(3, epochs=15), tmp_path, device="cpu", console=QUIET, jobs=2)
    thread.join()
    assert len(killed) == 1 and len(summary["failed"]) == 1
    assert summary["failed"][0].startswith(f"rigl/{killed[0]}: Its process was lost (signal 9)")
    assert len(summary["arms"]["rigl"]["seeds"]) == 2 and summary["unfinished"] == []
    assert multiprocessing.active_children() == []


def test_a_worker_leaves_an_interrupt_to_its_parent():
    """The terminal sends it to both: while a worker imports, it would print where it was."""
    worker = _Worker()
    try:
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        blocked = int(re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)[1], 16)
        assert blocked >> (signal.SIGINT - 1) & 1
    finally:
        worker.end()


@pytest.mark.parametrize("how", [signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, how):
    arguments = [
        "compare",
        "--data",
        "digits",
        "--model",
        "mlp",
        "--epochs",
        "100000",
        "--delta-t",
        "1",
        "--arm",
        "rigl",
    ]
    arguments += ["--limit-train", "256", "--seeds", "2", "--jobs", "2", "--device", "cpu", "--out", str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-m", "training", *arguments], stdout=subprocess.DEVNULL)
    try:
        workers = {}
        end = time.monotonic() + 60
        while len(workers) < 2 and time.monotonic() < end:
            workers = {file: file.read_text() for file in tmp_path.glob("*/*/.lock")}
            time.sleep(0.05)
        pids = [int(pid) for pid in workers.values() if pid]
    finally:
        parent.send_signal(how)
        parent.wait()
    assert len(pids) == 2
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(is_running, pids)):
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
