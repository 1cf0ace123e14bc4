"""Errors that the command line shows as one message, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(Exception):
    """Something the user can repair: what was expected, what came, what to do."""


class DataError(TrainingError):
    """A data set that is missing, corrupt, or not of the expected form."""


class CheckpointError(TrainingError):
    """A checkpoint that is missing, damaged, or of another run."""


class OutOfTimeError(TrainingError):
    """The time given to a run is over; its last checkpoint is there to go on from."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite. `step` is the first optimiser step (from 0) at which it did."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@contextmanager
def told() -> Iterator[None]:
    """Turns what the library says against the user's settings into a TrainingError."""
    try:
        yield
    except ValueError as error:
        raise TrainingError(str(error)) from error
