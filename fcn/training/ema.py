"""An exponential moving average (EMA) of the weights.

python train.py callbacks=ema callbacks.ema.decay=0.99
"""

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from fcn.errors import check_number


class AveragedWeights(WeightAveraging):
    """Validates the average of the weights instead of the weights, and stores it in checkpoints.

    Args:
        decay: after each step, average = decay * average + (1 - decay) * weights. Early in a run a
            smaller factor is used, (1 + n) / (10 + n) after n steps, so that the first, random
            weights do not stay in the average of a short run.

    Raises:
        ConfigError: `decay` is not a number of at least 0 and below 1.
    """

    def __init__(self, *, decay: float) -> None:
        check_number("decay", decay, 0, below=1)

        def mix(average: Tensor, current: Tensor, number: Tensor | int) -> Tensor:
            kept = torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
            return current.lerp(average, kept.to(average))

        # Buffers are not learned: they hold constants and the pixel counts of the validation.
        super().__init__(avg_fn=mix, use_buffers=False)
