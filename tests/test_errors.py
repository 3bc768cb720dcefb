"""The checks of arguments: what passes, and what the messages say."""

from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM
from typing import Any
from urllib.error import URLError

import pytest

from fcn import errors
from fcn.errors import check_choice, check_flag, check_number, check_text, check_whole

NAN, INF = float("nan"), float("inf")
FIVE = {"low": 1, "high": 5}
NOT_WHOLE = [0, 6, True, 2.0, NAN, INF, "two", None, [2]]  # or not within five
CHOICES = {"choices": ("max", "null", 1, False)}


def test_what_passes() -> None:
    for value in (1, 3, 5):
        check_whole("steps", value, 1, 5)
    for number in (0, 0.5, -1e300, 10**300):
        check_number("rate", number)
    for number in (0, 1):
        check_number("rate", number, 0, 1)
    check_number("rate", 0.999, 0, below=1)
    check_choice("pool", "max", **CHOICES)
    check_flag("flip", True)
    check_flag("flip", False)
    check_text("root", " a b ")
    check_text("root", Path("a"))
    for check, options in ((check_whole, FIVE), (check_number, {"above": 0}), (check_text, {})):
        check("a", None, optional=True, **options)
    check_choice("pool", None, ("max",), optional=True)


@pytest.mark.parametrize(
    ("check", "values", "options", "wanted"),
    [
        (check_whole, NOT_WHOLE, FIVE, "a whole number from 1 to 5"),
        # The limit is named where it matters.
        (check_whole, [0], {"low": 1}, "a whole number from 1 up"),
        (check_whole, [2**31], {"optional": True}, "null or a whole number from 0 to 2147483647"),
        (check_number, [NAN, INF, 10**400, True, "one", None, [1]], {}, "a number"),
        (check_number, [-1], {"low": 0}, "a number from 0 up"),
        (check_number, [1.5], {"low": 0, "high": 1}, "a number from 0 to 1"),
        (check_number, [0, INF], {"above": 0}, "a number above 0"),
        (check_number, [1], {"low": 0, "below": 1}, "a number of at least 0 and below 1"),
        (check_number, [9], {"above": 0, "high": 8}, "a number above 0 and at most 8"),
        (check_number, [8], {"below": 8}, "a number below 8"),
        (check_number, [0], {"above": 0, "optional": True}, "null or a number above 0"),
        (check_number, ["1e-4"], {}, "a number, but is a text; remove the quotes"),
        # 1.0 and True are equal to 1.
        (check_choice, ["min", None, 1.0, True, ["max"]], CHOICES, "one of max, null, 1, false"),
        (check_flag, [0, 1, None, "yes"], {}, "true or false"),
        (check_text, ["", " ", "a\0b", None, 3, True], {"wanted": "a path"}, "a path"),
        (errors.refuse, [[1, 2]], {"wanted": "three numbers"}, "three numbers"),
    ],
)
def test_what_is_refused(
    check: Callable[..., None], values: list[Any], options: dict[str, Any], wanted: str
) -> None:
    """The error is a ValueError too, so that code that does not know ours may catch it."""
    for value in values:
        shown = "true" if value is True else "null" if value is None else value
        with pytest.raises(ValueError, match="must be") as caught:
            check("a.b", value, **options)
        assert isinstance(caught.value, errors.ConfigError)
        assert str(caught.value) == f"a.b={shown}: must be {wanted}"


def test_reason_is_short() -> None:
    missing = FileNotFoundError(2, "No such file or directory", "x")
    for error, expected in (
        (missing, "No such file or directory"),
        (URLError(missing), "No such file or directory"),
        (URLError("no host given"), "<urlopen error no host given>"),
        (TimeoutError("timed out"), "timed out"),
        (EOFError(), "EOFError"),
    ):
        assert errors.reason(error) == expected


def test_error_of_a_worker_process_is_its_message() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nTraceback (most recent call last):\n"
    error = errors.DataError(f"{text}fcn.errors.DataError: a.jpg is broken\n")
    assert str(error) == "a.jpg is broken"
    assert str(errors.FCNError("a: b")) == "a: b"


def test_exit_code_of_a_signal_is_the_shells() -> None:
    stopped = errors.Stopped(SIGTERM, 7)
    assert (stopped.exit_code, str(stopped)) == (143, "SIGTERM at step 7")
