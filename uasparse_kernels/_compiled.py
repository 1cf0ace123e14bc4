"""Finds the compiled ops (``torch.ops.uasparse``) that were built for the torch that is here.

torch's C++ interface changes from one minor version to the next, so a build serves one of them, and its file's name
says which: a package may hold several side by side, and one for another torch is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import pathlib
import re
import sys
import warnings
from types import ModuleType

import torch

PREFIX = "_C_torch"
NAME = PREFIX + "_".join(torch.__version__.split(".")[:2])
FOLDER = pathlib.Path(__file__).parent


def built_for(folder: pathlib.Path = FOLDER) -> list[str]:
    """The minor versions of torch, as "2.14", that the package in ``folder`` has compiled parts for."""
    found = {match[1] for file in folder.iterdir() if (match := re.match(PREFIX + r"(\d+_\d+)\.[^/]*so$", file.name))}
    return [version.replace("_", ".") for version in sorted(found, key=lambda v: [int(part) for part in v.split("_")])]


def digest_of(sources: pathlib.Path) -> str:
    """Of all C++ and CUDA sources; setup.py notes it beside a build that it leaves in the source folder."""
    whole = hashlib.sha256()
    for file in sorted(sources.rglob("*")):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh"):
            whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def load(name: str = NAME) -> ModuleType | None:
    """The compiled module; ``None``, with a warning, where none was built or it does not load. A warning also says that
    the sources have changed since it was built, as ``git pull`` changes them.

    Raises:
        ImportError: The package was built, but for other versions of torch.
    """
    try:
        module = importlib.import_module(f"uasparse_kernels.{name}")
        note, sources = FOLDER / f"{name}.digest", FOLDER.parent / "csrc"
        if note.is_file() and sources.is_dir() and note.read_text() != digest_of(sources):
            warnings.warn(
                f"uasparse_kernels: {sources} has changed since the compiled part was built. Build it again: "
                "pip install --no-build-isolation -e . in the source folder.",
                RuntimeWarning,
                stacklevel=2,
            )
        return module
    except ImportError as error:
        versions, wanted = built_for(), name.removeprefix(PREFIX).replace("_", ".")
        if versions and wanted not in versions:
            raise ImportError(
                f"uasparse_kernels was built for torch {' and '.join(versions)}, but torch {torch.__version__} is "
                f"installed: install torch {versions[-1]}, or build the package for this torch "
                "(pip install --no-build-isolation --no-deps --force-reinstall -e . in its source folder)."
            ) from None
        why, what = str(error), "Install the package with a C++ compiler present to build them."
        if other := _other_with(wanted):
            why = f"Python took {FOLDER}, which has none, before {other}, which has them"
            what = "Start Python in another folder, or install with -e (pip install --no-build-isolation -e .)."
        warnings.warn(
            f"uasparse_kernels: the compiled kernels could not be loaded ({why}); slow references in eager torch "
            f"serve instead. {what}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _other_with(version: str) -> pathlib.Path | None:
    """The package as it is installed with compiled parts, where Python found its sources first, as in their folder."""
    if built_for():
        return None
    folders = (pathlib.Path(entry, FOLDER.name) for entry in sys.path)
    return next((folder for folder in folders if folder.is_dir() and version in built_for(folder)), None)
