"""The training itself: Lightning's `fit`, what its errors mean to a user, and the summary.

summary = fit(trainer, module, datamodule, checkpoint, advice)
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fcn.checkpoint import last_checkpoint, newest_checkpoint, read_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.errors import Stopped, TrainingError, WriteError
from fcn.files import write_json
from fcn.module import SegmentationModule
from fcn.runs.process import is_main_process, memory_size
from fcn.runs.summary import summarise
from fcn.training.clock import Clock
from fcn.training.loader_failure import loader_died
from fcn.training.wandb_logger import TolerantWandbLogger


def fit(
    trainer: pl.Trainer,
    module: SegmentationModule,
    datamodule: SegmentationDataModule,
    checkpoint: Path | None,
    advice: Callable[[int], str],
) -> dict[str, Any]:
    """Train to the end, and leave a summary.

    Args:
        checkpoint: to go on from.
        advice: says which settings need less memory, given the device's size in bytes.

    Returns:
        What summary.json holds; empty in other processes than the first.

    Raises:
        Stopped: by a signal. There is a summary, and the run can be resumed.
        TrainingError: the loss has diverged, memory ran out, or a loader process has died.
        WriteError: a file could not be written.
    """
    status, exit_code = "finished", 0
    # Python's garbage collector need not look again at what is there already. Otherwise it waits
    # until there is a quarter more of everything, and figures of several MB pile up meanwhile.
    gc.freeze()
    gc.collect()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        status, exit_code = "stopped", stop.exit_code
        if is_main_process():
            print(f"\nstopped by {stop}; {_go_on(trainer)}", flush=True)
        raise
    except BaseException as error:
        exit_code = 1
        explained = _explained(error, trainer, advice)
        if explained is None:
            raise
        raise explained from error
    finally:
        gc.unfreeze()
        for logger in trainer.loggers:
            if isinstance(logger, TolerantWandbLogger):
                logger.finish(exit_code)
        if exit_code != 1 and is_main_process():
            summary = _write_summary(trainer, status)
    return summary if is_main_process() else {}


def _go_on(trainer: pl.Trainer) -> str:
    return f"go on with: python train.py resume={trainer.default_root_dir}"


def _explained(
    error: BaseException, trainer: pl.Trainer, advice: Callable[[int], str]
) -> Exception | None:
    """What an error means to a user, and what to do; None if there is nothing to add."""
    if isinstance(error, WriteError):
        if not last_checkpoint(Path(trainer.default_root_dir)).is_file():
            return None
        return WriteError(f"{error}\nThe checkpoint before it is whole; {_go_on(trainer)}")
    if ran_out_of_memory(error):
        device = trainer.strategy.root_device
        return TrainingError(f"{device} ran out of memory: {advice(memory_size(device))}")
    if loader_died(error):
        return TrainingError(
            f"a process that loads data ended: {error}. The system kills one when memory is "
            f"short: data.num_workers=1 needs less, 0 none. To {_go_on(trainer)} data.num_workers=0"
        )
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU has too little memory, or a CPU's system refuses to give more."""
    texts = ("can't allocate memory", "Storage size calculation overflowed")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _write_summary(trainer: pl.Trainer, status: str) -> dict[str, Any]:
    run = Path(trainer.default_root_dir)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    (clock,) = (callback for callback in callbacks if isinstance(callback, Clock))
    summary = summarise(run, status) | {
        "seconds": round(clock.seconds, 1),
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
    }
    write_json(run / "summary.json", summary)
    return summary


def find_checkpoint(run: Path, module: SegmentationModule) -> tuple[Path, int]:
    """The checkpoint that a run goes on from, and its step. Broken ones are named and passed over.

    Raises:
        ConfigError: there is none.
    """
    path, wrong = newest_checkpoint(run, module.state_dict())
    step = read_checkpoint(path)["global_step"]
    if wrong and is_main_process():
        print(f"warning: {'; '.join(wrong)}\ngoing on from {path}, step {step}", flush=True)
    return path, step
