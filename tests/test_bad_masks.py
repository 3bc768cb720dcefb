"""Masks that are unusual train; masks that are wrong are refused by their name."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, compose_config, write_mask
from PIL import Image

from fcn.datamodule import SegmentationDataModule
from fcn.datasets.folder import Folder
from fcn.errors import DataError
from train import train

GOOD = np.zeros((40, 48), np.uint8)
GOOD[10:30, 10:40] = 1
GOOD[9] = 255
UNUSUAL = {
    "all_void": np.full_like(GOOD, 255),
    "background_only": np.zeros_like(GOOD),
    "one_class_only": np.ones_like(GOOD),
    "grey_not_palette": Image.fromarray(GOOD),
    "sixteen_bits": Image.fromarray(GOOD.astype(np.uint16)),
}


def colour(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([mask, mask, 0 * mask], 2))


def write_pairs(root: Path, masks: dict[str, np.ndarray | Image.Image]) -> None:
    """Training pairs with these masks, and one good pair to validate on."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for name, mask in {**masks, "val": GOOD}.items():
        Image.effect_noise((48, 40), 80).convert("RGB").save(root / "images" / f"{name}.jpg")
        if isinstance(mask, Image.Image):
            mask.save(root / "masks" / f"{name}.png")
        else:
            write_mask(root / "masks" / f"{name}.png", mask)
    (root / "val.txt").write_text("val\n")


def train_on(root: Path, steps: int) -> dict[str, float]:
    options = ["data=folder", f"data.root={root}", "data.dataset.classes=[a,b]"]
    options += ["data.dataset.val=val.txt", "data.num_workers=0", "data.crop_size=32"]
    options += ["data.batch_size=1", f"trainer.max_steps={steps}", "callbacks.panels.images=0"]
    options += ["callbacks.curves=null", f"trainer.val_check_interval={steps}"]
    tiny = [o for o in TINY if not o.startswith("data")]
    return train(compose_config("train", *tiny, *options), root / "run")


@pytest.mark.slow
def test_unusual_masks_train(tmp_path: Path) -> None:
    """Each of them is a batch of its own, twice."""
    write_pairs(tmp_path, UNUSUAL)
    summary = train_on(tmp_path, 2 * len(UNUSUAL))
    assert summary["steps"] == 2 * len(UNUSUAL)
    assert 0 <= summary["train/loss_smooth"] < 10
    assert 0 <= summary["val/miou"] <= 1


def test_wrong_mask_ends_training(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"bad": GOOD.T.copy()})
    with pytest.raises(DataError, match=r"bad\.png: the mask is 40×48, its image 48×40"):
        train_on(tmp_path, 2)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (colour(GOOD), r"bad\.png: a mask of mode RGB needs data\.dataset\.palette"),
        (colour(GOOD).convert("RGBA"), r"bad\.png: a mask of mode RGBA"),
        (np.where(GOOD == 1, 7, GOOD).astype(np.uint8), r"bad\.png: labels must .* found 7"),
        (Image.fromarray(GOOD.astype(np.uint16) * 300), r"bad\.png: labels must .* found 300"),
        (GOOD[:, :-1], r"bad\.png: the mask is 47×40, its image 48×40"),
        (GOOD[:1, :1], r"bad\.png: the mask is 1×1, its image 48×40"),
        (GOOD.T.copy(), r"bad\.png: the mask is 40×48, its image 48×40"),
    ],
    ids=["colour", "alpha", "value", "large value", "narrow", "one pixel", "turned"],
)
def test_refused_by_name(tmp_path: Path, mask: np.ndarray | Image.Image, message: str) -> None:
    write_pairs(tmp_path, {"bad": mask})
    dataset = partial(Folder, classes=["a", "b"], val="val.txt")
    datamodule = SegmentationDataModule(dataset=dataset, root=tmp_path, num_workers=0, crop_size=32)
    datamodule.setup("fit")
    with pytest.raises(DataError, match=message) as error:
        next(iter(datamodule.train_dataloader()))
    assert len(str(error.value).splitlines()) == 1
