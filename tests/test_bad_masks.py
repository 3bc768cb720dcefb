"""Masks that are not as they should be: each trains, or is refused by its name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, compose_config, write_mask
from PIL import Image

from fcn.errors import DataError
from train import train

GOOD = np.zeros((40, 48), np.uint8)
GOOD[10:30, 10:40] = 1
GOOD[9] = 255


def colour(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask).convert("RGB")


def train_with(root: Path, mask: np.ndarray | Image.Image) -> dict[str, Any]:
    """Two steps on one image with this mask, judged on another."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for name in ("bad", "val"):
        Image.effect_noise((48, 40), 80).convert("RGB").save(root / "images" / f"{name}.jpg")
        write_mask(root / "masks" / f"{name}.png", GOOD)
    if isinstance(mask, Image.Image):
        mask.save(root / "masks" / "bad.png")
    else:
        write_mask(root / "masks" / "bad.png", mask)
    (root / "val.txt").write_text("val\n")
    options = ["data=folder", f"data.root={root}", "data.dataset.classes=[a,b]"]
    options += ["data.dataset.val=val.txt", "data.num_workers=0", "data.crop_size=32"]
    options += ["data.batch_size=1", "trainer.max_steps=2", "callbacks.panel_images=0"]
    tiny = [o for o in TINY if not o.startswith("data")]
    return train(compose_config("train", *tiny, *options), root / "run")


@pytest.mark.parametrize(
    "mask",
    [
        np.full_like(GOOD, 255),
        np.zeros_like(GOOD),
        np.ones_like(GOOD),
        Image.fromarray(GOOD),  # grey, not a palette
        Image.fromarray(GOOD.astype(np.uint16)),
    ],
    ids=["all void", "background only", "one class only", "grey", "16 bits"],
)
def test_trains(tmp_path: Path, mask: np.ndarray | Image.Image) -> None:
    summary = train_with(tmp_path, mask)
    assert summary["steps"] == 2
    assert 0 <= summary["train/loss_smooth"] < 10
    assert 0 <= summary["val/miou"] <= 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (colour(GOOD), r"bad\.png: a mask of mode RGB needs data\.dataset\.palette"),
        (colour(GOOD).convert("CMYK").convert("RGBA"), r"bad\.png: a mask of mode RGBA"),
        (np.where(GOOD == 1, 7, GOOD).astype(np.uint8), r"bad\.png: labels must .* found 7"),
        (Image.fromarray(GOOD.astype(np.uint16) * 300), r"bad\.png: labels must .* found 300"),
        (GOOD[:, :-1], r"bad\.png: the mask is 47×40, its image 48×40"),
        (GOOD[:1, :1], r"bad\.png: the mask is 1×1, its image 48×40"),
        (GOOD.T.copy(), r"bad\.png: the mask is 40×48, its image 48×40"),
    ],
    ids=["colour", "alpha", "value", "large value", "narrow", "one pixel", "turned"],
)
def test_refused_by_name(tmp_path: Path, mask: np.ndarray | Image.Image, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        train_with(tmp_path, mask)
    assert len(str(error.value).splitlines()) == 1
