"""The file of measured crossovers: by device, the densities up to which its sparse kernels are faster than dense."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of one device: nested by op and what else the choice depends on, densities at the leaves.
Table = dict[str, Any]

_FORMAT = 1
_listeners: list[Callable[[], None]] = []
_unsaved: dict[str, Table] = {}  # measured by this process, which could not write them


def path() -> Path:
    """The file, in the platform's folder for caches. Raises RuntimeError where the user has no home."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "uasparse_kernels" / "crossovers.json"


def load(device: str, like: Table | None = None, *, partial: bool = False) -> Table | None:
    """The table of a device, None where it was never measured.

    A table is used as a whole or not at all: of numbers from 0 to 1, nested as ``like`` and with its keys (with some of
    them if ``partial``). A file that cannot be read, or holds another table, counts as none, and warns once.
    """
    table = _unsaved.get(device)
    if table is None:
        table = _read().get(device)
    if table is None or like is None or _is_table(table, like, partial):
        return table
    _warn(_name(), f"its table of {device} is damaged or of another version")
    return None


def save(device: str, table: Table) -> Path | None:
    """Keeps a device's table beside the others'; the file is replaced as a whole.

    Where it cannot be written, which warns, the table serves this process alone; None is returned then.
    """
    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"format": _FORMAT, "devices": _read() | _unsaved | {device: table}}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
            try:
                new.write(content)
                new.flush()
                os.replace(new.name, file)
            except OSError:
                os.unlink(new.name)
                raise
        _unsaved.clear()
    except (OSError, RuntimeError) as error:
        file = None
        _unsaved[device] = table
        warnings.warn(
            f"uasparse_kernels: the measured crossovers hold for this process only; they could not be stored: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
    for listener in _listeners:
        listener()
    return file


def on_change(listener: Callable[[], None]) -> None:
    """Has ``listener`` called when a table was saved."""
    _listeners.append(listener)


def _read() -> dict[str, Any]:
    """What the file says of each device, as it is."""
    try:
        file = path()
        if not file.is_file():
            return {}
        content = json.loads(file.read_text())
        if content["format"] == _FORMAT and isinstance(content["devices"], dict):
            return content["devices"]
        reason = f"format {content['format']}, expected {_FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: no home; nested too deep
        reason = repr(error)
    _warn(_name(), reason)
    return {}


def _is_table(found: Any, like: Any, partial: bool) -> bool:
    if isinstance(like, dict) and isinstance(found, dict):
        shared = like.keys() & found.keys()
        return (partial or shared == like.keys()) and all(_is_table(found[k], like[k], partial) for k in shared)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return is_number and not isinstance(like, dict) and 0 <= found <= 1


def _name() -> str:
    try:
        return str(path())
    except RuntimeError:
        return "the file of measured crossovers"


@functools.lru_cache  # of a file a reason is told once
def _warn(file: str, reason: str) -> None:
    warnings.warn(
        f"uasparse_kernels: {file} is not used ({reason}); run uasparse_kernels.tune() to write it again.",
        RuntimeWarning,
        stacklevel=2,
    )
