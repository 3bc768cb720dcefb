"""What a run keeps: its last and its best checkpoint, each whole whenever the process is killed.

callbacks.last_checkpoint.every_n_steps=500
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fcn.checkpoint import best_checkpoint, last_checkpoint, write_checkpoint
from fcn.errors import TrainingError, check_whole
from fcn.training.clock import is_whole_step
from fcn.training.loader_failure import LoaderFailure
from fcn.training.preemption import Preemption


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt: every so many steps, before each validation, at the end, before a stop.

    Every checkpoint is made after a whole optimizer step. One that is made just before a validation
    remembers that it is due: a run that is killed in its validation does it when it is resumed.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.
    """

    def __init__(self, *, every_n_steps: int = 500) -> None:
        check_whole("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.validation_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = state_dict["validation_due"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if not trainer.strategy.reduce_boolean_decision(first == str(trainer.ckpt_path)):
            raise TrainingError(
                "the processes of this run do not agree on the checkpoint to go on from (the first "
                f"one has {first}). Name the run: resume=RUN_FOLDER"
            )

    def on_train_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._validate_if_due(trainer)

    def on_fit_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._validate_if_due(trainer)  # where no step was left, training has not started

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if not is_whole_step(trainer):
            return  # gradients are under way, and no checkpoint holds them
        interval = trainer.val_check_interval // trainer.accumulate_grad_batches  # in steps
        due = trainer.should_stop or trainer.global_step % interval == 0
        self.validation_due = bool(due and trainer.enable_validation)
        stopping = any(
            callback.pending
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Preemption | LoaderFailure)
        )
        if due or stopping or trainer.global_step % self.every_n_steps == 0:
            path = last_checkpoint(Path(trainer.default_root_dir))
            trainer.save_checkpoint(path, weights_only=False)

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.validation_due = False  # best.ckpt, which is made at its end, has it behind it

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        """Do the validation that was due when the run was killed.

        Lightning 2.6 leaves it out when a run is resumed, and has no call for a validation within
        `fit`. These are the lines of its training loop
        (pytorch_lightning/loops/training_epoch_loop.py, on_advance_end).
        """
        if self.validation_due:
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            trainer.validating = True
            val_loop.run()
            trainer.training = True


class BestCheckpoint(ModelCheckpoint):
    """Saves best.ckpt: the one with the highest val/miou, also after the run folder has moved."""

    def __init__(self) -> None:
        super().__init__(
            filename=best_checkpoint(Path()).stem,
            monitor="val/miou",
            mode="max",
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = str(best_checkpoint(Path(trainer.default_root_dir).resolve()).parent)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the score, but no path: Lightning deletes what a checkpoint names as the best."""
        scores = list(state_dict["best_k_models"].values())  # one, or none yet
        paths = [f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}"] if scores else []
        best = "".join(paths)
        own = {"dirpath": self.dirpath, "best_k_models": dict(zip(paths, scores, strict=True))}
        own |= {"best_model_path": best, "kth_best_model_path": best, "last_model_path": ""}
        super().load_state_dict(state_dict | own)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that a kill leaves either the new one or the one before it.

    Lightning's own goes through memory and the system's temporary folder, often another disk.

    Raises:
        WriteError: there is no room, no folder, or no permission.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, Path(path))
