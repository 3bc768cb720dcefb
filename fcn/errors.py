"""Errors that a user can fix, and the checks of arguments that raise them.

The scripts show an `FCNError` as its message, without a traceback.

A constructor refuses a value that cannot work with a message that begins with "name=value", such as
"batch_size=0: must be a whole number from 1 up". Where the constructor was called for a group of
the configuration, `fcn.cli.build` puts the group in front: "data.batch_size=0: must be ...".
"""

import math
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import Any

LARGEST = 2**31 - 1  # the largest setting; torch and Lightning count in 32 bits in some places


class FCNError(Exception):
    """An error that the user can fix: shown as its message, without a traceback."""

    def __str__(self) -> str:
        # An error in a loader process reaches the main process as the text of a traceback. Only the
        # message at the end of that text is shown.
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        return super().__str__().rpartition(name)[2].strip()


class DataError(FCNError):
    """Data on disk, or a download, is missing or wrong; the message names the file and why."""


class WeightsError(FCNError):
    """Pretrained weights cannot be found, are unsafe to open, or do not fit the network."""


class ConfigError(FCNError, ValueError):
    """A setting cannot work; the message names the key, its value and what it must be."""


class DeviceError(FCNError):
    """torch cannot compute on a device; the message says what to install."""


class TrainingError(FCNError):
    """Training cannot go on; the message says at which step and what to try."""


class WriteError(FCNError):
    """A file cannot be written; the message names it, why, and how much room there is."""


class Stopped(Exception):
    """A signal asked the run to stop. last.ckpt has its state, so that it can be resumed."""

    def __init__(self, number: Signals, step: int) -> None:
        super().__init__(f"{number.name} at step {step}")
        self.exit_code = 128 + number


def reason(error: BaseException) -> str:
    """What went wrong in a few words, for the end of a message that names the place."""
    cause = getattr(error, "reason", None)  # urllib's URLError wraps the real error in this
    if isinstance(cause, BaseException):
        return reason(cause)
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__


def check_whole(
    name: str, value: Any, low: int = 0, high: int = LARGEST, *, optional: bool = False
) -> None:
    """Refuse what is not a whole number from `low` to `high`; None passes if `optional`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    limit = "up" if high == LARGEST and not (whole and value > high) else f"to {high}"
    valid = whole and low <= value <= high
    _check(name, value, valid, f"a whole number from {low} {limit}", optional)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Refuse what is not a finite number within the limits; None passes if `optional`.

    Args:
        low, high: limits that the number may be equal to.
        above, below: limits that it may not be equal to.
    """
    valid = is_number(value) and low <= value <= high
    valid = valid and (above is None or value > above) and (below is None or value < below)
    if math.isfinite(low) and math.isfinite(high):
        limits = [f"from {low:g} to {high:g}"]
    elif math.isfinite(low) and below is None:
        limits = [f"from {low:g} up"]
    else:
        words = (("of at least", low), ("above", above), ("at most", high), ("below", below))
        limits = [f"{w} {limit:g}" for w, limit in words if limit is not None and is_number(limit)]
    wanted = f"a number {' and '.join(limits)}".strip()
    _check(name, value, valid, wanted, optional)


def check_choice(name: str, value: Any, choices: Sequence[Any], *, optional: bool = False) -> None:
    """Refuse what is not equal to one of the choices; None passes if `optional`."""
    valid = any(type(value) is type(choice) and value == choice for choice in choices)
    _check(name, value, valid, f"one of {', '.join(map(shown, choices))}", optional)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    _check(name, value, isinstance(value, bool), "true or false", optional=False)


def check_text(name: str, value: Any, *, wanted: str = "a text", optional: bool = False) -> None:
    """Refuse what is neither a string with at least one visible character nor a path."""
    valid = isinstance(value, str | Path) and str(value).strip() != "" and "\0" not in str(value)
    _check(name, value, valid, wanted, optional)


def refuse(name: str, value: Any, wanted: str) -> None:
    """Refuse a value, with a message in the form that all these checks use.

    Raises:
        ConfigError: always.
    """
    quoted_number = isinstance(value, str) and re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", value)
    if quoted_number and "number" in wanted:
        wanted += ", but is a text; remove the quotes"
    raise ConfigError(f"{name}={shown(value)}: must be {wanted}")


def is_number(value: Any) -> bool:
    """Whether this is a finite int or float, and not True or False."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN; works for an int too large for a float


def _check(name: str, value: Any, valid: bool, wanted: str, optional: bool) -> None:
    if not valid and not (optional and value is None):
        refuse(name, value, f"null or {wanted}" if optional else wanted)


def shown(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def need_packages(*names: str, extra: str = "export") -> None:
    """Check that packages are installed which only some users need.

    Args:
        names: of the packages.
        extra: the file in requirements/ that lists them.

    Raises:
        ConfigError: one is not. The message says how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install -r requirements/{extra}.txt")
