"""Masks that are unusual train; masks that are wrong are refused by their name."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, compose_config, write_mask
from PIL import Image
from test_folder import write

from fcn.errors import DataError
from train import train

GOOD = np.zeros((40, 48), np.uint8)
GOOD[10:30, 10:40] = 1
GOOD[9] = 255


def train_on(root: Path, masks: dict[str, Any], steps: int) -> dict[str, float]:
    """Training on pairs with these masks, and one good pair to validate on."""
    for name, mask in {**masks, "val": GOOD}.items():
        write(root / "images", name, Image.effect_noise((48, 40), 80), "jpg")
        write(root / "masks", name, mask)
    write_mask(root / "masks" / "val.png", GOOD)  # one with a palette
    (root / "val.txt").write_text("val\n")
    data = [f"root={root}", "dataset.classes=[a,b]", "dataset.val=val.txt", "num_workers=0"]
    data += ["crop_size=32", "batch_size=1"]
    options = ["data=folder", *(f"data.{setting}" for setting in data), "callbacks.curves=null"]
    options += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    options += ["callbacks.panels.images=0"]
    tiny = [option for option in TINY if not option.startswith("data")]
    return train(compose_config("train", *tiny, *options), root / "run")


def test_unusual_masks_train(tmp_path: Path) -> None:
    """Each of them is a batch of its own, twice."""
    unusual = {
        "all void": np.full_like(GOOD, 255),
        "background only": np.zeros_like(GOOD),
        "one class only": np.ones_like(GOOD),
        "sixteen bits": GOOD.astype(np.uint16),
    }
    summary = train_on(tmp_path, unusual, 2 * len(unusual))
    assert summary["steps"] == 2 * len(unusual)
    assert 0 <= summary["train/loss_smooth"] < 10
    assert 0 <= summary["val/miou"] <= 1


def test_refused_by_name(tmp_path: Path) -> None:
    wrong = {
        "colour": np.stack([GOOD, GOOD, 0 * GOOD], 2),
        "large": GOOD.astype(np.uint16) * 300,
        "turned": GOOD.T.copy(),
    }
    with pytest.raises(DataError) as error:
        train_on(tmp_path, wrong, 2)
    messages = (
        r"colour\.png: a mask of mode RGB needs data\.dataset\.palette",
        r"large\.png: labels must .* found 300",
        r"turned\.png: the mask is 40×48, its image 48×40",
    )
    for line, message in zip(str(error.value).splitlines(), messages, strict=True):
        assert re.search(message, line)
