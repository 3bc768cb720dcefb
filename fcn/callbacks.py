"""What happens around training steps: statistics, checkpoints, a progress bar, a score table."""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    Callback,
    Checkpoint,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fcn.datamodule import random_generator
from fcn.errors import Stopped, TrainingError
from fcn.module import SegmentationModule
from fcn.runs import best_checkpoint, last_checkpoint, versions, writing
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


class LastCheckpoint(Checkpoint):
    """last.ckpt: every so many steps, before each validation, at the end, and when asked to stop.

    Every checkpoint is made after a whole optimizer step and before the validation that may be due
    then; a resumed run does that validation first. SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (Slurm's
    notice) end the run after the current step; so does the death of a loader process, of which
    torch would tell in the middle of a step. Dropout's random numbers are a function of (seed,
    step, process), so that no generator needs to be saved.

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
        self.received: signal.Signals | None = None  # by this process
        self.stop_signal: signal.Signals | None = None  # that all processes know of
        self.handlers: dict[signal.Signals, Any] = {}  # that were there before
        self.loader_error: RuntimeError | None = None
        self.between_steps = False  # nothing has happened since an optimizer step

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if not trainer.strategy.reduce_boolean_decision(first == str(trainer.ckpt_path)):
            raise TrainingError(
                f"the processes of this run do not agree what to go on from (the first: {first}). "
                "Say it: resume=RUN_FOLDER"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.handlers[number] = signal.signal(number, self._on_signal)
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler):  # torch's, as there are loader processes
            own = partial(self._on_child_signal, handler)
            self.handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, own)
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
        self.between_steps = False
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
        self._agree_to_stop(trainer)
        stop = self.stop_signal or (self.loader_error and trainer.world_size == 1)
        if due or stop or trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(last_checkpoint(self.run), weights_only=False)
        self.validation_due = False
        self._stop_if_asked(trainer)
        self.between_steps = True

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep the steps that were made before a batch did not come."""
        if self.between_steps and loader_died(exception) and trainer.world_size == 1:
            trainer.save_checkpoint(last_checkpoint(self.run), weights_only=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.between_steps = False  # last.ckpt is there, and knows that validation is due

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.world_size == 1:
            self.stop_signal = self.received
        self._stop_if_asked(trainer)  # nothing is lost: last.ckpt was made just before

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        while self.handlers:  # after an exception, Lightning gives them back
            signal.signal(*self.handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C twice: now
        self.received = signal.Signals(number)

    def _on_child_signal(
        self, handler: Callable[..., Any], number: int, frame: FrameType | None
    ) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            self.loader_error = error

    def _agree_to_stop(self, trainer: pl.Trainer) -> None:
        """Several processes get a signal at different steps, or one alone: they stop together.

        They ask each other where losses are logged, since that waits for the devices anyway.
        """
        if trainer.world_size == 1:
            self.stop_signal = self.received
        elif trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self.stop_signal = signal.Signals(int(number)) if number else None

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self.stop_signal:
            raise Stopped(self.stop_signal, trainer.global_step)
        if self.loader_error:
            raise self.loader_error


def loader_died(error: BaseException) -> bool:
    """Whether a process that loads data has ended, as one does that the system kills for memory."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


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
        """With our own paths: Lightning deletes what a checkpoint names as the best before."""
        scores = list(state_dict["best_k_models"].values())  # one, or none yet
        paths = [f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}"] if scores else []
        best = "".join(paths)
        own = {"dirpath": self.dirpath, "best_k_models": dict(zip(paths, scores, strict=True))}
        own |= {"best_model_path": best, "kth_best_model_path": best, "last_model_path": ""}
        super().load_state_dict(state_dict | own)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole or the one before it, whenever the process is killed.

    Lightning's own goes through memory and the system's temporary folder, often another disk.

    Raises:
        WriteError: there is no room, no folder, or no permission.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        with writing(path, tensor_bytes(checkpoint)):
            try:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except BaseException as error:
                part.unlink(missing_ok=True)  # room for others; the checkpoint before it is whole
                if isinstance(error.__context__, OSError):  # torch.save's own error hides it
                    raise error.__context__ from None
                raise


def tensor_bytes(value: Any) -> int:
    """Of all tensors in a checkpoint; the rest of it is some kilobytes."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


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
