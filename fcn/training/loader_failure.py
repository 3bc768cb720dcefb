"""A process that loads data has died: the steps so far are saved before the run ends."""

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

    torch raises its error from a signal handler, in the middle of a step. Windows has no such
    signal; there, as for a death between two steps, the next batch does not come.

    Raises:
        RuntimeError: torch's own; `loader_died` recognises it.
    """

    def __init__(self) -> None:
        self.error: RuntimeError | None = None
        self.pending = False  # whether the run stops after this step, which is to be saved
        self.between_steps = False  # nothing has happened since an optimizer step
        self.handlers: dict[int, Any] = {}  # that were there before

    def on_train_start(self, *_: Any, **__: Any) -> None:
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() != threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler):  # torch has set it for the sake of its loader processes
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
        # One of several processes cannot save alone: to save, they meet.
        self.between_steps = is_whole_step(trainer) and trainer.world_size == 1
        self.pending = self.between_steps and self.error is not None

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._raise_if_died()

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._raise_if_died()  # last.ckpt is there, and knows that validation is due

    def _raise_if_died(self) -> None:
        self.between_steps = False
        if self.error is not None:
            raise self.error

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Keep the steps that were made before a batch did not come."""
        if self.between_steps and loader_died(exception):
            trainer.save_checkpoint(
                last_checkpoint(Path(trainer.default_root_dir)), weights_only=False
            )


def loader_died(error: BaseException) -> bool:
    """Whether a process that loads data has ended, as one does that the system kills for memory."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
