"""The W&B side of a run: started, and left alone as soon as it fails. Training never waits for it.

What W&B cannot upload stays in the run folder, for `wandb sync`.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import wandb
from pytorch_lightning.loggers import WandbLogger

from fcn.errors import reason

SUMMARIES = {"train/loss_smooth": "min", "val/loss": "min", "val/miou": "max"}


warned: set[Path] = set()  # run folders


def start_wandb(make: Callable[..., WandbLogger], run: Path, config: Any) -> WandbLogger:
    """A logger that is online if there is a key that the server takes, else offline.

    Args:
        make: makes the logger, once it knows where and how.
        run: the run folder.
        config: of the run, for W&B to show.
    """
    # W&B's service logs to ~/.cache otherwise; a sweep has one service, so its first run has them
    os.environ.setdefault("WANDB_CACHE_DIR", str(run.absolute() / "wandb" / "cache"))
    os.environ.setdefault("WANDB_DATA_DIR", str(run.absolute() / "wandb" / "data"))  # of tables
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # seconds for the last uploads, not days
    mode = None
    if not os.environ.get("WANDB_MODE"):
        try:
            if not wandb.login(prompt=False):
                mode = "offline"
                print(f"W&B: not logged in, so offline; upload with: wandb sync {run}/wandb/*run-*")
        except Exception as error:
            mode = "offline"
            warn(run, error)
    try:
        return _start(make, run, config, mode)
    except Exception as error:
        if mode == "offline":
            raise
        warn(run, error)
        wandb.teardown()  # its service still holds the run that did not start
        return _start(make, run, config, "offline")


def _start(
    make: Callable[..., WandbLogger], run: Path, config: Any, mode: str | None
) -> WandbLogger:
    options = {"mode": mode} if mode else {}
    logger = make(save_dir=run, config=config, settings=wandb.Settings(quiet=True), **options)
    logger._wandb_init.pop("anonymous", None)  # Lightning hands it on, and W&B complains
    experiment = logger.experiment
    for metric, summary in SUMMARIES.items():
        experiment.define_metric(
            metric, summary=summary, step_metric="trainer/global_step", step_sync=True
        )
    log = experiment.log

    def log_or_warn(*args: Any, **options: Any) -> None:
        try:
            log(*args, **options)
        except Exception as error:  # of W&B's service, which may have died, or of the disk
            warn(run, error)
            experiment.log = lambda *args, **options: None

    experiment.log = log_or_warn
    return logger


def finish_wandb(trainer: pl.Trainer, exit_code: int) -> None:
    """End the W&B run, so that a sweep's next job starts its own."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            try:
                logger.experiment.finish(exit_code=exit_code)
            except Exception as error:
                warn(Path(trainer.default_root_dir), error)


def warn(run: Path, error: Exception) -> None:
    """One warning for each run: W&B has failed, training has not."""
    if run in warned:
        return
    warned.add(run)
    why = (reason(error).splitlines() or [""])[0]
    warnings.warn(
        f"W&B failed ({why}); training goes on, metrics.csv has everything, and what is in "
        f"{run}/wandb can be uploaded later: wandb sync {run}/wandb/*run-*",
        stacklevel=2,
    )
