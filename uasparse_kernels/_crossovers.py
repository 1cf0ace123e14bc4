"""The file of measured crossovers: by device, the densities up to which its sparse kernels are faster than dense."""

from __future__ import annotations

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


def path() -> Path:
    """The file, in the platform's folder for caches."""
    home = Path.home()
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    elif sys.platform == "darwin":
        folder = home / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return folder / "uasparse_kernels" / "crossovers.json"


def load(device: str) -> Table | None:
    """The table of a device, None where it was never measured. A file that cannot be read counts as none, and warns."""
    return _read().get(device)


def save(device: str, table: Table) -> Path:
    """Keeps a device's table beside the others'; the file is replaced as a whole."""
    file, devices = path(), _read() | {device: table}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as new:
        json.dump({"format": _FORMAT, "devices": devices}, new, indent=1)
    os.replace(new.name, file)
    for listener in _listeners:
        listener()
    return file


def on_change(listener: Callable[[], None]) -> None:
    """Has ``listener`` called when a table was saved."""
    _listeners.append(listener)


def _read() -> dict[str, Table]:
    try:
        content = json.loads(path().read_text())
        if content["format"] == _FORMAT:
            return dict(content["devices"])
        reason = f"format {content['format']}, expected {_FORMAT}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = repr(error)
    warnings.warn(
        f"uasparse_kernels: {path()} is not used ({reason}); run uasparse_kernels.tune() to write it anew.",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}
