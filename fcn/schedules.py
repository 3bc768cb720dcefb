"""Learning rates over optimizer steps: factors on each group's own rate, as `LambdaLR`.

A schedule ends with the run: at `total_steps` (infinite where only time is limited), or when
`time_used` (the share of `trainer.max_time` that has passed) reaches 1, whichever is nearer. So a
run that is given 15 minutes on a slow machine has its rate lowered in 15 minutes.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Share = Callable[[], float]  # 0 to 1


def no_limit() -> float:
    """No time is used where none is limited."""
    return 0.0


def poly(
    optimizer: Optimizer,
    *,
    total_steps: float,
    time_used: Share = no_limit,
    power: float = 0.9,
    warmup_steps: int = 0,
) -> LambdaLR:
    """Decay as (1 - progress)^power, as in DeepLab (Chen et al. 2016)."""
    return _schedule(
        optimizer, total_steps, time_used, warmup_steps, lambda progress: (1 - progress) ** power
    )


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: float,
    time_used: Share = no_limit,
    warmup_steps: int = 0,
    final: float = 0.0,
) -> LambdaLR:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017)."""

    def decay(progress: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return _schedule(optimizer, total_steps, time_used, warmup_steps, decay)


def constant(
    optimizer: Optimizer, *, total_steps: float, time_used: Share = no_limit, warmup_steps: int = 0
) -> LambdaLR:
    """The same rate throughout, after an optional warm-up."""
    return _schedule(optimizer, total_steps, time_used, warmup_steps, lambda progress: 1.0)


def _schedule(
    optimizer: Optimizer,
    total_steps: float,
    time_used: Share,
    warmup_steps: int,
    decay: Callable[[float], float],
) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:  # linear, and never a first step of rate 0
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return decay(min(max(progress, time_used()), 1.0))

    return LambdaLR(optimizer, factor)
