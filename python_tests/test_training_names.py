"""Names of modules: old ones in a checkout, and what may import what."""

import pytest

pytest.importorskip("typer")

import importlib
import subprocess
import sys
from pathlib import Path

import uasparse_kernels


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training.data", "uasparse_kernels.training.data"),
        ("training.errors", "uasparse_kernels.training.errors"),
        ("training.unknowns", "uasparse_kernels.unknowns"),
        ("training.vote", "uasparse_kernels.unknowns.vote"),
        ("training.scores", "uasparse_kernels.unknowns.scores"),
        ("training.suites", "uasparse_kernels.training.study.suites"),
        ("training.study.suites", "uasparse_kernels.training.study.suites"),
        ("training.study_report", "uasparse_kernels.training.study.report"),
    ],
)
def test_old_names_are_the_same_modules(old, new):
    module = importlib.import_module(new)
    assert importlib.import_module(old) is module
    assert module.__spec__.name == module.__name__ == new


def test_what_never_was_a_module_is_none():
    with pytest.raises(ModuleNotFoundError, match=r"training\.nothing"):
        importlib.import_module("training.nothing")


def test_the_command_of_a_checkout():
    done = subprocess.run([sys.executable, "-m", "training", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "compare" in done.stdout and "report-study" in done.stdout


def test_imports_point_one_way():
    """The study may use the training, and the training `unknowns`, but not the other way round."""
    root = Path(uasparse_kernels.__file__).parent
    below = [*(root / "unknowns").glob("*.py")], [*(root / "training").glob("*.py")]
    for files, above in zip(below, ("uasparse_kernels.training", "uasparse_kernels.training.study"), strict=True):
        assert files
        found = [file.name for file in files if above in file.read_text()]
        assert set(found) <= {"__main__.py", "demo.py"}, found
