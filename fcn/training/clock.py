"""When a run ends: after `trainer.max_steps` or `trainer.max_time`, whichever comes first."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer


class Clock(Timer):
    """Lightning's timer, which also counts the seconds of a run without a time limit.

    A run ends after a whole optimizer step, since no checkpoint holds accumulated gradients, and
    with a validation.

    Args:
        max_time: DD:HH:MM:SS, or a table of hours, minutes and so on; None: no limit.
    """

    state_key = "Timer"  # of runs that had Lightning's own timer

    def __init__(self, max_time: str | dict[str, int] | None) -> None:
        super().__init__(duration=max_time)

    @property
    def seconds(self) -> float:
        """Of training and validation, before and since the run was resumed."""
        return self.time_elapsed()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the seconds that runs of earlier versions kept elsewhere."""
        seconds = checkpoint["callbacks"].get("LastCheckpoint", {}).get("seconds", 0)
        self.load_state_dict({"time_elapsed": {"train": seconds}})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if not is_whole_step(trainer):
            return
        super().on_train_batch_end(trainer)
        if trainer.global_step >= trainer.max_steps != -1:
            trainer.should_stop = True  # Lightning then validates once more


def is_whole_step(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just been trained on completes an optimizer step."""
    return (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
