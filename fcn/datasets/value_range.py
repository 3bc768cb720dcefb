"""The values of images and the range of them that a network sees as black to white.

    facts = {path: image_facts(path) for path in paths}      # see pictures.py
    problem = range_problem(facts, None)                     # such as 12 bits in 16; or None

The range belongs to the data set, never to a file: it is `data.dataset.value_range`, or the full
range of the type. A 16-bit copy of an 8-bit image therefore has the same pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fcn.errors import is_number, refuse

Range = Sequence[float]  # the values that become 0 and 255
FULL_RANGE = {"8-bit": (0, 255), "16-bit": (0, 65535), "float": (0, 1)}
# Where all values lie in less than this share of the full range, the range is set wrongly: 12 bits
# fill 6 % of 16, and 14 bits fill a quarter.
SMALL_SHARE = 1 / 3
RARE = 0.001  # this share of the lowest and of the highest pixels may be defects of a sensor
TOLERANCE = 0.01  # of the range of floats: resizing goes a little beyond the values that there were


class Facts(NamedTuple):
    """The type of an image's values, and the lowest and the highest of them."""

    type: str  # a key of FULL_RANGE
    lowest: float
    highest: float
    usual: tuple[float, float] | None = None  # lowest and highest without the RARE pixels

    @property
    def without_rare(self) -> tuple[float, float]:
        """The lowest and highest value, without the rare ones if these were counted."""
        return self.usual or (self.lowest, self.highest)


def check_range(value_range: object) -> None:
    """Refuse what is no range of values.

    Raises:
        ConfigError: it is neither None nor two numbers, the lower one first.
    """
    numbers = value_range if isinstance(value_range, list | tuple) else ()
    right = len(numbers) == 2 and all(map(is_number, numbers)) and numbers[0] < numbers[1]
    if value_range is not None and not right:
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
    for path, fact in facts.items():
        if fact.type != found:
            return f"{path}: {mixed_types(fact.type, str(first), found)}"
    together = Facts(
        found,
        min(fact.lowest for fact in facts.values()),
        max(fact.highest for fact in facts.values()),
        (
            min(fact.without_rare[0] for fact in facts.values()),
            max(fact.without_rare[1] for fact in facts.values()),
        ),
    )
    lowest, highest = together.without_rare
    images = f"{first}: " if len(facts) == 1 else f"{len(facts)} images beginning with {first}: "
    problem = misfit(together, value_range)
    low, high = FULL_RANGE[found]
    outside = value_range is not None and (lowest >= value_range[1] or highest <= value_range[0])
    if not problem and value_range is not None and outside:
        problem = (
            f"their {found} values from {lowest:g} to {highest:g} all lie outside of "
            f"data.dataset.value_range={_written(value_range)}; {_proposal(together)}"
        )
    share = (highest - lowest) / (high - low)
    if not problem and value_range is None and found != "8-bit" and share < SMALL_SHARE:
        problem = (
            f"their {found} values from {lowest:g} to {highest:g} fill only {share:.0%} of the "
            f"range from {low} to {high}, so that the network would see hardly any contrast; "
            f"{_proposal(together)}, and {_written((low, high))} leaves them as they are"
        )
    return images + problem if problem else None


def measure(values: np.ndarray, found: str, *, usual: bool = False) -> Facts:
    """The lowest and highest of values (H, W) or (H, W, 3), without NaN and infinity.

    Args:
        values, found: the values and their type.
        usual: whether to look for these without the RARE pixels too, which takes longer.
    """
    if found == "float":
        values = values[np.isfinite(values)]
    if values.size == 0:  # nothing but NaN
        return Facts(found, 0, 0)
    facts = Facts(found, float(values.min()), float(values.max()))
    if not usual:
        return facts
    low = np.quantile(values, RARE, method="lower")
    return facts._replace(usual=(low, np.quantile(values, 1 - RARE, method="higher")))


def mixed_types(found: str, first: str, expected: str | None) -> str:
    """What is wrong with an image of another type than the first one."""
    return f"this image is {found}, but {first} is {expected}; save all images in one type"


def misfit(facts: Facts, value_range: Range | None) -> str | None:
    """Why images with these values cannot be read with this range; None: they can be."""
    if value_range is not None:
        low, high = value_range
        other = low < 0 or high > 255 if facts.type == "8-bit" else high - low <= 1
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
        f"{low} to {high}; {_proposal(facts)}"
    )


def _proposal(facts: Facts) -> str:
    """Advice with a range for these values: that of 8, 10, 12, ... bits if they fill it, or else
    from 0 or from the lowest value to the highest."""
    found, (lowest, highest) = facts.type, facts.without_rare
    known = (255, 1023, 4095, 16383, 65535) if found == "16-bit" else (1, 255, 65535)
    tops = [*(float(top) for top in known if highest <= top), highest]
    filled = [top for top in tops if lowest >= 0 and highest - lowest >= SMALL_SHARE * top]
    best: Range = (0, filled[0]) if filled else (lowest, highest)
    if lowest == highest:  # nothing can be said of a single value
        best = (0, tops[0])
    return f"data.dataset.value_range={_written(best)} spreads them from black to white"


def _written(value_range: Range) -> str:
    """A range as it is written on the command line."""
    return f"[{value_range[0]:.7g},{value_range[1]:.7g}]"
