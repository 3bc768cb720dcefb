"""What happens around training steps: statistics, checkpoints, pictures, a progress bar."""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint, RichProgressBar
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcn.csv_logger import MetricsCSV, read_metrics
from fcn.datamodule import random_generator
from fcn.errors import Stopped, TrainingError
from fcn.module import SegmentationModule
from fcn.runs import best_checkpoint, last_checkpoint, versions
from fcn.visualize import draw_curves, panel

Outputs = Mapping[str, Any]


class LossStatistics(Callback):
    """Makes a jagged loss readable, and logs how training goes at every `log_every_n_steps`.

    A batch of one to three images gives a loss that jumps by its own size: people read
    `train/loss_smooth`. Logged for each optimizer step: `train/loss` (mean over the accumulated
    batches), `train/loss_smooth`, `train/loss_mean` and `train/loss_std` (over a window of steps),
    `train/grad_norm` (before clipping), `train/lr` (without multipliers) and
    `train/images_per_second`.

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
        self.steps: list[tuple[int, Tensor, Tensor]] = []  # step, loss, gradient norm: unread yet
        self.images, self.since = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        if self.steps:  # a checkpoint has all losses, and is not made of a diverged network
            self.read(self.trainer)
        return {"total": self.total, "weight": self.weight, "window": list(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.weight = state_dict["total"], state_dict["weight"]
        self.window.extend(state_dict["window"])

    @property
    def smooth(self) -> float:
        """The exponential mean of all losses so far."""
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
        self.steps.append(
            (trainer.global_step, torch.stack(self.batch_losses).sum(), self.grad_norm)
        )
        self.batch_losses = []
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.read(trainer)
            self.report(trainer, pl_module)

    def read(self, trainer: pl.Trainer) -> None:
        """Take the losses since the last reading from the device, all in one go."""
        if not self.steps:
            return
        numbers = torch.stack([torch.stack((loss, norm)).float() for _, loss, norm in self.steps])
        fp16 = trainer.precision == "16-mixed"  # its loss scaler probes for Inf gradients itself
        for (step, _, _), (loss, norm) in zip(self.steps, numbers.tolist(), strict=True):
            if not math.isfinite(loss) or not (fp16 or math.isfinite(norm)):
                raise TrainingError(_diverged(trainer, step, loss, norm))
            self.total = self.decay * self.total + (1 - self.decay) * loss
            self.weight = self.decay * self.weight + (1 - self.decay)
            self.window.append(loss)
            self.loss, self.norm = loss, norm
        self.steps = []

    def report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the statistics of the newest step to every logger and to the progress bar."""
        now = time.perf_counter()
        mean = math.fsum(self.window) / len(self.window)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in self.window) / len(self.window))
        metrics = {
            "train/loss": self.loss,
            "train/loss_smooth": self.smooth,
            "train/loss_mean": mean,
            "train/loss_std": spread,
            "train/grad_norm": self.norm,
            "train/lr": self.lr,
            "train/images_per_second": self.images / (now - self.since),
        }
        self.images, self.since = 0, now
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log("loss", self.smooth, prog_bar=True, logger=False)


class LastCheckpoint(Checkpoint):
    """last.ckpt: every so many steps, before each validation, at the end, and when asked to stop.

    Every checkpoint is made after a whole optimizer step and before the validation that may be due
    then; a resumed run does that validation first. SIGINT (Ctrl-C) and SIGTERM end the run after
    the current step. Dropout's random numbers are a function of (seed, step, process), so that no
    generator needs to be saved.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.
        run: the run folder.
        seed: of dropout.
        config: the resolved configuration, kept in the checkpoint.
    """

    def __init__(self, *, every_n_steps: int, run: Path, seed: int, config: dict[str, Any]) -> None:
        self.every_n_steps, self.run, self.seed, self.config = every_n_steps, run, seed, config
        self.validation_due = False
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.stop_signal: signal.Signals | None = None
        self.handlers: dict[signal.Signals, Any] = {}  # that were there before

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = state_dict["validation_due"]
        self.seconds_before = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Of training and validation, before and since the run was resumed."""
        return self.seconds_before + time.perf_counter() - self.started

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        checkpoint["versions"] = versions()
        checkpoint["precision"] = str(trainer.precision)  # evaluation computes as validation did

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._on_signal)
        self._validate_if_due(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate_if_due(trainer)  # no step was left, so that training has not started

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        """As Lightning's training loop does it, which leaves it out when a run is resumed."""
        if self.validation_due:
            self.validation_due = False
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            trainer.validating = True
            val_loop.run()
            trainer.training = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = random_generator(self.seed, batch_idx, trainer.global_rank).integers(2**63)
        torch.manual_seed(int(seed))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            # Gradients are under way, and no checkpoint holds them. When time is up
            # (trainer.max_time), Lightning says so again after the next batch.
            trainer.should_stop = False
            return
        if trainer.global_step >= trainer.max_steps != -1:
            trainer.should_stop = True  # Lightning then validates once more
        interval = trainer.val_check_batch
        due = trainer.should_stop or (interval is not None and (batch_idx + 1) % interval == 0)
        self.validation_due = bool(due and trainer.enable_validation)
        if due or self.stop_signal or trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(last_checkpoint(self.run), weights_only=False)
        self.validation_due = False
        self._stop_if_asked(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stop_if_asked(trainer)  # nothing is lost: last.ckpt was made just before

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self.handlers:  # after an exception, Lightning gives them back
            signal.signal(*self.handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C twice: now
        self.stop_signal = signal.Signals(number)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self.stop_signal:
            raise Stopped(self.stop_signal, trainer.global_step)


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt: the one with the highest val/miou, also after the run folder has moved.

    Args:
        run: the run folder.
    """

    def __init__(self, *, run: Path) -> None:
        path = best_checkpoint(run)
        super().__init__(
            path.parent,
            filename=path.stem,
            monitor="val/miou",
            mode="max",
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        old, new = str(state_dict["dirpath"]), str(self.dirpath)
        moved = {k: v.replace(old, new) for k, v in state_dict.items() if isinstance(v, str)}
        best = {k.replace(old, new): v for k, v in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": best})


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole or the one before it, whenever the process is killed.

    Lightning's own goes through memory and the system's temporary folder, often another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


class Panels(Callback):
    """The same validation images each time: image | label | prediction, in panels/step_*.png.

    Args:
        images: how many.
        folder: where the pictures go.
    """

    def __init__(self, *, images: int = 6, folder: Path) -> None:
        self.images, self.folder = images, folder
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rows = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.images - len(self.rows)
        for row in zip(batch["image"], batch["mask"], outputs["prediction"], strict=True):
            if wanted > 0:
                self.rows.append(tuple(tensor.cpu() for tensor in row))
                wanted -= 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.rows or trainer.sanity_checking or not trainer.is_global_zero:
            return
        self.folder.mkdir(exist_ok=True)
        assert isinstance(pl_module, SegmentationModule)
        assert pl_module.scores is not None
        picture = panel(
            self.rows,
            class_names=pl_module.hparams["class_names"],
            palette=pl_module.hparams["palette"],
            void=pl_module.hparams["void"],
            title=f"step {trainer.global_step}, val mIoU {pl_module.scores['miou']:.3f}",
        )
        picture.save(self.folder / f"step_{trainer.global_step:07d}.png")
        self.rows = []


class Curves(Callback):
    """curves.png, drawn from metrics.csv after every validation."""

    def __init__(self, *, csv: MetricsCSV) -> None:
        self.csv = csv

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            draw_curves(read_metrics(self.csv.path), self.csv.path.with_name("curves.png"))


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
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
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
        table.add_row(name, "absent" if math.isnan(iou) else f"{100 * iou:.1f}")
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
