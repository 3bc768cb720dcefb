"""The checkpoints of a run, last.ckpt and best.ckpt. A kill at any moment leaves neither damaged.

python train.py callbacks.last_checkpoint.every_n_steps=500
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fcn.checkpoint import best_checkpoint, last_checkpoint, write_checkpoint
from fcn.errors import TrainingError, check_whole
from fcn.training.clock import completes_step
from fcn.training.interruption import Interruption


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt regularly, before each validation, at the end, and before a run is stopped.

    A checkpoint is only made when an optimizer step is complete. One that is made just before a
    validation records that the validation is due. If the run is killed while it validates, it
    therefore does that validation first when it is resumed.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.

    Raises:
        ConfigError: `every_n_steps` is not a whole number from 1 up.
        TrainingError: the processes of a distributed run would go on from different checkpoints.
    """

    def __init__(self, *, every_n_steps: int = 500) -> None:
        check_whole("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.validation_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = state_dict["validation_due"]

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        first = trainer.strategy.broadcast(str(trainer.ckpt_path))
        if not trainer.strategy.reduce_boolean_decision(first == str(trainer.ckpt_path)):
            raise TrainingError(
                "the processes of this run have found different checkpoints to resume from (the "
                f"first one has {first}). Name the run: resume=RUN_FOLDER"
            )

    def on_train_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._validate_if_due(trainer)

    def on_fit_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        # Lightning does not call `on_train_start` if the resumed run has no steps left.
        self._validate_if_due(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Save if a validation, a stop or the next checkpoint is due after this step."""
        if not completes_step(trainer):
            return  # a checkpoint cannot hold gradients that are still being accumulated
        interval = trainer.val_check_interval // trainer.accumulate_grad_batches  # in steps
        ends = trainer.should_stop and trainer.global_step >= (trainer.min_steps or 0)
        due = ends or trainer.global_step % interval == 0
        self.validation_due = bool(due and trainer.enable_validation)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        ending = any(c.pending for c in callbacks if isinstance(c, Interruption))
        if due or ending or trainer.global_step % self.every_n_steps == 0:
            path = last_checkpoint(Path(trainer.default_root_dir))
            trainer.save_checkpoint(path, weights_only=False)

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        # best.ckpt is made at the end of this validation, which is then no longer due.
        self.validation_due = False

    def _validate_if_due(self, trainer: pl.Trainer) -> None:
        """Do the validation that was due when the run was killed.

        Lightning 2.6 leaves that validation out when a run is resumed, and has no public way to
        validate within `fit`. From `val_loop` on, the lines below are those of its training loop
        (pytorch_lightning/loops/training_epoch_loop.py, on_advance_end).
        """
        if self.validation_due:
            # Before `on_fit_end`, Lightning moves the network to the CPU. Batches go to the GPU.
            trainer.strategy.model_to_device()
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            val_loop.restarting = False
            trainer.validating = True
            val_loop.run()
            trainer.training = True


class BestCheckpoint(ModelCheckpoint):
    """Saves best.ckpt, the checkpoint with the highest val/miou.

    Lightning's own callback keeps absolute paths in a checkpoint. This one takes its paths from the
    run folder, so that a run can be resumed after its folder has been moved.
    """

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
        """Take the best score from a checkpoint, but no path.

        Lightning deletes the file that was the best so far when there is a better one. A checkpoint
        from somebody else could name any file as the best.
        """
        for score in state_dict["best_k_models"].values():  # one, or none before a validation
            path = f"{self.dirpath}/{self.filename}{self.FILE_EXTENSION}"
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that a kill leaves either the new one or the one before it.

    Lightning's own class first makes a copy in memory, and may use the system's temporary folder,
    which is often on another disk.

    Raises:
        WriteError: there is no room, no folder, or no permission.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        folder = Path(path).parent
        if folder.name != "checkpoints":  # a user's callback may have a folder of its own
            folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, Path(path))
