"""Learning rates over optimizer steps: factors on each group's own rate, as a `LambdaLR`.

    schedule = poly(optimizer, total_steps=20000, power=0.9, warmup_steps=500)

A schedule ends with the run: at `total_steps` (infinite where only time is limited), or when
`time_used`, the fraction of `trainer.max_time` that has passed, reaches 1, whichever comes first.
The rate of a run that is given 15 minutes on a slow machine therefore falls within 15 minutes.

`conf/scheduler/*.yaml` hold the options. Their names and limits are the same for all schedules:
`warmup_steps`, a whole number from 0 up, is the number of steps over which the rate first rises
linearly. A value that cannot work raises a ConfigError, whose message begins with "name=value".
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fcn.errors import check_number, check_whole

Fraction = Callable[[], float]  # returns a number from 0 to 1


def no_limit() -> float:
    """The fraction of the time that has passed in a run without a limit of time: always 0."""
    return 0.0


def poly(
    optimizer: Optimizer,
    *,
    total_steps: float,
    time_used: Fraction = no_limit,
    power: float = 0.9,
    warmup_steps: int = 0,
) -> LambdaLR:
    """Decay as (1 - progress)^power, with a power above 0, as in DeepLab (Chen et al. 2016)."""
    check_number("power", power, above=0)

    def decay(progress: float) -> float:
        return (1 - progress) ** power

    return _schedule(optimizer, total_steps, time_used, warmup_steps, decay)


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: float,
    time_used: Fraction = no_limit,
    warmup_steps: int = 0,
    final: float = 0.0,
) -> LambdaLR:
    """Half a cosine, from the full rate down to `final` times it (Loshchilov and Hutter 2017).

    `final` is from 0 to 1.
    """
    check_number("final", final, 0, 1)

    def decay(progress: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return _schedule(optimizer, total_steps, time_used, warmup_steps, decay)


def constant(
    optimizer: Optimizer,
    *,
    total_steps: float,
    time_used: Fraction = no_limit,
    warmup_steps: int = 0,
) -> LambdaLR:
    """The same rate throughout, after an optional warm-up.

    It does not ask for the time that has passed: with DDP, the processes would have to agree on it
    in every step.
    """
    return _schedule(optimizer, total_steps, no_limit, warmup_steps, lambda progress: 1.0)


def _schedule(
    optimizer: Optimizer,
    total_steps: float,
    time_used: Fraction,
    warmup_steps: int,
    decay: Callable[[float], float],
) -> LambdaLR:
    """A warm-up, then `decay` of the progress (0 to 1) through what is left of the run."""
    check_whole("warmup_steps", warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)  # never 0, so that the first step learns too
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return decay(min(max(progress, time_used()), 1.0))

    return LambdaLR(optimizer, factor)
