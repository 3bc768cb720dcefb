"""SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (Slurm's notice) end a run so that it can be resumed.

fcn/training/trainer.py adds this callback to every run.
"""

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from fcn.errors import Stopped
from fcn.training.clock import is_whole_step

# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]


class Preemption(Callback):
    """Ends the run after the current optimizer step, or during a validation before the next batch.

    `LastCheckpoint` sees that a stop is `pending` and saves the step. The exception is raised when
    the next batch or the next validation begins. A validation can be interrupted at any batch,
    because last.ckpt was saved just before it and records that the validation is due. A second
    Ctrl-C ends the run at once, without saving.

    Raises:
        Stopped: a signal has come, and last.ckpt holds the state of the run.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the signal that this process has got
        self.agreed: signal.Signals | None = None  # the signal that all processes have agreed on
        self.handlers: dict[signal.Signals, Any] = {}  # the handlers before ours, to be set again

    @property
    def pending(self) -> bool:
        """Whether the run stops after this step."""
        return self.agreed is not None

    def on_train_start(self, *_: Any, **__: Any) -> None:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.handlers[number] = signal.signal(number, self._on_signal)

    def teardown(self, *_: Any, **__: Any) -> None:
        while self.handlers:  # Lightning calls this after an exception, too
            signal.signal(*self.handlers.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Agree with the other processes on whether to stop after this step.

        They may have got the signal at another step, or not at all. They ask each other only at
        steps where losses are logged, since reading these makes them wait for each other anyway.
        """
        if not is_whole_step(trainer):
            return
        if trainer.world_size == 1:
            self.agreed = self.received
        elif trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = trainer.strategy.reduce(number, reduce_op="max")
            self.agreed = signal.Signals(int(number)) if number else None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._stop_if_agreed(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._stop_if_agreed(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.world_size == 1:
            self.agreed = self.received
        self._stop_if_agreed(trainer)

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self.agreed is not None:
            raise Stopped(self.agreed, trainer.global_step)
