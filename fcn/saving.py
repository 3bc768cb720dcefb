"""What a run keeps: its last and its best checkpoint, each whole whenever the process is killed."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from fcn.datamodule import random_generator
from fcn.errors import Stopped, TrainingError
from fcn.runs import best_checkpoint, last_checkpoint, versions, writing


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
