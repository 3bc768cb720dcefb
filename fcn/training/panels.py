"""Pictures of what the network predicts, at each validation.

python train.py callbacks.panels.images=12
python train.py callbacks.panels=null           # without these pictures
"""

import math
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from fcn.errors import check_whole
from fcn.figures.masks import resize_to_fit, to_pil
from fcn.figures.panels import draw_panels
from fcn.files import atomic_write, optional_file
from fcn.metrics import confusion_matrix, segmentation_scores
from fcn.module import SegmentationModule
from fcn.transforms import pad

WANDB_SIDE = 512  # pixels; W&B gets no larger images


class Panels(Callback):
    """Draws the same images at each validation, taken evenly from the whole validation split.

    Neighbours in a list are often alike, such as the frames of a film, so the first images of a
    split would show little. `panels/step_<step>.png` has a row for each image: image | label |
    prediction | errors. W&B gets `val/panels`: the images with both masks as overlays.

    In a distributed run the first process draws, and takes them from its own part of the split.

    Args:
        images: how many images to draw; 0: none.

    Raises:
        ConfigError: `images` is not a whole number from 0 up.
    """

    def __init__(self, *, images: int = 6) -> None:
        check_whole("images", images)
        self.images = images
        self.seen = 0  # images of this validation so far
        self.places: set[int] = set()  # of the images to draw, counted in this process
        self.ids: list[str] = []
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # image, label, prediction

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Remove the pictures of steps after the checkpoint that a resumed run goes on from."""
        for path in Path(trainer.default_root_dir).glob("panels/*.png"):
            step = re.fullmatch(r"step_(\d+)", path.stem)
            if step and int(step[1]) > trainer.global_step and trainer.is_global_zero:
                with optional_file(path, "removed"):  # it may be open in another program
                    path.unlink()

    def on_validation_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.ids, self.rows, self.seen = [], [], 0
        loader: Any = trainer.val_dataloaders
        # limit_val_batches may end a validation before the end of the split.
        total = min(len(loader.sampler), int(trainer.num_val_batches[0]) * loader.batch_size)
        wanted = min(self.images, total) if trainer.is_global_zero else 0
        self.places = {i * total // wanted for i in range(wanted)}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the images to draw, with their labels and predictions."""
        for i, name in enumerate(batch["id"]):
            if self.seen + i in self.places:
                self.ids.append(str(name).encode(errors="replace").decode())
                height, width = batch["size"][i]  # without the padding of the batch
                image = batch["image"][i, :, :height, :width].cpu()  # (3, H, W)
                label = batch["mask"][i, :height, :width].cpu()  # (H, W)
                prediction = outputs["prediction"][i, :height, :width].cpu()  # (H, W)
                self.rows.append((image, label, prediction))
        self.seen += len(batch["id"])

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not self.rows or trainer.sanity_checking:
            return
        captions = [_score(label, prediction, module) for _, label, prediction in self.rows]
        with optional_file(Path(trainer.default_root_dir) / "panels"):
            self._draw(trainer, module, captions)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._log(logger, trainer.global_step, module, captions)

    def _draw(self, trainer: pl.Trainer, module: Any, captions: list[str]) -> None:
        picture = draw_panels(
            self.rows,
            class_names=module.class_names,
            palette=module.hparams["palette"],
            void=module.void,
            title=f"step {trainer.global_step}, val mIoU {module.scores['miou']:.3f}",
            ids=self.ids,
            captions=captions,
        )
        folder = Path(trainer.default_root_dir) / "panels"
        folder.mkdir(exist_ok=True)  # this fails if somebody has removed the run folder, as it must
        with atomic_write(folder / f"step_{trainer.global_step:07d}.png") as part:
            picture.save(part, "png")

    def _log(
        self, logger: WandbLogger, step: int, module: SegmentationModule, captions: list[str]
    ) -> None:
        labels = dict(enumerate(module.class_names)) | {module.void: "void"}
        small = [[_at_most(x, WANDB_SIDE) for x in row] for row in self.rows]
        # W&B shows all pictures of a list in the size of the first one, so that others would be
        # distorted.
        size = tuple(max(label.shape[i] for _, label, _ in small) for i in (0, 1))
        small = [[pad(x, size) for x in row] for row in small]
        logger.log_image(
            "val/panels",
            [to_pil(image) for image, _, _ in small],
            step,
            caption=[f"{name}, {score}" for name, score in zip(self.ids, captions, strict=True)],
            file_type=["jpg"] * len(small),
            masks=[
                {
                    "ground_truth": {"mask_data": label.numpy(), "class_labels": labels},
                    "predictions": {"mask_data": prediction.numpy(), "class_labels": labels},
                }
                for _, label, prediction in small
            ],
        )


def _score(label: Tensor, prediction: Tensor, module: SegmentationModule) -> str:
    """The mean IoU of one image, over the classes that occur in its label or prediction."""
    confusion = confusion_matrix(prediction, label, len(module.class_names), module.void)
    iou = segmentation_scores(confusion)["miou"]
    return "all void" if math.isnan(iou) else f"IoU {iou:.3f}"


def _at_most(picture: Tensor, side: int) -> Tensor:
    """An image (3, H, W) or mask (H, W), smaller if its longer side is more than `side` pixels."""
    side = min(side, max(picture.shape[-2:]))
    return resize_to_fit(picture, side, side)
