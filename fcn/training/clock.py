"""When a run ends: after `trainer.max_steps` or `trainer.max_time`, whichever comes first.

python train.py trainer.max_steps=-1 trainer.max_time=00:01:30:00      # an hour and a half
"""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer


class Clock(Timer):
    """Lightning's timer, which here also counts the seconds of a run without a time limit.

    A run ends when an optimizer step is complete, since no checkpoint holds accumulated gradients,
    and then validates once more. `time_elapsed` includes the seconds before a resume.

    Args:
        duration: a text DD:HH:MM:SS, or a dict such as {"hours": 1, "minutes": 30}. None: no limit.
    """

    state_key = "Timer"  # so that checkpoints from before this class, with Lightning's timer, work

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Take the seconds from where checkpoints of earlier versions have them.

        Lightning calls `load_state_dict` after this, with the seconds of today's checkpoints.
        """
        seconds = checkpoint["callbacks"].get("LastCheckpoint", {}).get("seconds", 0)
        self.load_state_dict({"time_elapsed": {"train": seconds}})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if not completes_step(trainer):
            return
        super().on_train_batch_end(trainer)
        if trainer.global_step >= trainer.max_steps != -1:
            trainer.should_stop = True  # Lightning then validates once more


def completes_step(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just been trained on completes an optimizer step."""
    return (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
