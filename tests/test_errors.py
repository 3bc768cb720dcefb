"""The checks of arguments: what passes, and what the messages say."""

from signal import SIGTERM
from typing import Any
from urllib.error import URLError

import pytest

from fcn.errors import (
    ConfigError,
    DataError,
    FCNError,
    Stopped,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    is_number,
    reason,
    refuse,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [1, 3, 5])
def test_whole_numbers_that_pass(value: int) -> None:
    check_whole("steps", value, 1, 5)
    check_whole("steps", None, 1, 5, optional=True)


@pytest.mark.parametrize("value", [0, 6, True, 2.0, NAN, INF, "two", None, [2]])
def test_whole_numbers_that_do_not(value: Any) -> None:
    shown = "true" if value is True else "null" if value is None else value
    with pytest.raises(ConfigError) as caught:
        check_whole("steps", value, 1, 5)
    assert str(caught.value) == f"steps={shown}: must be a whole number from 1 to 5"


def test_limit_of_whole_numbers_is_named_where_it_matters() -> None:
    with pytest.raises(ConfigError, match=r"^n=0: must be a whole number from 1 up$"):
        check_whole("n", 0, 1)
    with pytest.raises(ConfigError, match=r"must be null or a whole number from 1 to 2147483647$"):
        check_whole("n", 2**31, 1, optional=True)


@pytest.mark.parametrize(
    ("value", "limits", "wanted"),
    [
        (-1, {"low": 0}, "a number from 0 up"),
        (1.5, {"low": 0, "high": 1}, "a number from 0 to 1"),
        (0, {"above": 0}, "a number above 0"),
        (1, {"low": 0, "below": 1}, "a number of at least 0 and below 1"),
        (9, {"above": 0, "high": 8}, "a number above 0 and at most 8"),
        (8, {"below": 8}, "a number below 8"),
        (0, {"above": 0, "optional": True}, "null or a number above 0"),
        (NAN, {}, "a number"),
        (INF, {"above": 0}, "a number above 0"),
        (10**400, {}, "a number"),
        (True, {}, "a number"),
        ("one", {}, "a number"),
        ("1e-4", {"above": 0}, "a number above 0, but is a text; remove the quotes"),
        (None, {}, "a number"),
        ([1], {}, "a number"),
    ],
)
def test_numbers_that_do_not_pass(value: Any, limits: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_number("rate", value, **limits)
    assert str(caught.value).startswith("rate=")
    assert str(caught.value).endswith(f": must be {wanted}")


def test_numbers_that_pass() -> None:
    for value in (0, 0.5, -1e300, 10**300):
        assert is_number(value)
        check_number("rate", value)
    check_number("rate", 0, 0, 1)
    check_number("rate", 1, 0, 1)
    check_number("rate", 0.999, 0, below=1)
    check_number("rate", None, above=0, optional=True)


def test_choices() -> None:
    check_choice("pool", "max", ("max", "avg"))
    check_choice("pool", None, ("max", "avg"), optional=True)
    for value in ("min", None, 1.0, True, ["max"]):  # 1.0 and True are equal to 1
        with pytest.raises(ConfigError, match=r"^pool=.*: must be one of max, null, 1, false$"):
            check_choice("pool", value, ("max", "null", 1, False))


def test_flags() -> None:
    check_flag("flip", True)
    check_flag("flip", False)
    for value in (0, 1, None, "yes"):
        with pytest.raises(ConfigError, match=r"^flip=.*: must be true or false$"):
            check_flag("flip", value)


def test_texts() -> None:
    check_text("root", " a b ")
    check_text("root", None, optional=True)
    for value in ("", " ", "a\0b", None, 3, True):
        with pytest.raises(ConfigError, match=r"^root=.*: must be the path of a folder$"):
            check_text("root", value, wanted="the path of a folder")


def test_refused_value_is_a_value_error() -> None:
    """So that code that does not know ours may catch it."""
    with pytest.raises(ValueError, match=r"^a=\[1, 2\]: must be three numbers$"):
        refuse("a", [1, 2], "three numbers")


def test_reason_is_short() -> None:
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == (
        "No such file or directory"
    )
    assert reason(URLError(OSError(-2, "Name or service not known"))) == "Name or service not known"
    assert reason(URLError("no host given")) == "<urlopen error no host given>"
    assert reason(TimeoutError("timed out")) == "timed out"
    assert reason(EOFError()) == "EOFError"


def test_error_of_a_worker_process_is_its_message() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nTraceback (most recent call last):\n"
    assert str(DataError(f"{text}fcn.errors.DataError: a.jpg is broken\n")) == "a.jpg is broken"
    assert str(FCNError("a: b")) == "a: b"


def test_exit_code_of_a_signal_is_the_shells() -> None:
    stopped = Stopped(SIGTERM, 7)
    assert (stopped.exit_code, str(stopped)) == (143, "SIGTERM at step 7")
