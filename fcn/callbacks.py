"""What happens around training steps: statistics, an average, a progress bar, a score table."""

import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar, WeightAveraging
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fcn.errors import TrainingError
from fcn.module import SegmentationModule
from fcn.runs import best_checkpoint, last_checkpoint
from fcn.visualize import one_line

Outputs = Mapping[str, Any]


class LossStatistics(Callback):
    """Makes a jagged loss readable: a row of statistics for each optimizer step.

    A batch of one to three images gives a loss that jumps by its own size: people read
    `train/loss_smooth`. Logged for each optimizer step: `train/loss` (mean over the accumulated
    batches), `train/loss_smooth`, `train/loss_mean` and `train/loss_std` (over a window of steps),
    `train/grad_norm` (before clipping), `train/lr` (without multipliers) and
    `train/images_per_second`.

    Losses stay on their device, and the device is not waited for, until
    `trainer.log_every_n_steps` steps are read and logged in one go.

    Args:
        half_life: steps after which a loss counts half in the smoothed loss, an exponential mean
            without bias towards its start.
        window: steps in the mean and standard deviation.

    Raises:
        TrainingError: at the first loss or gradient that is NaN or Inf.
    """

    def __init__(self, *, half_life: float = 50, window: int = 100) -> None:
        self.decay = 0.5 ** (1 / half_life)
        self.total, self.weight = 0.0, 0.0  # of the exponential mean
        self.window: deque[float] = deque(maxlen=window)
        self.batch_losses: list[Tensor] = []  # of the accumulated batches of this step
        self.unread: list[tuple[int, float, Tensor, Tensor]] = []  # step, lr, loss, gradient norm
        self.images, self.since = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        self.read()  # a checkpoint has all losses, and is not made of a diverged network
        return {"total": self.total, "weight": self.weight, "window": list(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.weight = state_dict["total"], state_dict["weight"]
        self.window.extend(state_dict["window"])

    @property
    def smooth(self) -> float:
        """The exponential mean of all losses that have been read."""
        return self.total / self.weight if self.weight else math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.images, self.since = 0, time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.images, self.since = 0, time.perf_counter()  # validation is not training time

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.lr = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["lr_multiplier"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        self.batch_losses.append(outputs["loss"].detach())  # Lightning has divided: they add up
        self.images += len(batch["image"]) * trainer.world_size
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = torch.stack(self.batch_losses).sum()
        self.unread.append((trainer.global_step, self.lr, loss, self.grad_norm))
        self.batch_losses = []
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.read()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read()

    def read(self) -> None:
        """Take the unread steps from the device, and send a row for each to every logger."""
        if not self.unread:
            return
        trainer, unread, self.unread = self.trainer, self.unread, []
        numbers = torch.stack([torch.stack((loss, norm)).float() for _, _, loss, norm in unread])
        numbers = trainer.strategy.reduce(numbers, reduce_op="mean")  # each process has its part
        fp16 = trainer.precision == "16-mixed"  # its loss scaler probes for Inf gradients itself
        now = time.perf_counter()
        speed = self.images / (now - self.since)
        self.images, self.since = 0, now
        for (step, lr, _, _), (loss, norm) in zip(unread, numbers.tolist(), strict=True):
            if not math.isfinite(loss) or not (fp16 or math.isfinite(norm)):
                raise TrainingError(_diverged(trainer, step, loss, norm))
            self.total = self.decay * self.total + (1 - self.decay) * loss
            self.weight = self.decay * self.weight + (1 - self.decay)
            self.window.append(loss)
            mean = math.fsum(self.window) / len(self.window)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in self.window) / len(self.window))
            metrics = {
                "train/loss": loss,
                "train/loss_smooth": self.smooth,
                "train/loss_mean": mean,
                "train/loss_std": spread,
                "train/grad_norm": norm,
                "train/lr": lr,
                "train/images_per_second": speed,
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)


class AveragedWeights(WeightAveraging):
    """An exponential moving average of the weights: what is validated, and kept in checkpoints.

    Args:
        decay: share of the average that a step leaves as it is; from 0.18 up to this in the first
            steps, (1 + n) / (10 + n) after n of them, so that a short run forgets its start too.
    """

    def __init__(self, *, decay: float) -> None:
        def mix(average: Tensor, current: Tensor, number: Tensor | int) -> Tensor:
            kept = torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
            return current.lerp(average, kept.to(average))

        # buffers are constants, or counts of the validation that the average is not made of
        super().__init__(avg_fn=mix, use_buffers=False)


class ProgressBar(RichProgressBar):
    """Lightning's, over optimizer steps of the whole run, with smoothed loss and val mIoU."""

    @property
    def total_train_batches(self) -> int | float:
        if self.trainer.max_steps == -1:
            return math.inf
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Training':{len(self.validation_description)}}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Numbers that are known: Lightning's own would wait for the device at every step."""
        metrics: dict[str, Any] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LossStatistics):
                metrics["loss"] = callback.smooth
        if isinstance(pl_module, SegmentationModule) and pl_module.scores is not None:
            metrics["val mIoU"] = pl_module.scores["miou"]
        return metrics


class ScoreTable(Callback):
    """A line at each validation, and the table of classes at the end."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        print(
            f"step {trainer.global_step}: val loss {values['val/loss']:.4f}, "
            f"mIoU {values['val/miou']:.4f}, pixel accuracy {values['val/pixel_acc']:.4f}",
            flush=True,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, SegmentationModule)
        if trainer.is_global_zero and pl_module.scores is not None:
            print_scores(pl_module.scores, pl_module.class_names)


def print_scores(scores: Mapping[str, Any], class_names: list[str]) -> None:
    """The four metrics and the IoU of every class, in percent as papers print them."""
    table = Table(title="IoU by class, %")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, iou in zip(class_names, scores["iou"], strict=True):
        table.add_row(Text(one_line(name, 60)), "absent" if math.isnan(iou) else f"{100 * iou:.1f}")
    table.add_section()
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou"):
        table.add_row(name, f"{100 * scores[name]:.2f}")
    Console().print(table)


def _diverged(trainer: pl.Trainer, step: int, loss: float, norm: float) -> str:
    checkpoints = [last_checkpoint, best_checkpoint]
    run = Path(trainer.default_root_dir)
    good = next((str(c(run)) for c in checkpoints if c(run).exists()), "none was made yet")
    return (
        f"step {step}: loss {loss}, gradient norm {norm}. The last good checkpoint: {good}. "
        "Try a lower optimizer.lr, trainer.gradient_clip_val=1, scheduler.warmup_steps=500, or "
        "trainer.precision=32-true."
    )
