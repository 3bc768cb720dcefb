"""Errors that a user can mend. The scripts show these as their message, without a traceback."""

from signal import Signals


class FCNError(Exception):
    """An error that the user can mend: shown as its message, without a traceback."""

    def __str__(self) -> str:
        # A loader's process hands an error on as the text of its traceback: keep what it said.
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        return super().__str__().rpartition(name)[2].strip()


class DataError(FCNError):
    """Data on disk, or a download, is not what it must be; the message names the file and why."""


def reason(e: BaseException) -> str:
    """What went wrong in the fewest words, for the end of a message that says where."""
    cause = getattr(e, "reason", None)  # urllib's URLError wraps the real one
    if isinstance(cause, BaseException):
        return reason(cause)
    return (e.strerror if isinstance(e, OSError) else None) or str(e) or type(e).__name__


class WeightsError(FCNError):
    """Pretrained weights cannot be found, are unsafe to open, or do not fit the network."""


class ConfigError(FCNError, ValueError):
    """A setting cannot work; the message names the key, its value and what it must be."""


class TrainingError(FCNError):
    """Training cannot go on; the message says at which step and what to try."""


class WriteError(FCNError):
    """A file cannot be written; the message names it, why, and how much room there is."""


class Stopped(Exception):
    """The run was asked to stop by a signal; last.ckpt has its state."""

    def __init__(self, number: Signals, step: int) -> None:
        super().__init__(f"{number.name} at step {step}")
        self.exit_code = 128 + number
        self.step = step
