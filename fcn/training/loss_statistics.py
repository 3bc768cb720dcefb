"""Statistics of the loss for each optimizer step, which make a noisy loss readable.

python train.py callbacks.loss_statistics.half_life=50 callbacks.loss_statistics.window=100
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.errors import TrainingError, check_number, check_whole
from fcn.training.clock import completes_step
from fcn.training.in_backward import SGDInBackward


class LossStatistics(Callback):
    """Logs the loss of each optimizer step, and what smooths it.

    With one to three images in a batch, the loss of a step may be twice or half that of the step
    before. So people read `train/loss_smooth`. For each optimizer step this logs `train/loss` (the
    mean over the accumulated batches), `train/loss_smooth`, `train/loss_mean` and `train/loss_std`
    (over a window of steps), `train/grad_norm` (before clipping), `train/lr` (without the
    multipliers of parameter groups) and `train/images_per_second`.

    To read a number from a GPU, Python has to wait for it. So losses stay on their device until
    `trainer.log_every_n_steps` steps can be read and logged together.

    Args:
        half_life: steps after which a loss has half its weight in the smoothed loss, which is an
            exponential mean without bias towards its start.
        window: steps that the mean and the standard deviation are taken over.

    Raises:
        ConfigError: an argument is out of its range.
        TrainingError: a loss, or the norm of the gradients, is NaN or Inf. It is raised when that
            step is read. In 16-mixed only the loss is checked.
    """

    def __init__(self, *, half_life: float = 50, window: int = 100) -> None:
        check_number("half_life", half_life, above=0)
        check_whole("window", window, 1)
        self.decay = 0.5 ** (1 / half_life)
        self.total, self.weight = 0.0, 0.0  # their quotient is the exponential mean
        self.window: deque[float] = deque(maxlen=window)
        self.batch_losses: list[Tensor] = []  # one for each accumulated batch of this step
        self.unread: list[tuple[int, float, Tensor, Tensor]] = []  # step, lr, loss, gradient norm
        self.images, self.since = 0, 0.0  # images since that time, in seconds, for the speed

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        # Reading all steps first completes the statistics, and raises an error if the loss has
        # diverged. So no checkpoint is made of a diverged network.
        self.read()
        return {"total": self.total, "weight": self.weight, "window": list(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.weight = state_dict["total"], state_dict["weight"]
        self.window.extend(state_dict["window"])

    @property
    def smooth(self) -> float:
        """The exponential mean of all losses that have been read."""
        return self.total / self.weight if self.weight else math.nan

    def on_train_start(self, *_: Any) -> None:
        self.images, self.since = 0, time.perf_counter()

    def on_validation_start(self, *_: Any) -> None:
        self.read()  # while the time since the last reading is training time

    def on_validation_end(self, *_: Any) -> None:
        self.images, self.since = 0, time.perf_counter()  # validation is not training time

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        if isinstance(optimizer, SGDInBackward):  # it has freed the gradients
            self.grad_norm = optimizer.gradient_norm()
        else:
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.lr = groups[0]["lr"] / groups[0]["lr_multiplier"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the loss of a batch; after the last batch of an optimizer step, that of the step."""
        # Lightning has divided each loss by the number of accumulated batches: their sum is a mean.
        self.batch_losses.append(outputs["loss"].detach())
        self.images += len(batch["image"]) * trainer.world_size
        if not completes_step(trainer):
            return
        loss = torch.stack(self.batch_losses).sum()
        self.unread.append((trainer.global_step, self.lr, loss, self.grad_norm))
        self.batch_losses = []
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.read()

    def on_train_end(self, *_: Any) -> None:
        self.read()

    def read(self) -> None:
        """Take the unread steps from the device, and send a row for each to every logger."""
        if not self.unread:
            return
        trainer, unread, self.unread = self.trainer, self.unread, []
        numbers = torch.stack([torch.stack((loss, norm)).float() for _, _, loss, norm in unread])
        numbers = trainer.strategy.reduce(numbers, reduce_op="mean")  # over the processes
        # In 16-mixed, the loss is multiplied by a scale that grows until gradients become Inf. The
        # optimizer leaves out such a step, and the scale is reduced. This is no error.
        fp16 = trainer.precision == "16-mixed"
        now = time.perf_counter()
        speed = self.images / (now - self.since)
        self.images, self.since = 0, now
        for (step, lr, _, _), (loss, norm) in zip(unread, numbers.tolist(), strict=True):
            if not math.isfinite(loss) or not (fp16 or math.isfinite(norm)):
                raise TrainingError(_diverged(trainer, step, loss, norm))
            self.total = self.decay * self.total + (1 - self.decay) * loss
            self.weight = self.decay * self.weight + (1 - self.decay)
            self.window.append(loss)
            metrics = {
                "train/loss": loss,
                "train/loss_smooth": self.smooth,
                "train/loss_mean": float(np.mean(self.window)),
                "train/loss_std": float(np.std(self.window)),
                "train/grad_norm": norm,
                "train/lr": lr,
                "train/images_per_second": speed,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)


def _diverged(trainer: pl.Trainer, step: int, loss: float, norm: float) -> str:
    """The message about a diverged loss: the step, the last good checkpoint, and what to try."""
    run = Path(trainer.default_root_dir)
    checkpoints = (last_checkpoint(run), best_checkpoint(run))
    good = next((str(path) for path in checkpoints if path.exists()), "none was made yet")
    return (
        f"step {step}: loss {loss}, gradient norm {norm}. The last good checkpoint: {good}. "
        "Try a lower optimizer.lr, trainer.gradient_clip_val=1, scheduler.warmup_steps=500, or "
        "trainer.precision=32-true."
    )
