"""What happens when a process that loads data dies: the steps so far are saved, then the run ends.

fcn/training/trainer.py adds this callback to every run.
"""

import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from fcn.checkpoint import last_checkpoint
from fcn.training.clock import is_whole_step


class LoaderFailure(Callback):
    """Finishes and saves the current step when a loader process dies, then raises torch's error.

    When a loader process dies, torch raises an error from its handler of the signal SIGCHLD, in
    the middle of a step. The handler here keeps that error until the step is saved. Windows has no
    SIGCHLD. There, and if the process dies between two steps, Lightning fails when it asks for the
    next batch, and `on_exception` saves the steps that were complete.

    Raises:
        RuntimeError: torch's own error, which `loader_died` recognises.
    """

    def __init__(self) -> None:
        self.error: RuntimeError | None = None  # raised by torch, and kept until the step is saved
        self.pending = False  # whether the run ends after this step, so LastCheckpoint must save it
        self.between_steps = False  # whether the last optimizer step is complete, and no batch came
        self.handlers: dict[int, Any] = {}  # the signal handlers before ours, to be set again

    def on_train_start(self, *_: Any, **__: Any) -> None:
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() != threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler):  # torch has set it, to notice the death of loader processes
            own = partial(self._on_signal, handler)
            self.handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, own)

    def teardown(self, *_: Any, **__: Any) -> None:
        while self.handlers:  # Lightning calls this after an exception, too
            signal.signal(*self.handlers.popitem())

    def _on_signal(self, handler: Callable[..., Any], number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            self.error = error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        # Saving needs all processes of a distributed run, and the others do not know of the death.
        self.between_steps = is_whole_step(trainer) and trainer.world_size == 1
        self.pending = self.between_steps and self.error is not None

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._raise_if_died()

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._raise_if_died()  # last.ckpt was saved just before, and records that this is due

    def _raise_if_died(self) -> None:
        self.between_steps = False
        if self.error is not None:
            raise self.error

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the steps that were complete when the next batch could not be loaded."""
        if self.between_steps and loader_died(exception):
            trainer.save_checkpoint(
                last_checkpoint(Path(trainer.default_root_dir)), weights_only=False
            )


def loader_died(error: BaseException) -> bool:
    """Whether an error says that a loader process has died, for example for lack of memory."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
