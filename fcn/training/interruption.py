"""What ends a run early: a signal, or the death of a process that loads data.

The signals are SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (Slurm's notice); on Windows, SIGINT and
SIGBREAK (Ctrl-Break), since no other reaches a process there. In both cases the steps so far are
saved, so that the run can be resumed. fcn/training/trainer.py adds this callback to every run.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException

from fcn.checkpoint import last_checkpoint
from fcn.errors import Stopped
from fcn.training.clock import completes_step

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")  # not every system has all of them
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Interruption(Callback):
    """Ends the run after the current optimizer step, or during a validation before the next batch.

    `LastCheckpoint` sees that the end is `pending` and saves the step. The exception is raised when
    the next batch or the next validation begins. A signal can interrupt a validation at any batch,
    because last.ckpt was saved just before it and records that the validation is due. A second
    Ctrl-C ends the run at once, without saving.

    When a loader process dies, torch raises an error from its handler of the signal SIGCHLD, in
    the middle of a step. The handler here keeps that error until the step is saved. Windows has no
    SIGCHLD. There, and if the process dies between two steps, Lightning fails when it asks for the
    next batch, and `on_exception` saves the steps that were complete.

    Raises:
        Stopped: a signal has come, and last.ckpt holds the state of the run.
        KeyboardInterrupt: Ctrl-C was pressed twice.
        RuntimeError: torch's own error about a loader process, which `loader_died` recognises.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the signal that this process has got
        self.agreed: signal.Signals | None = None  # the signal that all processes have agreed on
        self.error: RuntimeError | None = None  # torch's error about a loader process
        self.pending = False  # whether the run ends after this step, so LastCheckpoint must save it
        self.between_steps = False  # whether a step is complete, and no next batch has come
        self.in_validation = False  # whether an exception has ended a validation
        self.torch_handler: Callable[..., Any] | None = None  # torch's handler of SIGCHLD

    @contextmanager
    def signals_kept(self) -> Iterator[None]:
        """Have signals do after `Trainer.fit` what they did before it, however it ends.

        Lightning leaves Ctrl-C ignored after an interrupt, and a notebook could not be interrupted
        again. torch's handler of SIGCHLD is an exception: it was not there before the first run of
        a process, and must stay for the next ones, since torch installs it only once. Lightning
        removes it when it restores all signals.
        """
        before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            yield
        finally:
            if self.torch_handler is not None:
                before[signal.SIGCHLD] = self.torch_handler
            for number, handler in before.items():
                if in_main_thread() and handler is not None:  # None: it is not one of Python's
                    signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not in_main_thread():
            return
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if trainer.received_sigterm:  # by Lightning's handler; Lightning ends the run after a batch
            self.received = signal.SIGTERM
        if hasattr(signal, "SIGCHLD"):
            torch_handler = signal.getsignal(signal.SIGCHLD)
            if callable(torch_handler):
                self.torch_handler = torch_handler
                signal.signal(signal.SIGCHLD, self._keep_error_of(torch_handler))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _keep_error_of(self, handler: Callable[..., Any]) -> Callable[..., None]:
        def on_death(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except RuntimeError as error:
                self.error = error

        return on_death

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Agree with the other processes on whether to stop after this step.

        They may have got the signal at another step, or not at all. They ask each other only at
        steps where losses are logged, since reading these makes them wait for each other anyway.
        Saving needs all of them too, and they do not know of the death of another's loader.
        """
        if not completes_step(trainer):
            return
        alone = trainer.world_size == 1
        if alone:
            self.agreed = self.received
        elif trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self.agreed = signal.Signals(int(number)) if number else None
        self.between_steps = alone
        self.pending = self.agreed is not None or (alone and self.error is not None)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._end_if_due(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._end_if_due(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.world_size == 1:
            self.agreed = self.received
        self._stop_if_agreed(trainer)

    def _end_if_due(self, trainer: pl.Trainer) -> None:
        self.between_steps = False
        self._stop_if_agreed(trainer)
        if self.error is not None:
            raise self.error

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self.agreed is not None:
            raise Stopped(self.agreed, trainer.global_step)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the steps that were complete when the next batch could not be loaded."""
        self.in_validation = trainer.validating  # Lightning forgets this before `fit` returns
        if self.between_steps and loader_died(exception):
            trainer.save_checkpoint(
                last_checkpoint(Path(trainer.default_root_dir)), weights_only=False
            )


def in_main_thread() -> bool:
    """Whether this is the main thread, the only one in which Python allows signal handlers."""
    return threading.current_thread() is threading.main_thread()


def interruption_of(trainer: pl.Trainer) -> Interruption:
    """The callback `Interruption` of a run."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    (interruption,) = (c for c in callbacks if isinstance(c, Interruption))
    return interruption


def loader_died(error: BaseException) -> bool:
    """Whether an error says that a loader process has died, for example for lack of memory."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def stop_of(trainer: pl.Trainer, error: BaseException) -> BaseException | None:
    """How a signal has stopped the run that ended with `error`; None if no signal has.

    Ctrl-C in a terminal reaches a loader process, too. One that is spawned takes seconds to begin,
    and cannot ignore the signal before it has. It dies of it, and Lightning raises an error about
    that, while the run itself waits for the first batch. last.ckpt has all steps nevertheless.

    Returns:
        Stopped: all steps so far are in last.ckpt, unless SIGTERM came before the first one.
        KeyboardInterrupt: the run ended at once, perhaps before the first checkpoint.
    """
    if isinstance(error, Stopped):
        return error
    if isinstance(error, SIGTERMException):  # it came before `Interruption` handled signals
        return Stopped(signal.SIGTERM, trainer.global_step)
    if isinstance(error.__context__, KeyboardInterrupt):  # Lightning made SystemExit of it
        return error.__context__
    received = interruption_of(trainer).received
    if not loader_died(error) or received is None:
        return None
    if not last_checkpoint(Path(trainer.default_root_dir)).is_file():
        return KeyboardInterrupt()
    return Stopped(received, trainer.global_step)
