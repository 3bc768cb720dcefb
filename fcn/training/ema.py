"""An exponential moving average (EMA) of the weights.

python train.py callbacks=ema callbacks.ema.decay=0.99
"""

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from fcn.errors import check_number


class AveragedWeights(WeightAveraging):
    """Validates the average of the weights, and keeps it in checkpoints.

    Args:
        decay: share of the average that a step leaves as it is. After n steps it is at most
            (1 + n) / (10 + n), so that a short run, too, forgets its start.
    """

    def __init__(self, *, decay: float) -> None:
        check_number("decay", decay, 0, below=1)

        def mix(average: Tensor, current: Tensor, number: Tensor | int) -> Tensor:
            kept = torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
            return current.lerp(average, kept.to(average))

        # Buffers are no learned values: they are constants, and the counts of the validation.
        super().__init__(avg_fn=mix, use_buffers=False)
