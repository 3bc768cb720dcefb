"""The values of images and the range of them that a network sees as black to white.

    facts = {path: image_facts(path) for path in paths}      # see pictures.py
    problem = range_problem(facts, None)                     # such as 12 bits in 16; or None

The range belongs to the data set, never to a file: it is `data.dataset.value_range`, or the full
range of the type. A 16-bit copy of an 8-bit image therefore has the same pixels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fcn.errors import DataError, is_number, refuse

Range = Sequence[float]  # the values that become 0 and 255
FULL_RANGE = {"8-bit": (0, 255), "16-bit": (0, 65535), "float": (0, 1)}
# Where all values lie in less than this share of the full range, the range is set wrongly: 12 bits
# fill 6 % of 16, and 14 bits fill a quarter.
SMALL_SHARE = 1 / 3
RARE = 0.01  # this share of the lowest and of the highest pixels may be defects of a sensor
CLIPPED = 1 / 4  # a warning if more than this share of the pixels lies outside of a set range
TOLERANCE = 0.01  # of the range of floats: resizing goes a little beyond the values that there were


class RangeError(DataError):
    """An image has another type than the others, or values outside of the range that is set."""


class Facts(NamedTuple):
    """The type of an image's values, and the lowest and the highest of them."""

    type: str  # a key of FULL_RANGE
    lowest: float
    highest: float
    usual: tuple[float, float] | None = None  # the same without what `_usual` leaves out
    outside: float = 0.0  # the share of the pixels outside of data.dataset.value_range


def check_range(value_range: object) -> None:
    """Refuse what is no range of values.

    Raises:
        ConfigError: it is neither None nor two numbers, the lower one first.
    """
    numbers = value_range if isinstance(value_range, list | tuple) else ()
    valid = len(numbers) == 2 and all(map(is_number, numbers)) and numbers[0] < numbers[1]
    if value_range is not None and not valid:
        wanted = "null or two numbers [low, high], which become black and white"
        refuse("data.dataset.value_range", value_range, wanted)


def range_problem(facts: Mapping[Path, Facts], value_range: Range | None) -> str | None:
    """What is wrong with the values of a data set's images, and what to do; None: nothing.

    Args:
        facts: of all images, or of a sample of them.
        value_range: the setting `data.dataset.value_range`.
    """
    if not facts:
        return None
    first, found = next((path, fact.type) for path, fact in facts.items())
    others = [path for path, fact in facts.items() if fact.type != found]
    if others:
        return f"{_named(others)}: {mixed_types(facts[others[0]].type, str(first), found)}"
    wrong = [path for path, fact in facts.items() if misfit(fact, value_range)]
    # The median over the images ignores a few that differ from all others.
    usual = [fact.usual or (fact.lowest, fact.highest) for fact in facts.values()]
    lowest, highest = (float(value) for value in np.median(usual, axis=0))
    proposal = _proposal(list(facts.values()), (lowest, highest))
    if wrong:
        return f"{_named(wrong)}: {misfit(facts[wrong[0]], value_range)}; {proposal}"
    low, high = FULL_RANGE[found]
    images = f"{first}: " if len(facts) == 1 else f"{len(facts)} images beginning with {first}: "
    values = f"{images}their {found} values from {lowest:g} to {highest:g}"
    if value_range is not None and (lowest >= value_range[1] or highest <= value_range[0]):
        setting = f"data.dataset.value_range={_written(value_range)}"
        return f"{values} all lie outside of {setting}; {proposal}"
    share = (highest - lowest) / (high - low)
    if value_range is None and found != "8-bit" and share < SMALL_SHARE:
        return (
            f"{values} fill only {share:.0%} of the range from {low} to {high}, so that the "
            f"network would see hardly any contrast; {proposal}, and {_written((low, high))} "
            "leaves them as they are"
        )
    return None


def _named(paths: Sequence[Path]) -> str:
    """The first of some files, and how many there are."""
    more = f" and {len(paths) - 3} more images" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more


def clipping(facts: Mapping[Path, Facts], value_range: Range | None) -> str | None:
    """A warning if much of the images lies outside of a range that is set; None: it does not."""
    share = float(np.mean([fact.outside for fact in facts.values()])) if facts else 0.0
    if value_range is None or share <= CLIPPED:
        return None
    return (
        f"warning: {share:.0%} of the pixels of {len(facts)} images lie outside of "
        f"data.dataset.value_range={_written(value_range)} and become black or white"
    )


def measure(
    values: np.ndarray, found: str, value_range: Range | None = None, *, usual: bool = False
) -> Facts:
    """The lowest and highest of values (H, W) or (H, W, 3), without NaN and infinity.

    Args:
        values, found: the values and their type.
        value_range: the setting `data.dataset.value_range`.
        usual: whether to look for the usual values and those outside too, which takes longer.
    """
    if found == "float":
        values = values[np.isfinite(values)]
    if values.size == 0:  # nothing but NaN
        return Facts(found, 0, 0)
    facts = Facts(found, float(values.min()), float(values.max()))
    if not usual:
        return facts
    low, high = value_range or (facts.lowest, facts.highest)
    outside = float(np.mean((values < low) | (values > high)))
    return facts._replace(usual=_usual(values), outside=outside)


def _usual(values: np.ndarray) -> tuple[float, float]:
    """The lowest and highest value without those that need not belong to the picture.

    First, all pixels with exactly the lowest or the highest value are left out, which may be "no
    data", a border, or text in the picture. Of the others, the RARE lowest and highest are.
    """
    inner = values[(values > values.min()) & (values < values.max())]
    if inner.size < values.size / 10:  # as in black and white pictures
        inner = values.ravel()
    low = np.quantile(inner, RARE, method="lower")
    return float(low), float(np.quantile(inner, 1 - RARE, method="higher"))


def mixed_types(found: str, first: str, expected: str | None) -> str:
    """What is wrong with an image of another type than the first one."""
    return f"this image is {found}, but {first} is {expected}; save all images in one type"


def misfit(facts: Facts, value_range: Range | None) -> str | None:
    """Why an image with these values cannot be read with this range; None: it can be."""
    if value_range is not None:
        low, high = value_range
        other = high - low < 2 or (facts.type == "8-bit" and (low < 0 or high > 255))
        if other and facts.type != "float":
            setting = f"data.dataset.value_range={_written(value_range)}"
            return f"{setting} is for images of another type, and these values are {facts.type}"
        return None
    low, high = FULL_RANGE[facts.type]
    slack = TOLERANCE if facts.type == "float" else 0
    if low - slack <= facts.lowest <= facts.highest <= high + slack:
        return None
    return (
        f"{facts.type} values from {facts.lowest:g} to {facts.highest:g} exceed the range from "
        f"{low} to {high}"
    )


def _proposal(facts: Sequence[Facts], usual: tuple[float, float]) -> str:
    """Advice with a range for these values: that of 8, 10, 12, ... bits if they fill it, or else
    from 0 or from the lowest value to the highest."""
    found, (low, high) = facts[0].type, usual
    if found == "8-bit":
        return "data.dataset.value_range=null is for 8-bit images"
    ends = min(fact.lowest for fact in facts), max(fact.highest for fact in facts)
    reach = (high - low) / 2 or math.inf  # nothing can be said if there is a single value
    near = [abs(end - value) <= reach for end, value in zip(ends, usual, strict=True)]
    lowest, highest = (e if n else u for e, u, n in zip(ends, usual, near, strict=True))
    known = (255, 1023, 4095, 16383, 65535) if found == "16-bit" else (1, 255, 65535)
    tops = [*(float(top) for top in known if highest <= top), highest]
    filled = [top for top in tops if lowest >= 0 and highest - lowest >= SMALL_SHARE * top]
    best: Range = (0, filled[0]) if filled else (lowest, highest)
    if lowest == highest:  # no range can spread them, but one below 0 need not become black
        best = (0, tops[0]) if lowest >= 0 else (2 * lowest, 0)
    text = f"data.dataset.value_range={_written(best)} spreads them from black to white"
    if not all(near):
        far = ends[near.index(False)]
        text += f" ({far:g} is far from the others: if it is no data, this makes it black or white)"
    return text


def _written(value_range: Range) -> str:
    """A range as it is written on the command line."""
    return f"[{value_range[0]:.7g},{value_range[1]:.7g}]"
