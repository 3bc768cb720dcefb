"""Settings that depend on the machine and the data: precision, batch size, number of steps.

    settle_precision(cfg)                          # as train.py calls them
    settle_length(cfg, datamodule, module, trainer)

`config` is what conf/train.yaml composes to, resolved. It is changed in place: where it says "auto"
it gets the value that is used, so that the run's config.yaml and its checkpoints hold that value.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl

from fcn.datamodule import SegmentationDataModule
from fcn.errors import ConfigError
from fcn.module import SegmentationModule
from fcn.precision import best_precision, keep_freed_memory
from fcn.training.batch_size import largest_batch

LARGEST_IMAGE = 500  # pixels, the longest side of VOC2012's images


def settle_precision(config: Any) -> None:
    """Replace "auto" by what is fast and stable on this machine, and prepare its memory."""
    keep_freed_memory()
    trainer, optimizer = config["trainer"], config["optimizer"]
    if trainer["precision"] == "auto":
        trainer["precision"] = best_precision(trainer["accelerator"])
    if optimizer.get("fused") == "auto":
        optimizer["fused"] = trainer["precision"] != "16-mixed"


def settle_length(
    config: Any,
    datamodule: SegmentationDataModule,
    module: SegmentationModule,
    trainer: pl.Trainer,
) -> None:
    """Replace data.batch_size=auto by what fits, and epochs by optimizer steps.

    Args:
        trainer: a Trainer with the run's devices and precision; it takes no steps.

    Raises:
        ConfigError: there is no GPU, or more than one, to find a batch size for.
    """
    data, settings = config["data"], config["trainer"]
    assert datamodule.train_data is not None
    images = len(datamodule.train_data)
    if data["batch_size"] == "auto":
        data["batch_size"] = _find_batch_size(config, images, module, trainer)
        datamodule.batch_size = data["batch_size"]
        print(f"data.batch_size={data['batch_size']} is the largest that fits", flush=True)
    if settings["max_epochs"] is not None:
        step = data["batch_size"] * settings["accumulate_grad_batches"] * trainer.world_size
        settings["max_steps"] = math.ceil(settings["max_epochs"] * images / step)
        settings["max_epochs"] = None


def image_size(data: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a training batch: those of the crop, or of the largest image.

    Args:
        data: the settings of conf/data.
    """
    largest = data["dataset"].get("size", LARGEST_IMAGE) * max(data["scale"] or [1])
    height, width = np.broadcast_to(data["crop_size"] or round(largest), 2).tolist()
    return height, width


def _find_batch_size(
    config: Mapping[str, Any], images: int, module: SegmentationModule, trainer: pl.Trainer
) -> int:
    device = trainer.strategy.root_device
    if trainer.world_size > 1 or device.type == "cpu":
        raise ConfigError(
            f"data.batch_size=auto looks for what fits on one GPU; here are {trainer.world_size} x "
            f"{device}. Give a number; `python -m fcn.memory` tells what fits"
        )
    names = ("accelerator", "devices", "precision", "accumulate_grad_batches", "benchmark")
    options = {name: config["trainer"][name] for name in names if name in config["trainer"]}
    return largest_batch(module, image_size(config["data"]), most=images, **options)
