"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from uasparse_kernels.training.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("uasparse_kernels.training")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` on a temporary file and moves it to `path`. If that fails, the old file stays as it was.

    Raises CheckpointError for what the system reports (a full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see sweep
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        kept = f"; the old {path.name} is untouched" if os.path.exists(path) else ""
        raise CheckpointError(
            f"Could not write {path}: {error}{kept}. Free some space, or give a folder that can be written; a run goes "
            "on with --resume."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Removes what `write_atomically` left in a folder when its process was killed. No other may be writing there."""
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", file.name):
            with contextlib.suppress(OSError):
                file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps it for this process: CheckpointError if another has it, or it cannot be made.

    The lock ends with the process, however that ends. A file system without locks gives none.
    """
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_locked(file)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder} is in use by the process {_content(file)}: wait for its end, or give another folder."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot use {folder} as a folder of runs: {error}. Give another.") from error
    with lock:
        sweep(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()  # while it is still locked


def _open_locked(file: Path) -> IO[str]:
    while True:
        lock = file.open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise
        except OSError:  # a file system without locks
            log.warning("%s cannot be locked: do not start a second run in its folder", file)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                break
        lock.close()  # the run that held it has just ended and removed the file: try again
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _content(file: Path) -> str:
    try:
        return file.read_text() or "?"
    except OSError:
        return "?"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values, which `load_checkpoint` reads."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint with weights_only=True (it can run no code). CheckpointError for a single flipped bit, too."""
    if not path.is_file():
        raise CheckpointError(
            f"Expected a checkpoint at {path}, found none. `fit` writes model.pt into its run folder."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:  # torch does not look at the checksums
                raise zipfile.BadZipFile(f"wrong checksum of {member}")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}. Restore it, or start again.") from error
    if not isinstance(state, dict) or "config" not in state:
        raise CheckpointError(f"{path} is no checkpoint of this program: expected a dict with 'config'.")
    return state


def write_json(path: Path, value: Any) -> None:
    """Writes plain values as JSON, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Raises CheckpointError if the file is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error


def check_form(found: Any, expected: Any, where: str = "", *, exact: bool = False, free: Sequence[str] = ()) -> None:
    """Raises CheckpointError, saying where, unless `found` has the form of `expected`.

    The same keys, lengths and types; tensors of the same dtype and as many dimensions (sizes change with a pattern;
    what loads them compares those); with `exact` the same plain values. Keys in `free` may hold anything.
    """
    if type(found) is not type(expected) and not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        raise CheckpointError(f"{where}: expected a {type(expected).__name__}, got {_shown(found)}")
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            differing = ", ".join(sorted(map(str, found.keys() ^ expected.keys())))
            raise CheckpointError(f"{where}: missing or unexpected: {differing}")
        for key, value in expected.items():
            if key not in free:
                check_form(found[key], value, f"{where}.{key}".lstrip("."), exact=exact, free=free)
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            raise CheckpointError(f"{where}: expected {len(expected)} values, got {len(found)}")
        for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            check_form(mine, theirs, f"{where}[{index}]", exact=exact, free=free)
    elif isinstance(expected, Tensor):
        if (found.dtype, found.dim(), found.layout) != (expected.dtype, expected.dim(), expected.layout):
            raise CheckpointError(f"{where}: expected {_shown(expected)}, got {_shown(found)}")
    elif exact and found != expected:
        raise CheckpointError(f"{where}: expected {expected!r}, got {found!r}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"{value!r:.80}"
