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

from fcn.cards import warn_about_unused_card
from fcn.datamodule import SegmentationDataModule
from fcn.datasets import SegmentationDataset
from fcn.datasets.pictures import image_size
from fcn.datasets.reading import Pairs
from fcn.datasets.survey import Survey, balanced_weights
from fcn.errors import ConfigError, refuse
from fcn.module import SegmentationModule
from fcn.precision import best_layout, best_precision, keep_freed_memory, main_device, precisions_of
from fcn.runs.process import is_main_process
from fcn.training.batch_size import largest_batch

LARGEST_IMAGE = 500  # pixels, the longest side of VOC2012's images


def settle_precision(config: Any) -> None:
    """Replace "auto" by what is fast and stable on this machine, and prepare its memory.

    Raises:
        ConfigError: the device cannot compute in this precision; or a fused optimizer would make
            clipping and `train/grad_norm` wrong.
    """
    keep_freed_memory()
    trainer, optimizer, model = config["trainer"], config["optimizer"], config["model"]
    if trainer["accelerator"] == "auto" and is_main_process():
        warn_about_unused_card()
    device = main_device(trainer["accelerator"], trainer["devices"])
    if trainer["precision"] == "auto":
        trainer["precision"] = best_precision(device)
    scaled = trainer["precision"] == "16-mixed"
    if optimizer.get("fused") == "auto":
        optimizer["fused"] = not scaled
    if trainer["precision"] not in precisions_of(device):
        wanted = f"32-true, or auto, on the device {device.type}"
        refuse("trainer.precision", trainer["precision"], wanted)
    if optimizer.get("fused") and scaled:
        why = "a fused optimizer divides the gradients by the scale of the loss by itself, after "
        why += "they were clipped and after their norm was logged"
        refuse("optimizer.fused", True, f"auto or false in 16-mixed, where {why}")
    if model.get("channels_last") == "auto":
        model["channels_last"] = best_layout(device, trainer["precision"])
    if trainer.get("benchmark") is None:
        # cuDNN's search for the fastest algorithm pays where it is not repeated for each image.
        same_size = config["data"].get("crop_size") is not None
        trainer["benchmark"] = same_size and not trainer.get("deterministic")


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
        ConfigError: there is no GPU, or more than one, to find a batch size for; or the run would
            be shorter than its least number of steps, or validate nothing.
    """
    data, settings = config["data"], config["trainer"]
    images = len(datamodule.train_data)
    if data["batch_size"] == "auto":
        data["batch_size"] = _find_batch_size(config, datamodule.train_data, module, trainer)
        datamodule.batch_size = data["batch_size"]
        print(f"data.batch_size={data['batch_size']} is the largest that fits", flush=True)
    if settings["max_epochs"] is not None:
        step = data["batch_size"] * settings["accumulate_grad_batches"] * trainer.world_size
        steps = math.ceil(settings["max_epochs"] * images / step)
        if is_main_process():
            given = f"trainer.max_epochs={settings['max_epochs']}"
            print(f"{given}: these are {steps} steps, as trainer.max_steps={steps}", flush=True)
        settings["max_steps"], settings["max_epochs"] = steps, None
    least, most = settings.get("min_steps") or 0, settings["max_steps"]
    if least > most != -1:
        refuse("trainer.min_steps", least, f"at most {most}, the number of steps of this run")
    share = settings.get("limit_val_batches")
    here = len(datamodule.val_data) // trainer.world_size  # Lightning rounds down, too
    batches = math.ceil(here / data["eval_batch_size"])
    if isinstance(share, float) and batches and int(share * batches) == 0:
        wanted = f"null, a whole number, or a share up to 1.0, of at least one of {batches} batches"
        refuse("trainer.limit_val_batches", share, wanted)


def settle_class_weights(
    config: Any, datamodule: SegmentationDataModule, module: SegmentationModule
) -> None:
    """Replace model.class_weights by weights that average 1 over all training pixels.

    A learning rate then means the same with and without weights. "balanced" gives each class a
    weight in inverse proportion to its pixels. All masks of the training split are read for it.

    Raises:
        DataError: a mask cannot be read.
        ConfigError: the classes that have a weight above 0 do not occur.
    """
    given = config["model"].get("class_weights")
    if given is None:
        return
    survey = Survey(datamodule.train_split, datamodule.train_data)
    if survey.errors:
        raise survey.errors[0]
    pixels = survey.pixels[: len(module.class_names)]  # (K,)
    if given == "balanced":
        weights = balanced_weights(pixels)
    else:
        total = float(np.dot(given, pixels))
        if not total:
            refuse("model.class_weights", given, "above 0 for a class of the training pixels")
        weights = [float(weight * pixels.sum() / total) for weight in given]
    config["model"]["class_weights"] = weights
    module.set_class_weights(weights)
    if is_main_process():
        named = zip(module.class_names, weights, strict=True)
        print("class weights:", ", ".join(f"{name} {weight:.3g}" for name, weight in named))


def largest_image(images: SegmentationDataset) -> tuple[int, int] | None:
    """The greatest height and the greatest width of images in files; None for generated images.

    Raises:
        DataError: an image cannot be opened.
    """
    if not isinstance(images, Pairs):
        return None
    files = [images.pairs[name][0] for name in images.ids]
    sizes = [image_size(file, max_pixels=images.max_pixels)[0] for file in files]
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def batch_image_size(
    data: Mapping[str, Any], largest: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The largest height and width that a training batch can have.

    They are those of the crop. Without one, they are those of the images, times the largest scale.

    Args:
        data: the settings of conf/data.
        largest: the greatest height and width of the images. None: those of generated images, or of
            VOC2012's for all other data.
    """
    if data["crop_size"]:
        height, width = np.broadcast_to(data["crop_size"], 2).tolist()
        return height, width
    scale = max(data["scale"] or [1])
    height, width = largest or (data["dataset"].get("size", LARGEST_IMAGE),) * 2
    return round(height * scale), round(width * scale)


def _find_batch_size(
    config: Mapping[str, Any],
    images: SegmentationDataset,
    module: SegmentationModule,
    trainer: pl.Trainer,
) -> int:
    device = trainer.strategy.root_device
    if trainer.world_size > 1 or device.type != "cuda":  # Lightning knows CUDA's errors only
        raise ConfigError(
            "data.batch_size=auto looks for what fits on one CUDA GPU; here are "
            f"{trainer.world_size} x {device}. "
            "Give a number; `python -m fcn.memory` tells what fits"
        )
    names = ("accelerator", "devices", "precision", "accumulate_grad_batches", "benchmark")
    options = {name: config["trainer"][name] for name in names if name in config["trainer"]}
    size = batch_image_size(config["data"], largest_image(images))
    return largest_batch(module, size, most=len(images), **options)
