"""Old names of modules in a checkout."""

import pytest

pytest.importorskip("typer")

import importlib
import subprocess
import sys


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training.data", "uasparse_kernels.training.data"),
        ("training.errors", "uasparse_kernels.training.errors"),
        ("training.unknowns", "uasparse_kernels.unknowns"),
        ("training.vote", "uasparse_kernels.unknowns.vote"),
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
    assert done.returncode == 0 and "report-study" in done.stdout
