"""export and predict: files that say all that it takes, the network's own answers, one message for what is wrong."""

import copy
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("pytorch_ood")

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.training import __main__ as cli
from uasparse_kernels.training import predict
from uasparse_kernels.training.config import FitConfig
from uasparse_kernels.training.errors import CheckpointError, DataError, TrainingError
from uasparse_kernels.training.evaluate import load_model, load_run
from uasparse_kernels.training.export import export_run
from uasparse_kernels.training.metrics import scaled_metrics
from uasparse_kernels.training.predict import About, load_export
from uasparse_kernels.training.run import fit
from uasparse_kernels.unknowns import scores

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part"),
]
SETTINGS = {"data": "digits", "epochs": 3, "loss": "ce", "vote": False, "limit_train": 700, "delta_t": 2}
UNKNOWNS = {"unknowns": "patch-shuffle", "unknown_grid": "2,0", "validation": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, without and with an output for unknown, the latter with images held out, and exported."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("plain", {"sparsity": 0.5}), ("unknown", UNKNOWNS)):
        fit(FitConfig(**SETTINGS, **more), folder / name, scores=["msp"], device="cpu", lean=True)
    export_run(folder / "unknown", onnx=False)
    return folder


@pytest.fixture
def exported(runs, tmp_path):
    """A copy of the export, to be damaged."""
    folder = tmp_path / "export"
    folder.mkdir()
    for file in (runs / "unknown" / "export").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def call(monkeypatch, capsys, *arguments):
    """Runs the command line in this process; returns its exit code, what it printed, and its errors."""
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize("name", ["plain", "unknown"])
def test_an_export_answers_as_the_network(runs, tmp_path, name):
    _, about = export_run(runs / name, tmp_path / "out", onnx=False)
    predictor = load_export(tmp_path / "out")
    assert predictor.about == about and about.score == ("u" if name == "unknown" else "energy")
    run = load_run(runs / name)
    test = run.data.test
    answers = predictor(test.images)
    with torch.no_grad():
        logits = run.model(run.normalise(test.images)).double()
    assert about.outputs == logits.shape[1] == 10 + (name == "unknown")
    torch.testing.assert_close(answers.label, logits[:, :10].argmax(1))
    expected = (logits / about.temperature).softmax(1)[:, :10].amax(1)
    torch.testing.assert_close(answers.confidence, expected, rtol=1e-4, atol=1e-5)
    assert about.accuracy == pytest.approx((answers.label == test.labels).double().mean().item())
    assert about.test_accepted == pytest.approx(1 - answers.unknown.double().mean().item())
    # As many of the known images as asked for, and not many more: of those held out, where there are any.
    tuned = test if name == "plain" else run.data.validation
    assert (about.tuned_on, about.tuned_images) == ("test" if name == "plain" else "validation", len(tuned))
    with torch.no_grad():
        logits = run.model(run.normalise(tuned.images)).double()
    assert about.temperature == pytest.approx(scaled_metrics(logits, tuned.labels)["temperature"], rel=1e-4)
    accepted = 1 - predictor(tuned.images).unknown.double().mean().item()
    assert 0.95 <= accepted <= 0.95 + 1 / len(tuned)
    weights = ua.load_sparse(copy.deepcopy(run.model), tmp_path / "out" / "weights.safetensors")
    torch.testing.assert_close(weights(run.normalise(test.images[:9])), run.model(run.normalise(test.images[:9])))


def test_scores_are_those_of_evaluation():
    logits, k = 3 * torch.randn(50, 11).double(), 10
    for name, score in predict.SCORES.items():
        judge = type("Judge", (), {"num_classes": k})()
        expected = scores.SCORES[name].make(judge)(scores.Outputs(logits, torch.zeros(50, 1)))
        torch.testing.assert_close(score(logits, k), expected.double(), rtol=1e-5, atol=1e-5)
    assert set(predict.NEED_UNKNOWN_OUTPUT) == {
        name for name in predict.SCORES if scores.SCORES[name].needs_unknown_output
    }


@pytest.mark.filterwarnings("ignore")
def test_the_onnx_file_runs_elsewhere(runs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_run(runs / "unknown", tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "network.onnx"), providers=["CPUExecutionProvider"])
    run = load_run(runs / "unknown")
    for batch in (1, 7):
        x = run.normalise(run.data.test.images[:batch])
        (got,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), run.model(x), rtol=1e-5, atol=1e-5)


def test_the_commands(runs, monkeypatch, capsys, tmp_path):
    code, out, _ = call(monkeypatch, capsys, "export", runs / "plain", "--no-onnx", "--score", "msp")
    assert code == 0 and "accepted as known by msp" in out and "the run kept no others" in out and "Written" in out
    predictor = load_export(runs / "plain")
    images = load_run(runs / "plain").data.test.images[:5]
    answers = predictor(images)
    # Grey, and the same in colour; lossy; turned to a larger size that the crop takes back.
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for index, image in enumerate(images[:, 0].numpy()):
        Image.fromarray(image).save(folder / f"{index}.png")
    Image.fromarray(images[0, 0].numpy()).convert("RGB").save(tmp_path / "colour.png")
    Image.fromarray(np.kron(images[1, 0].numpy(), np.ones((64, 64), np.uint8))).save(tmp_path / "large.jpg")
    Image.fromarray(images[2, 0].numpy()).save(folder / "below" / "deep.png")
    code, out, _ = call(
        monkeypatch,
        capsys,
        "predict",
        runs / "plain",
        folder,
        tmp_path / "colour.png",
        tmp_path / "large.jpg",
        "--json",
    )
    rows = json.loads(out)
    assert code == 0 and len(rows) == 8
    order = [0, 1, 2, 3, 4, 2, 0]  # the folder's files in order, then the colour one
    for row, index in zip(rows, order, strict=False):
        assert row["class"] == predictor.about.classes[answers.label[index]]
        assert row["confidence"] == pytest.approx(answers.confidence[index].item(), abs=1e-6)
        assert row["unknown"] == answers.unknown[index].item()
    assert rows[-1]["class"] == predictor.about.classes[answers.label[1]] and rows[-1]["file"].endswith("large.jpg")
    code, out, _ = call(monkeypatch, capsys, "predict", runs / "plain" / "export", folder / "0.png")
    assert code == 0
    assert out.split("\t")[:3] == [str(folder / "0.png"), rows[0]["class"], f"{rows[0]['confidence']:.3f}"] or (
        out.rstrip("\n").split("\t")[:2] == [str(folder / "0.png"), rows[0]["class"]]
    )


def test_the_serving_page_on_a_trained_run(runs, monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "plain", "runs/fit")
    photos = load_run(runs / "plain").data.test.images[:3]
    Path("photos").mkdir()
    for name in ("photos/a.png", "photo.jpg"):
        Image.fromarray(photos[0, 0].numpy()).save(name)
    namespace = {"photos": photos}
    for language, code in dict(pages.sections("docs/serving.md"))["A trained run"]:
        if language == "sh":
            for line in code.splitlines():
                python, _, training, *arguments = shlex.split(line, comments=True)
                assert (python, training) == ("python", "training")
                code, out, error = call(monkeypatch, capsys, *arguments)
                assert code == 0, error
            assert [line.split("\t")[0] for line in out.splitlines()] == ["photos/a.png", "photo.jpg"]
        else:
            pages.run([(language, code)], namespace, tmp_path, None)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_errors_of_predict_are_one_message(exported, runs, monkeypatch, capsys, tmp_path):
    good = tmp_path / "good.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(good)
    cut, text, huge = tmp_path / "cut.png", tmp_path / "text.jpg", tmp_path / "huge.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    text.write_text("no image")
    Image.new("1", (9000, 9000)).save(huge)
    (tmp_path / "empty").mkdir()
    for run, image, message in [
        (exported, cut, f"{cut} is no readable image"),
        (exported, text, f"{text} is no readable image"),
        (exported, huge, "9000x9000 pixels; expected at most"),
        (exported, tmp_path / "nothing.png", "found none"),
        (exported, tmp_path / "empty", "No images below"),
        (runs / "nothing", good, "`python -m training export RUN` writes it"),
        (tmp_path / "empty", good, "`python -m training export RUN` writes it"),
    ]:
        code, out, error = call(monkeypatch, capsys, "predict", run, good, image)
        assert code == 1 and error.startswith("error: ") and message in error and "Traceback" not in error + out
        assert error.count("\n") == 1 and not out
    predictor = load_export(exported)
    assert predictor.files([str(good)]) == predictor.files([good])
    for odd in (good, str(good)):
        with pytest.raises(DataError, match=r"Expected a list of paths, got one: pass \['"):
            predictor.files(odd)
    with pytest.raises(DataError, match="Expected images as a tensor, got a list"):
        predictor([[0]])


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: a.update(format="uasparse_kernels export 0"),
        lambda a: a.pop("mean"),
        lambda a: a.update(more=1),
        lambda a: a.update(classes=["one"]),
        lambda a: a.update(classes=[1] * 10),
        lambda a: a.update(classes=None),
        lambda a: a.update(in_channels=3),
        lambda a: a.update(in_channels="1"),
        lambda a: a.update(image_size=9),
        lambda a: a.update(image_size=8.0),
        lambda a: a.update(mean=[0.1, 0.2]),
        lambda a: a.update(std=[0.0]),
        lambda a: a.update(std=[float("nan")]),
        lambda a: a.update(outputs=10),
        lambda a: a.update(outputs=12),
        lambda a: a.update(temperature=0),
        lambda a: a.update(temperature=float("inf")),
        lambda a: a.update(score="knn"),
        lambda a: a.update(score=["u"]),
        lambda a: a.update(threshold="1"),
        lambda a: a.update(tuned_on="training"),
        lambda a: a.update(tuned_images=True),
        lambda a: a.update(test_images=0),
        lambda a: a.update(test_accepted=2),
        lambda a: a.update(network="0" * 64),
    ],
    ids=range(25),
)
def test_what_an_export_says_is_checked(exported, edit):
    about = json.loads((exported / "export.json").read_text())
    edit(about)
    (exported / "export.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"Export the run again|damaged"):
        load_export(exported)


def test_damaged_exports_are_refused(exported):
    whole = {name: (exported / name).read_bytes() for name in ("export.json", "optimized.safetensors")}
    for name, data in [
        ("export.json", b"[" * 100_000),
        ("export.json", b"[]"),
        ("export.json", whole["export.json"][:-9]),
        ("export.json", b"\xff" + whole["export.json"]),
        ("optimized.safetensors", whole["optimized.safetensors"][:-1]),
        ("optimized.safetensors", b""),
        ("optimized.safetensors", None),
    ]:
        (exported / name).unlink() if data is None else (exported / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            load_export(exported)
        (exported / name).write_bytes(whole[name])
    predictor = load_export(exported)
    for images in [
        torch.zeros(2, 1, 8, 9, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 1, 8, 8),
    ]:
        with pytest.raises(DataError, match=r"Expected images of uint8 \[N, 1, 8, 8\], got"):
            predictor(images)


def test_what_cannot_be_exported(runs, monkeypatch, capsys, tmp_path):
    with pytest.raises(TrainingError, match="Expected a score of msp, maxlogit, energy, entropy for a network of 10"):
        export_run(runs / "plain", tmp_path / "out", score="u")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="found none"):
        load_export(tmp_path / "out")
    export_run(runs / "plain", tmp_path / "out", onnx=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TrainingError, match="pip install onnx onnxscript, or give --no-onnx"):
        export_run(runs / "plain", tmp_path / "out")
    load_export(tmp_path / "out")  # as it was
    (tmp_path / "file").write_text("")
    code, _, error = call(monkeypatch, capsys, "export", runs / "plain", "--no-onnx", "--out", tmp_path / "file")
    assert code == 1 and "Give another folder" in error
    code, _, error = call(monkeypatch, capsys, "export", tmp_path / "nothing")
    assert code == 1 and "Expected a checkpoint at" in error and "Traceback" not in error


def test_an_export_needs_neither_data_nor_the_packages_of_training(exported):
    program = (
        "import sys\nfor name in 'torchvision pytorch_ood sklearn typer PIL rich'.split(): sys.modules[name] = None\n"
    )
    program += "import torch\nfrom uasparse_kernels.training.predict import load_export\n"
    program += "print(load_export(sys.argv[1])(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).label.tolist())"
    done = subprocess.run([sys.executable, "-c", program, exported], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    expected = load_export(exported)(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)).label.tolist()
    assert json.loads(done.stdout) == expected


def test_about_is_read_as_written(tmp_path, runs):
    about = About.read(runs / "unknown" / "export" / "export.json")
    (tmp_path / "export.json").write_text(json.dumps(about.to_json()))
    assert About.read(tmp_path / "export.json") == about
    assert about.classes == tuple(load_model(runs / "unknown")[2]["classes"])
