"""Train a fully convolutional network (Long, Shelhamer, Darrell, CVPR 2015).

    python train.py experiment=quickstart              minutes on a CPU, no download
    python train.py model=fcn8s data.batch_size=2      PASCAL VOC2012 and ImageNet weights
    python train.py -m model=fcn32s,fcn16s,fcn8s optimizer.lr=1e-3,1e-4     a sweep
    python train.py resume=runs/fcn8s/2026-01-31_12-00-00                   goes on with a run

`--help` lists the groups, `--cfg job` every setting. Results: fcn/runs.py.
"""

import math
import os
import secrets
import shutil
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_training, short_messages
from fcn.errors import ConfigError, FCNError, Stopped

# torch and Lightning are imported where they are needed: `--help` and `--cfg job` are instant.
if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """One run, or one job of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_job(cfg)  # Hydra keeps an error until the other jobs are done
        return
    with short_messages(HydraException, OmegaConfBaseException):
        run_job(cfg)


def run_job(cfg: DictConfig) -> None:
    """Choose the run folder, train there, and keep the sweep's table."""
    hydra_cfg = HydraConfig.get()
    overrides = list(hydra_cfg.overrides.task)
    sweep = Path(hydra_cfg.sweep.dir) if hydra_cfg.mode == RunMode.MULTIRUN else None
    if cfg.resume:
        run = Path(cfg.resume)
        cfg = resumed_config(run, overrides)
    elif sweep is not None:
        run = sweep / hydra_cfg.sweep.subdir
        if OmegaConf.select(cfg, "logger._target_"):
            cfg.logger.group = cfg.logger.group or f"sweep_{sweep.name}"
            cfg.logger.name = f"{cfg.logger.name}_{hydra_cfg.job.num}"
    elif hydra_cfg.run.dir != ".":
        run = Path(hydra_cfg.run.dir)
    else:
        run = Path("runs") / str(cfg.name) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        train(cfg, run, overrides)
    except Stopped as stop:
        sys.exit(stop.exit_code)
    except FCNError as error:
        if sweep is not None:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        if sweep is not None:
            from fcn.summary import write_sweep_table

            write_sweep_table(sweep)


def resumed_config(run: Path, overrides: list[str]) -> DictConfig:
    """The run's own configuration, with what is given beside `resume=`, such as a later end."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"resume={run}: no run folder (it has no config.yaml)")
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    changes = [o for o in overrides if not o.startswith("resume=")]
    for change in changes:
        key = change.partition("=")[0]
        if OmegaConf.is_dict(OmegaConf.select(cfg, key, default=None)) or key == "experiment":
            raise ConfigError(f"{change}: a resumed run keeps its groups; change single settings")
    cfg.merge_with_dotlist(changes)
    cfg.resume = str(run)
    return cfg


def train(cfg: DictConfig, run: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train as `cfg` says, in the folder `run`.

    Args:
        cfg: composed from conf/train.yaml. With `resume` set, `run` has been trained before.
        run: the run folder; if a run has taken it already, a numbered neighbour.
        overrides: what was changed on the command line, to be written down.

    Returns:
        What is in summary.json.

    Raises:
        fcn.errors.FCNError: settings, data or weights are wrong, or the loss diverged.
        fcn.errors.Stopped: SIGINT or SIGTERM; the run can be resumed.
    """
    OmegaConf.resolve(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    check_training(config)

    import pytorch_lightning as pl

    from fcn.callbacks import LastCheckpoint
    from fcn.devices import quiet_lightning
    from fcn.runs import create_run_folder, last_checkpoint, write_json, write_settings
    from fcn.summary import summarise
    from fcn.weights import find_weights

    quiet_lightning()
    resuming = bool(cfg.resume)
    checkpoint = last_checkpoint(run) if resuming else None
    if checkpoint is not None and not checkpoint.is_file():
        raise ConfigError(f"resume={run}: there is no {checkpoint} to go on from")
    datamodule = instantiate(cfg.data, _convert_="all")
    if cfg.model.num_classes not in (None, len(datamodule.classes)):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}, but the data has "
            f"{len(datamodule.classes)} classes (background is one, void is none)"
        )
    if cfg.model.weights and not resuming:
        find_weights(cfg.model.backbone, cfg.model.weights)  # known before 2 GB of data are fetched
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule.prepare_data()
    datamodule.setup("fit")
    settle(cfg, images=len(datamodule.train_data))
    module = instantiate(
        cfg.model,
        weights=None if resuming else cfg.model.weights,  # a checkpoint has them all
        class_names=list(datamodule.classes),
        palette=[list(colour) for colour in datamodule.palette],
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        _convert_="all",
    )

    if not resuming:
        run = create_run_folder(run)
        if OmegaConf.select(cfg, "logger._target_"):
            cfg.logger.id = cfg.logger.id or secrets.token_hex(4)  # kept when the run is resumed
    try:
        trainer = build_trainer(cfg, run, resume_from=checkpoint)
    except BaseException:
        if not resuming:
            shutil.rmtree(run)  # nothing is in it yet
        raise
    write_settings(run, cfg, overrides or [])
    print(
        f"run folder: {run}\n{len(datamodule.train_data)} images to train on, "
        f"{len(datamodule.val_data)} to validate on; "
        f"{trainer.strategy.root_device}, {trainer.precision}",
        flush=True,
    )

    status, exit_code = "finished", 0
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        status, exit_code = "stopped", stop.exit_code
        print(f"\nstopped by {stop}; go on with: python train.py resume={run}", flush=True)
        raise
    except BaseException:
        exit_code = 1
        raise
    finally:
        finish_wandb(trainer, exit_code)
        if exit_code != 1:
            keeper = trainer.checkpoint_callbacks[-1]
            assert isinstance(keeper, LastCheckpoint)
            summary = summarise(run, status) | {
                "seconds": round(keeper.seconds, 1),
                "precision": str(trainer.precision),
                "device": str(trainer.strategy.root_device),
            }
            write_json(run / "summary.json", summary)
    return summary


def settle(cfg: DictConfig, images: int) -> None:
    """Replace what depends on machine and data, `auto` and epochs, by what it means here."""
    from fcn.devices import best_precision

    if cfg.trainer.max_epochs is not None:
        batch = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
        cfg.trainer.max_steps = math.ceil(cfg.trainer.max_epochs * images / batch)
        cfg.trainer.max_epochs = None
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = best_precision(cfg.trainer.accelerator)
    if OmegaConf.select(cfg, "optimizer.fused") == "auto":
        cfg.optimizer.fused = cfg.trainer.precision != "16-mixed"


def build_trainer(cfg: DictConfig, run: Path, resume_from: Path | None) -> "pl.Trainer":
    """The Trainer with its callbacks and loggers, all writing below `run`."""
    from fcn.callbacks import (
        AtomicCheckpointIO,
        BestCheckpoint,
        Curves,
        LastCheckpoint,
        LossStatistics,
        Panels,
        ProgressBar,
        ScoreTable,
    )
    from fcn.csv_logger import MetricsCSV

    csv = MetricsCSV(run / "metrics.csv", resume_step=checkpoint_step(resume_from))
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    callbacks = [
        LossStatistics(half_life=cfg.callbacks.half_life, window=cfg.callbacks.window),
        Panels(images=cfg.callbacks.panel_images, folder=run / "panels"),
        Curves(csv=csv),
        ScoreTable(),
        BestCheckpoint(run=run),
        LastCheckpoint(
            every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
            run=run,
            seed=cfg.seed,
            config=config,
        ),
    ]
    if cfg.trainer.enable_progress_bar:
        callbacks.insert(0, ProgressBar())
    # The loader never ends, so Lightning sees one epoch; it counts batches, we count steps.
    batches = cfg.trainer.val_check_interval * cfg.trainer.accumulate_grad_batches
    return instantiate(
        cfg.trainer,
        _convert_="all",
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=batches,
        logger=[csv, *wandb_loggers(cfg, run)],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # our stream shares itself out between processes
    )


def checkpoint_step(checkpoint: Path | None) -> int:
    """The optimizer step at which a checkpoint was made."""
    import torch

    if checkpoint is None:
        return 0
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def wandb_loggers(cfg: DictConfig, run: Path) -> list["Logger"]:
    """The W&B logger, online if there is a key; none with logger=none."""
    if not OmegaConf.select(cfg, "logger._target_"):
        return []
    # W&B's service logs to ~/.cache otherwise; a sweep has one service, so its first run has them
    os.environ.setdefault("WANDB_CACHE_DIR", str(run.absolute() / "wandb" / "cache"))
    import wandb

    options: dict[str, Any] = {
        "save_dir": run,
        "config": OmegaConf.to_container(cfg),
        "settings": wandb.Settings(quiet=True),
    }
    if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
        options["mode"] = "offline"
        print(f"W&B: not logged in, so offline; upload with: wandb sync {run}/wandb/*run-*")
    logger = instantiate(cfg.logger, _convert_="all", _partial_=True)(**options)
    for metric, summary in (("train/loss_smooth", "min"), ("val/loss", "min"), ("val/miou", "max")):
        logger.experiment.define_metric(
            metric, summary=summary, step_metric="trainer/global_step", step_sync=True
        )
    return [logger]


def finish_wandb(trainer: "pl.Trainer", exit_code: int) -> None:
    """End the W&B run, so that a sweep's next job starts its own."""
    from pytorch_lightning.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=exit_code)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    with short_messages(HydraException, OmegaConfBaseException):
        main()
