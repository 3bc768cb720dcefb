"""What an evaluation needs beside the module's own metrics: checkpoints read, results written."""

import csv
import pickle
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcn.errors import WeightsError
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.runs import atomic_write

CONTENTS = {"state_dict", "hyper_parameters", "config", "precision", "global_step"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours; tensors stay on disk until they are used.

    Raises:
        WeightsError: there is none at `path`, it is broken, not ours, or could run code.
    """
    if not path.is_file():
        raise WeightsError(f"ckpt={path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"ckpt={path} holds more than tensors and plain values; loading it could run code"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise WeightsError(f"ckpt={path} cannot be read: {str(error).splitlines()[0]}") from error
    missing = CONTENTS - set(checkpoint) if isinstance(checkpoint, dict) else CONTENTS
    if missing:
        raise WeightsError(
            f"ckpt={path} is no checkpoint of this codebase: it has no {', '.join(sorted(missing))}"
        )
    return checkpoint


def checkpoint_data(path: Path) -> dict[str, Any]:
    """The data settings of the run that made a checkpoint.

    Raises:
        WeightsError: as `read_checkpoint`; also if the settings name code that is not ours, since
            Hydra would call it.
    """
    config = read_checkpoint(path)["config"]
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        raise WeightsError(f"ckpt={path} has no data settings; choose the data with data=...")
    _check_harmless(path, data)
    return data


def _check_harmless(path: Path, value: Any) -> None:
    """Refuse what Hydra or OmegaConf would call while they turn settings into a data module."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "_target_" and not _is_ours(inner):
                raise WeightsError(
                    f"ckpt={path} wants to call {inner}; choose the data with data=..."
                )
            _check_harmless(path, key)
            _check_harmless(path, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_harmless(path, inner)
    elif isinstance(value, str) and "${" in value:  # a run's settings are resolved when saved
        raise WeightsError(f"ckpt={path} wants to run {value}; choose the data with data=...")


def _is_ours(target: Any) -> bool:
    """Whether this names our data module, or a class that a file of fcn/datasets/ defines."""
    module, _, name = str(target).rpartition(".")
    if str(target) == "fcn.datamodule.SegmentationDataModule":
        return True
    if not re.fullmatch(r"fcn\.datasets\.\w+", module) or find_spec(module) is None:
        return False
    found = getattr(import_module(module), name, None)
    return isinstance(found, type) and found.__module__ == module


class ImageScores(Callback):
    """Pixel accuracy and mean IoU of each image alone, in the loader's order.

    Args:
        ids: of the images.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids
        self.rows: list[tuple[str, float, float]] = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, SegmentationModule)
        for mask, prediction in zip(batch["mask"], outputs["prediction"], strict=True):
            confusion = multiclass_confusion_matrix(
                prediction,
                mask,
                num_classes=len(pl_module.class_names),
                ignore_index=pl_module.void,
                validate_args=False,
            )
            scores = segmentation_scores(confusion)
            name = self.ids[len(self.rows)]
            self.rows.append((name, scores["pixel_acc"], scores["miou"]))

    def write(self, path: Path) -> None:
        """One row an image; nothing where all of it is void."""
        with atomic_write(path) as file:
            writer = csv.writer(file)
            writer.writerow(("id", "pixel_acc", "miou"))
            for name, *values in self.rows:
                writer.writerow((name, *("" if v != v else v for v in values)))


def write_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> None:
    """The confusion matrix in pixels: a row for each label, a column for each prediction."""
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(("label", *class_names))
        for name, row in zip(class_names, confusion.tolist(), strict=True):
            writer.writerow((name, *row))
