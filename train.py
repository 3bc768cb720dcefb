"""Train a fully convolutional network (Long, Shelhamer, Darrell, CVPR 2015).

    python train.py experiment=quickstart              minutes on a CPU, no download
    python train.py model=fcn8s data.batch_size=2      PASCAL VOC2012 and ImageNet weights
    python train.py -m model=fcn32s,fcn16s,fcn8s optimizer.lr=1e-3,1e-4     a sweep
    python train.py resume=runs/fcn8s/2026-01-31_12-00-00                   goes on with a run
    python train.py model=fcn8s resume=auto     goes on with the last run of this command, or
                                                starts one; does nothing if that has finished

`--help` lists the groups of settings, and `--cfg job` lists every setting. What a run leaves in its
folder is described in fcn/runs/folder.py. torch and Lightning, which take seconds to import, are
imported only where they are needed, so that `--help` and `--cfg job` answer at once.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fcn import cli

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from fcn.datamodule import SegmentationDataModule
    from fcn.module import SegmentationModule


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep. Returns its best val/miou, for sweepers such as Optuna's."""
    from fcn.runs.launch import launch

    return launch(cfg, train)


def train(cfg: DictConfig, run: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train as `cfg` says, in the folder `run`, and return what summary.json holds.

    Args:
        cfg: composed from conf/train.yaml. With `resume` set, `run` has been trained before.
        run: the run folder; if it is taken, a number is added.
        overrides: what was changed on the command line, to be kept in the run folder.

    Raises:
        FCNError: settings, data or weights are wrong, or the loss has diverged.
        Stopped: a signal has come; the run can be resumed.
    """
    from pytorch_lightning import Callback, seed_everything

    from fcn.runs.folder import lock_run, new_run, write_settings
    from fcn.runs.process import is_main_process, quiet_lightning
    from fcn.runs.resume import check_steps_left
    from fcn.training.fit import checkpoint_to_resume, fit
    from fcn.training.no_logger import NoLogger
    from fcn.training.settings import check_settings
    from fcn.training.settle import settle_class_weights, settle_length, settle_precision
    from fcn.training.trainer import build_trainer, refuse_sweep_over_devices

    cfg = cli.resolved(cfg)
    check_settings(cli.plain(cfg))
    quiet_lightning()
    with ExitStack() as stack:
        if cfg.resume and is_main_process():
            stack.enter_context(lock_run(run))
        settle_precision(cfg)
        seed_everything(cfg.seed, workers=True, verbose=False)
        trial = build_trainer(cfg)  # Lightning refuses what cannot work before data is fetched
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            refuse_sweep_over_devices(trial)
        callbacks = cli.build_each(cfg, "callbacks", Callback)
        datamodule, module = build_data_and_module(cfg, callbacks)
        if not cfg.resume:  # a resumed run has the numbers in its config.yaml
            settle_class_weights(cfg, datamodule, module)
        settle_length(cfg, datamodule, module, trial)
        checkpoint, step = None, 0
        if cfg.resume:
            checkpoint, step = checkpoint_to_resume(run, module, datamodule)
            check_steps_left(run, cfg, step)
        if cfg.trainer.get("compile"):  # a resumed run may be older than this setting
            module.network.compile()
        if is_main_process() and not cfg.resume:
            run = stack.enter_context(new_run(run))
        loggers = build_loggers(cfg, run, step) if is_main_process() else [NoLogger()]
        trainer = build_trainer(cfg, run, list(callbacks.values()), loggers)
        if is_main_process():
            write_settings(run, cfg, overrides or [])
            device = f"{trainer.world_size} x {trainer.strategy.root_device}, {trainer.precision}"
            images = f"{len(datamodule.train_data)} images to train on, "
            images += f"{len(datamodule.val_data)} to validate on"
            print(f"run folder: {run}\n{images}; {device}", flush=True)
        return fit(
            trainer, module, datamodule, checkpoint, lambda size: advice(cfg, datamodule, size)
        )


def advice(cfg: DictConfig, datamodule: "SegmentationDataModule", size: int) -> str:
    """A text on the settings that need less memory than the `size` bytes that a device has."""
    from fcn import memory
    from fcn.training.settle import largest_image

    return memory.advice(cfg, size, largest_image(datamodule.train_data))


def build_data_and_module(
    cfg: DictConfig, callbacks: "Mapping[str, pl.Callback] | None" = None
) -> "tuple[SegmentationDataModule, SegmentationModule]":
    """The data module with open splits and the module with its weights.

    Everything that can be checked without the data is checked before anything is downloaded. This
    includes the names of the scores that `callbacks` monitor.

    Raises:
        FCNError: a setting cannot work, or the data or the weights cannot be had.
    """
    from fcn.datasets.survey import before_training
    from fcn.runs.process import is_main_process
    from fcn.schedules import no_limit
    from fcn.training.settings import check_callbacks, dummy_parameters
    from fcn.weights import find_weights

    optimizer = cli.build(cfg, "optimizer", _partial_=False, params=dummy_parameters())
    arguments = {"optimizer": optimizer, "total_steps": 1, "time_used": no_limit}
    cli.build(cfg, "scheduler", _partial_=False, **arguments)
    datamodule = cli.build(cfg, "data")
    names, palette = list(datamodule.classes), [list(colour) for colour in datamodule.palette]
    check_callbacks(callbacks or {}, names)
    makers = {name: cli.build(cfg, name) for name in ("optimizer", "scheduler")}
    module = cli.build(cfg, "model", weights=None, class_names=names, palette=palette, **makers)
    weights = None if cfg.resume else cfg.model.weights  # the run's checkpoint has all weights
    if weights is not None:
        find_weights(cfg.model.backbone, weights)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if is_main_process() and not cfg.resume:
        before_training(datamodule)
    if weights is not None:
        module.load_pretrained(weights)
    return datamodule, module


def build_loggers(cfg: DictConfig, run: Path, step: int) -> "list[pl.loggers.Logger]":
    """metrics.csv, continued from optimizer step `step`, and the loggers of conf/logger."""
    from pytorch_lightning.loggers import Logger

    from fcn.runs.loggers import logger_settings
    from fcn.training.metrics_csv import MetricsCSV

    others = cli.build_each(logger_settings(cfg, run), "logger", Logger)
    for logger in others.values():
        logger.log_hyperparams(cli.plain(cfg))
    return [MetricsCSV(run / "metrics.csv", resume_step=step), *others.values()]


if __name__ == "__main__":
    cli.run(main)
