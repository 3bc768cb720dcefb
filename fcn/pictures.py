"""Pictures of a run while it trains: panels, animations, curves, and what W&B gets of them."""

import gc
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from fcn.csv_logger import MetricsCSV, read_numbers
from fcn.errors import reason
from fcn.module import SegmentationModule
from fcn.visualize import (
    animate,
    draw_curves,
    fit,
    image_iou,
    iou_text,
    panel,
    progress_frame,
    to_pil,
    whole,
)

WANDB_SIDE = 512  # pixels; W&B gets no larger images


@contextmanager
def dispensable(path: Path) -> Iterator[None]:
    """A picture that cannot be written is missed; the run goes on. Each path is warned of once."""
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written ({reason(error)}); training goes on without it"
        warnings.warn(message, stacklevel=3)


class Panels(Callback):
    """The same images of the validation split, its first, at each validation.

    `panels/step_<step>.png`: image | label | prediction | errors, a row for each image.
    `panels/progress_<number>.gif`: the predictions of one image so far, beside its label; number 1
    is the panel's first row. It is made anew of `panels/frames/<number>_<image>_<step>.png`, so
    that a resumed run goes on with it. W&B gets `val/panels`: images with both masks as overlays.

    Of several processes, the first one writes what it sees: the first images of the split.

    Args:
        images: how many.
        folder: where the pictures go.
    """

    def __init__(self, *, images: int = 6, folder: Path) -> None:
        self.images, self.folder = images, folder
        self.ids: list[str] = []
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # image, label, prediction

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove pictures of steps that a resumed run takes again; metrics.csv does likewise."""
        for path in [*self.folder.glob("*.png"), *self.folder.glob("frames/*.png")]:
            step = re.fullmatch(r"(?:step|\d+_[0-9a-f]{8})_(\d+)", path.stem)
            if step and int(step[1]) > trainer.global_step and trainer.is_global_zero:
                path.unlink()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ids, self.rows = [], []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.images - len(self.rows)
        self.ids += [str(x).encode(errors="replace").decode() for x in batch["id"][:wanted]]
        for row in zip(
            batch["image"][:wanted],
            batch["mask"][:wanted],
            outputs["prediction"][:wanted],
            strict=True,
        ):
            self.rows.append(tuple(tensor.cpu() for tensor in row))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.rows or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SegmentationModule)
        with dispensable(self.folder):
            self._draw(trainer, pl_module)
        self.ids, self.rows = [], []

    def _draw(self, trainer: pl.Trainer, pl_module: SegmentationModule) -> None:
        assert pl_module.scores is not None
        names, void, step = pl_module.class_names, pl_module.void, trainer.global_step
        colours = {"palette": pl_module.hparams["palette"], "void": void}
        for folder in (self.folder, self.folder / "frames"):  # but never the run folder anew
            folder.mkdir(exist_ok=True)
        picture = panel(
            self.rows,
            class_names=names,
            title=f"step {step}, val mIoU {pl_module.scores['miou']:.3f}",
            ids=self.ids,
            **colours,
        )
        with whole(self.folder / f"step_{step:07d}.png") as part:
            picture.save(part)

        scores = [iou_text(image_iou(y, p, len(names), void)) for _, y, p in self.rows]
        for number, (name, score) in enumerate(zip(self.ids, scores, strict=True), 1):
            _, label, prediction = self.rows[number - 1]
            frame = progress_frame(
                label, prediction, title=f"step {step}", captions=(name, score), **colours
            )
            self._animate(number, step, name, frame)

        labels = dict(enumerate(names)) | {void: "void"}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                small = [[_at_most(x, WANDB_SIDE) for x in row] for row in self.rows]
                logger.log_image(
                    "val/panels",
                    [to_pil(image) for image, _, _ in small],
                    step,
                    caption=[f"{n}, {score}" for n, score in zip(self.ids, scores, strict=True)],
                    file_type=["jpg"] * len(small),
                    masks=[
                        {
                            "ground_truth": {"mask_data": y.numpy(), "class_labels": labels},
                            "predictions": {"mask_data": p.numpy(), "class_labels": labels},
                        }
                        for _, y, p in small
                    ],
                )

    def _animate(self, number: int, step: int, name: str, frame: Image.Image) -> None:
        """Keep this frame, and make the animation of all frames of the same image."""
        key = zlib.crc32(f"{name} {frame.size}".encode())  # a resumed run may have other data
        with whole(self.folder / "frames" / f"{number}_{key:08x}_{step:07d}.png") as part:
            frame.save(part)
        frames = part.parent.glob(f"{number}_{key:08x}_*.png")
        in_order = sorted(frames, key=lambda path: int(path.stem.rpartition("_")[2]))
        animate(in_order, self.folder / f"progress_{number}.gif")


def _at_most(picture: Tensor, side: int) -> Tensor:
    """An image (3, H, W) or mask (H, W), smaller if its longer side is more than `side` pixels."""
    side = min(side, max(picture.shape[-2:]))
    return fit(picture, side, side)


class Curves(Callback):
    """curves.png, drawn from metrics.csv after every validation."""

    def __init__(self, *, csv: MetricsCSV) -> None:
        self.csv = csv

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            path = self.csv.path.with_name("curves.png")
            with dispensable(path):
                draw_curves(read_numbers(self.csv.path), path)
            gc.collect()  # a figure is a cycle of several MB; train.py freezes what is older


class WandbScores(Callback):
    """At the end, W&B gets the last validation: `iou_by_class`, a bar chart, and
    `confusion_matrix`, a table in pixels with a row for each label."""

    def __init__(self) -> None:
        self.step, self.confusion = 0, list[list[int]]()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        if not trainer.sanity_checking:
            # The module has just computed it, of all processes: torchmetrics kept that.
            self.step, self.confusion = trainer.global_step, pl_module.confusion.compute().tolist()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not self.confusion or not loggers or not trainer.is_global_zero:
            return
        import wandb

        assert isinstance(pl_module, SegmentationModule)
        assert pl_module.scores is not None
        names = pl_module.class_names
        ious = [
            [n, None if v != v else v] for n, v in zip(names, pl_module.scores["iou"], strict=True)
        ]
        counts = [[name, *row] for name, row in zip(names, self.confusion, strict=True)]
        for logger in loggers:
            bars = wandb.Table(["class", "IoU"], data=ious)
            logger.experiment.log(
                {
                    "iou_by_class": wandb.plot.bar(bars, "class", "IoU", title="IoU by class"),
                    "confusion_matrix": wandb.Table(["label \\ prediction", *names], data=counts),
                    "trainer/global_step": self.step,
                }
            )
