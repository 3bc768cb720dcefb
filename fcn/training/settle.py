"""Settings that depend on the machine and the data: precision, batch size, number of steps.

    settle_precision(cfg)                          # as train.py calls them
    settle_length(cfg, datamodule, module)

`config` is what conf/train.yaml composes to, resolved. It is changed in place: where it says "auto"
it gets the value that is used, so that the run's config.yaml and its checkpoints hold that value.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

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
    config: Any, datamodule: SegmentationDataModule, module: SegmentationModule
) -> None:
    """Replace data.batch_size=auto by what fits, and epochs by optimizer steps.

    Raises:
        ConfigError: there is no GPU, or more than one, to find a batch size for.
    """
    data, trainer = config["data"], config["trainer"]
    assert datamodule.train_data is not None
    images = len(datamodule.train_data)
    if data["batch_size"] == "auto":
        data["batch_size"] = _find_batch_size(data, trainer, module, images)
        datamodule.batch_size = data["batch_size"]
        print(f"data.batch_size={data['batch_size']} is the largest that fits", flush=True)
    if trainer["max_epochs"] is not None:
        processes, _ = _devices(trainer)
        step = data["batch_size"] * trainer["accumulate_grad_batches"] * processes
        trainer["max_steps"] = math.ceil(trainer["max_epochs"] * images / step)
        trainer["max_epochs"] = None


def image_size(data: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a training batch: those of the crop, or of the largest image.

    Args:
        data: the settings of conf/data.
    """
    largest = data["dataset"].get("size", LARGEST_IMAGE) * max(data["scale"] or [1])
    height, width = np.broadcast_to(data["crop_size"] or round(largest), 2).tolist()
    return height, width


def _find_batch_size(
    data: Mapping[str, Any], trainer: Mapping[str, Any], module: SegmentationModule, images: int
) -> int:
    processes, device = _devices(trainer)
    if processes > 1 or device.type == "cpu":
        raise ConfigError(
            "data.batch_size=auto looks for what fits on one GPU; here are "
            f"{processes} x {device}. Give a number; `python -m fcn.memory` tells what fits"
        )
    names = ("accelerator", "devices", "precision", "accumulate_grad_batches", "benchmark")
    options = {name: trainer[name] for name in names if name in trainer}
    return largest_batch(module, image_size(data), most=images, **options)


def _devices(trainer: Mapping[str, Any]) -> tuple[int, torch.device]:
    """How many processes train with these settings, and the device of this process."""
    names = ("accelerator", "devices", "num_nodes")
    given = {name: trainer[name] for name in names if name in trainer}
    stand_in = pl.Trainer(**given, barebones=True)
    return stand_in.world_size, stand_in.strategy.root_device
