"""Score a module on a data set as a validation of training does; compare two such results.

    images = ImageScores()
    trainer = open_trainer("auto", "32-true", images)
    result = score(module, datamodule.eval_dataloader(data), trainer, images)
    result.metrics["miou"]
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from fcn.errors import ConfigError, check_choice, check_text
from fcn.evaluation.boundaries import boundary_miou
from fcn.evaluation.scores import ImageScores
from fcn.module import SegmentationModule
from fcn.precision import PRECISIONS

SCORES = ("pixel_acc", "mean_acc", "miou", "fwiou")


@dataclass
class Result:
    """One checkpoint on one split.

    Attributes:
        metrics: what metrics.json holds: the scores, and where they come from.
        confusion: (K, K) pixels; rows are labels, columns predictions.
        images: the scores of each image, and its prediction if that was kept.
    """

    metrics: dict[str, Any]
    confusion: Tensor
    images: ImageScores


def open_trainer(accelerator: str, precision: str, images: ImageScores) -> pl.Trainer:
    """A trainer that validates on one device and writes nothing.

    Raises:
        ConfigError: the device is not there, or cannot compute in this precision.
    """
    check_text("accelerator", accelerator, wanted="auto, cpu, gpu, mps or another of Lightning's")
    check_choice("precision", precision, PRECISIONS)
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            callbacks=[images],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"accelerator={accelerator} precision={precision}: {error}") from error


def score(
    module: SegmentationModule, loader: DataLoader, trainer: pl.Trainer, images: ImageScores
) -> Result:
    """Validate a module as training does, so that the scores are the same to the last digit.

    Args:
        module: its network may be wrapped, for test-time augmentation.
        loader: each image once, in order.
        trainer: as `open_trainer` gives it.
        images: the trainer's callback.
    """
    started = time.perf_counter()
    trainer.validate(module, loader, verbose=False)
    seconds = time.perf_counter() - started
    assert module.scores is not None
    scores: dict[str, Any] = dict(module.scores)
    metrics = {
        **{name: scores[name] for name in SCORES},
        "loss": module.val_loss,
        "iou": dict(zip(module.class_names, scores["iou"], strict=True)),
        "boundary_miou": boundary_miou(images.bands),
        "images": len(images.rows),
        "images_per_second": len(images.rows) / seconds,
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
    }
    return Result(metrics, module.confusion.compute(), images)


def compare(results: Sequence[Result]) -> dict[str, Any]:
    """metrics.json of a comparison: the metrics of A, those of B, and B minus A."""
    a, b = (result.metrics for result in results)
    difference: dict[str, Any] = {name: b[name] - a[name] for name in SCORES}
    for group in ("iou", "boundary_miou"):
        difference[group] = {name: b[group][name] - a[group][name] for name in a[group]}
    return {"a": a, "b": b, "difference": difference}


def check_classes(modules: Sequence[SegmentationModule], classes: Sequence[str]) -> None:
    """Refuse to compare checkpoints with each other, or with data, that have other classes.

    Args:
        modules: one, or the A and B of a comparison.
        classes: those of the data.

    Raises:
        ConfigError: the names of the classes, or their order, are not the same everywhere.
    """
    first, *others = (module.class_names for module in modules)
    for other in others:
        if other != first:
            raise ConfigError(
                f"compare: A knows {_some(first)}, B {_some(other)}: they must be the same"
            )
    if list(classes) != first:
        raise ConfigError(
            f"the checkpoint knows {_some(first)}, the data {_some(classes)}: "
            "they must be the same"
        )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}, ...)"
