"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from training.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` on a temporary file and moves it to `path`. If that fails, the old file stays as it was.

    Raises CheckpointError for what the system reports (a full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        kept = f"; the old {path.name} is untouched" if path.exists() else ""
        raise CheckpointError(f"Could not write {path}: {error}{kept}. Free some space, then use --resume.") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint with weights_only=True (it can run no code). Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            f"Expected a checkpoint at {path}, found none. `fit` writes model.pt into its run folder."
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}. Restore it, or start again.") from error
    if not isinstance(state, dict) or "config" not in state:
        raise CheckpointError(f"{path} is no checkpoint of this program: expected a dict with 'config'.")
    return state


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Raises CheckpointError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
