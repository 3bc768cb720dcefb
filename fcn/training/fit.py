"""The training itself: Lightning's `fit`, what its errors mean to a user, and summary.json.

summary = fit(trainer, module, datamodule, checkpoint, advice)      # as train.py calls it
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fcn import cli
from fcn.checkpoint import best_checkpoint, last_checkpoint, newest_checkpoint, read_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.errors import ConfigError, Stopped, TrainingError, WriteError
from fcn.files import write_json
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.process import is_main_process, memory_size, peak_memory
from fcn.runs.versions import git_revision, versions
from fcn.training.clock import Clock
from fcn.training.interruption import interruption_of, loader_died, stop_of


def fit(
    trainer: pl.Trainer,
    module: SegmentationModule,
    datamodule: SegmentationDataModule,
    checkpoint: Path | None,
    advice: Callable[[int], str],
) -> dict[str, Any]:
    """Train to the end, and write summary.json into the run folder.

    Args:
        trainer, module, datamodule: ready for training.
        checkpoint: the checkpoint to go on from; None: start from the module's weights.
        advice: given the bytes of the device's memory, returns a text about settings that need
            less. It is called if memory runs out.

    Returns:
        What summary.json holds. In a distributed run, only the first process gets it; in the
        others it is empty.

    Raises:
        Stopped: a signal has ended the run. summary.json is written, and the run can be resumed
            if it has a checkpoint.
        TrainingError: the loss has diverged, memory ran out, or a loader process has died.
        WriteError: a file could not be written.
    """
    status, exit_code = "finished", 0
    # Exclude all objects that exist by now from garbage collection. Otherwise Python would collect
    # only after the number of all objects has grown by a quarter, and figures of several MB each
    # would pile up until then.
    gc.freeze()
    gc.collect()
    device = trainer.strategy.root_device
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)  # of earlier runs in this process
    try:
        with interruption_of(trainer).signals_kept():
            trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except BaseException as error:
        stop = stop_of(trainer, error)
        if isinstance(stop, Stopped):
            status, exit_code = "stopped", stop.exit_code
            if is_main_process():
                print(f"\nstopped by {stop}; {_go_on(trainer)}", flush=True)
            raise stop from None
        exit_code = 1
        if stop is not None:
            raise stop from None
        explained = _explained(error, trainer, advice)
        if explained is None:
            raise
        raise explained from error
    finally:
        gc.unfreeze()
        for logger in trainer.loggers:
            # Only our logger for W&B has this. It is not imported here, since importing the package
            # wandb takes two seconds, also in runs without it.
            end_run = getattr(logger, "end_run", None)
            if end_run is not None:
                end_run(exit_code, Path(trainer.default_root_dir))
        if exit_code != 1 and is_main_process():
            summary = _write_summary(trainer, status)
        # Lightning does not end the processes that load data when a validation is interrupted, or
        # when there is no step left to take. In the next job of a sweep, for example, Python would
        # then wait 5 s for each while it collects garbage.
        trainer.fit_loop.teardown()
    return summary if is_main_process() else {}


def _go_on(trainer: pl.Trainer, *changes: str) -> str:
    """The command that resumes this run with these changes, for the end of a message."""
    if not any(Path(trainer.default_root_dir).glob("checkpoints/*.ckpt")):
        return "this run has no checkpoint, so it cannot be resumed"
    words = ["python", "train.py", f"resume={trainer.default_root_dir}", *changes]
    return f"go on with: {cli.command_line(words)}"


def _explained(
    error: BaseException, trainer: pl.Trainer, advice: Callable[[int], str]
) -> Exception | None:
    """An error that says what has happened and what to do; None if there is nothing to add."""
    if isinstance(error, WriteError):
        if not last_checkpoint(Path(trainer.default_root_dir)).is_file():
            return None
        return WriteError(f"{error}\nThe checkpoint before it is undamaged; {_go_on(trainer)}")
    if ran_out_of_memory(error):
        device = trainer.strategy.root_device
        if interruption_of(trainer).in_validation:
            batch = getattr(trainer.datamodule, "eval_batch_size", 1)  # type: ignore[attr-defined]
            smaller = ["data.eval_batch_size=1"] if batch > 1 else []
            return TrainingError(
                f"{device} ran out of memory in a validation, whose images are not cropped. Less "
                "is needed by smaller images, and by 16 bits where the device has them "
                "(trainer.precision=bf16-mixed or 16-mixed); " + _go_on(trainer, *smaller)
            )
        return TrainingError(f"{device} ran out of memory: {advice(memory_size(device))}")
    if loader_died(error):
        return TrainingError(
            f"a process that loads data ended: {error}. The system kills one when memory is short: "
            f"data.num_workers=1 needs less, 0 none; {_go_on(trainer, 'data.num_workers=0')}"
        )
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU has too little memory, or a CPU's system refuses to give more."""
    texts = ("can't allocate memory", "Storage size calculation overflowed", "out of memory (MPS")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _write_summary(trainer: pl.Trainer, status: str) -> dict[str, Any]:
    """Write summary.json: the last and the best scores, how fast the run was, which code made it.

    Scores come from metrics.csv and not from this process, so that the summary of a resumed run
    covers the steps before it was resumed, too.

    Args:
        trainer: after its `fit`.
        status: "finished", or "stopped" by a signal.
    """
    run = Path(trainer.default_root_dir)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    (clock,) = (callback for callback in callbacks if isinstance(callback, Clock))
    rows = read_metrics(run / "metrics.csv")
    validated = [row for row in rows if row.get("val/miou")]
    last = validated[-1] if validated else {}
    best = max(validated, key=lambda row: float(row["val/miou"]), default=None)
    _, speeds = read_column(rows, "train/images_per_second")
    _, smooth = read_column(rows, "train/loss_smooth")
    summary = {
        "status": status,
        "steps": trainer.global_step,
        **{name: float(value) for name, value in last.items() if name.startswith("val/") and value},
        "best/val/miou": float(best["val/miou"]) if best else None,
        "best/step": int(best["step"]) if best else None,
        "train/loss_smooth": smooth[-1] if smooth else None,
        # The harmonic mean: all images divided by all seconds.
        "images_per_second": len(speeds) / sum(1 / s for s in speeds) if speeds else None,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "git_revision": git_revision(),
        "seconds": round(clock.time_elapsed(), 1),
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
    }
    write_json(run / "summary.json", summary)
    return summary


def checkpoint_to_resume(
    run: Path, module: SegmentationModule, datamodule: SegmentationDataModule
) -> tuple[Path, int]:
    """The newest usable checkpoint of a run, and its optimizer step.

    A line on the screen names the checkpoints that are damaged or of another network. Another line
    warns if the images to train on have changed, since that changes their order.

    Args:
        run: the run folder.
        module: has the network that the checkpoint must fit.
        datamodule: has the images that the run would go on with.

    Raises:
        ConfigError: there is no usable checkpoint, or the best of the run was found on other
            images than those that it would be compared on.
    """
    path, step, wrong = newest_checkpoint(run, module.state_dict())
    if wrong and is_main_process():
        print(f"warning: {'; '.join(wrong)}\ngoing on from {path}, step {step}", flush=True)
    # Checkpoints from before 2026-11-27 do not hold this.
    before, now = read_checkpoint(path).get(type(datamodule).__name__, {}), datamodule.state_dict()
    changed = {name for name, number in before.items() if number != now[name]}
    if "val_images" in changed and best_checkpoint(run).is_file():
        raise ConfigError(
            f"resume={run}: the images to validate on are not those of before, so that scores "
            "cannot be compared with the run's best. To go on with these images, start a new run "
            f"from these weights: model.weights={path}"
        )
    if "train_images" in changed and is_main_process():
        print("warning: the images to train on have changed, and so has their order", flush=True)
    return path, step
