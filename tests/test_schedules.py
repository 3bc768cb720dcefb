"""Learning rates, step by step, against their formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from fcn.errors import ConfigError
from fcn.schedules import constant, cosine, poly

POLY = [(1 - step / 8) ** 0.9 for step in range(8)]
COSINE = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
BY_TIME = {"total_steps": math.inf, "time_limit": 8}
WARM_UP = [0.2, 0.4, 0.6, 0.8]


def rates(
    make: Callable[..., LambdaLR], steps: int, time_limit: float = math.inf, **options: object
) -> list[float]:
    """The rate that each optimizer step uses; a step takes one unit of time."""
    used: list[float] = []
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups)
    options = {"total_steps": steps, "time_used": lambda: len(used) / time_limit} | options
    schedule = make(optimizer, **options)
    for _ in range(steps):
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert high == pytest.approx(10 * low)  # groups keep their ratio
        used.append(low)
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize(
    ("make", "options", "wanted"),
    [
        (constant, {}, [1.0] * 5),
        (poly, {}, POLY),
        (poly, {"power": 2.0}, [1.0, 0.5625, 0.25, 0.0625]),
        (cosine, {}, COSINE),
        (cosine, {"final": 0.2}, [0.2 + 0.8 * value for value in COSINE]),
        # The first step of a warm-up learns too; the decay takes what is left of the steps.
        (constant, {"warmup_steps": 4}, [*WARM_UP, 1.0, 1.0]),
        (poly, {"warmup_steps": 4}, [*WARM_UP, *POLY]),
        (cosine, {"warmup_steps": 4}, [*WARM_UP, *COSINE]),
        (poly, {"warmup_steps": 9}, [0.1, 0.2, 0.3]),  # longer than the run
        # A run may go on for longer than planned; a negative base would give complex numbers.
        (poly, {"total_steps": 8}, [*POLY, 0.0, 0.0]),
        (cosine, {"total_steps": 2, "final": 0.3}, [1.0, 0.65, 0.3, 0.3]),
        # The time is up after 8 steps, of 16 planned or of any number.
        (poly, {"total_steps": 16, "time_limit": 8}, POLY),
        (poly, BY_TIME, POLY),
        (constant, BY_TIME | {"warmup_steps": 1}, [0.5, 1.0, 1.0]),
    ],
)
def test_rates(
    make: Callable[..., LambdaLR], options: dict[str, float], wanted: list[float]
) -> None:
    assert rates(make, len(wanted), **options) == pytest.approx(wanted)


def test_constant_rates_ask_for_no_time() -> None:
    """With DDP, each time the processes would have to agree on it."""
    asked: list[int] = []
    assert rates(constant, 3, time_used=lambda: float(asked.append(1) or 0)) == [1.0] * 3
    assert asked == []


def test_bad_arguments() -> None:
    for make, wrong in (
        (poly, {"power": 0}),
        (cosine, {"final": 1.5}),
        (cosine, {"final": -0.1}),
        (constant, {"warmup_steps": -5}),
    ):
        with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))}=.*: must be "):
            rates(make, 3, **wrong)
