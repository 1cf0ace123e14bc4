"""The examples run as they are, with their small settings, and get somewhere."""

import re
import runpy
import shutil
import subprocess
import sys

import pages
import pytest

from uasparse_kernels import _library
from uasparse_kernels.topology import METHODS

EXAMPLES = pages.ROOT / "examples"
# What an example must print: the least that its figures, in order of appearance, may be.
LEAST = {
    "resnet": {"test accuracy: (.*)": 0.2},
    "fine_tune": {
        "dense: accuracy (.*)": 0.6,
        "90 % at once, fine-tuned: accuracy (.*)": 0.6,
        "step by step: accuracy (.*),": 0.5,
    },
    "vit": {"test accuracy: (.*),": 0.3, "served: same (.)": None},
    "bert_trainer": {"test accuracy: (.*)": 0.6, "sparsity of its matrices (.*)": 0.5},
    "lightning_fit": {"after two epochs: test accuracy (.*)": 0.5, "after two more: test accuracy (.*)": 0.6},
    "unknown_images": {"test accuracy: (.*); ": 0.5, "(.*) of 20 triangles": 1},
    "own_method": {"rigl: test accuracy (.*) with": 0.5, "first-order: test accuracy (.*) with": 0.5},
    "ddp": {"test accuracy: (.*)": 0.4},
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part"),
]


def check(name, printed):
    for pattern, least in LEAST[name].items():
        found = re.search(pattern, printed)
        assert found, f"{name} prints no {pattern!r}:\n{printed}"
        assert least is None or float(found[1]) >= least, printed


@pytest.mark.parametrize("name", [name for name in LEAST if name != "ddp"])
def test_an_example_runs(name, tmp_path, monkeypatch, capfd):
    if name == "unknown_images":
        pytest.importorskip("pytorch_ood")
    monkeypatch.setitem(METHODS, "first-order", None)  # taken out again afterwards
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    check(name, capfd.readouterr().out)


def test_ddp_runs(tmp_path):
    torchrun = shutil.which("torchrun", path=str(pages.Path(sys.executable).parent))
    command = [torchrun, "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "ddp.py"), "--small"]
    for _ in range(3):  # see processes.py: the end of Python, with or without this package
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    check("ddp", done.stdout)


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == LEAST.keys() | {"data"}
