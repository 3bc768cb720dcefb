"""Learning rates over optimizer steps: factors on each group's own rate, as `LambdaLR`.

`total_steps` may be infinite, for a run that ends by time: nothing decays then.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def poly(
    optimizer: Optimizer, *, total_steps: float, power: float = 0.9, warmup_steps: int = 0
) -> LambdaLR:
    """Decay as (1 - progress)^power, as in DeepLab (Chen et al. 2016)."""
    return _schedule(optimizer, total_steps, warmup_steps, lambda progress: (1 - progress) ** power)


def cosine(
    optimizer: Optimizer, *, total_steps: float, warmup_steps: int = 0, final: float = 0.0
) -> LambdaLR:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017)."""

    def decay(progress: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return _schedule(optimizer, total_steps, warmup_steps, decay)


def constant(optimizer: Optimizer, *, total_steps: float, warmup_steps: int = 0) -> LambdaLR:
    """The same rate throughout, after an optional warm-up."""
    return _schedule(optimizer, total_steps, warmup_steps, lambda progress: 1.0)


def _schedule(
    optimizer: Optimizer, total_steps: float, warmup_steps: int, decay: Callable[[float], float]
) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup_steps:  # linear, and never a first step of rate 0
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return decay(min(progress, 1.0))

    return LambdaLR(optimizer, factor)
