"""Bands around boundaries against slow counting, padding, test-time views, comparisons."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, compose_config, train_tiny
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from evaluate import evaluate, offer_checkpoint_data
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, FCNError
from fcn.evaluation import WIDTHS, ImageScores, band_confusions
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.prediction import TestTime
from fcn.runs import best_checkpoint, last_checkpoint


def evaluated(*arguments: str) -> dict[str, Any]:
    """What metrics.json holds, composed as the command line does."""
    offer_checkpoint_data([*arguments])
    return evaluate(compose_config("evaluate", *arguments, "accelerator=cpu"))


def within(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels in the band of a width, by looking at all pairs of pixels."""
    height, across = mask.shape
    edges = [
        (y, x)
        for y in range(height)
        for x in range(across)
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
        if 0 <= y + dy < height and 0 <= x + dx < across and mask[y, x] != mask[y + dy, x + dx]
    ]
    inside = np.zeros(mask.shape, bool)
    for y, x in np.ndindex(mask.shape):
        inside[y, x] = any((y - v) ** 2 + (x - u) ** 2 <= (width - 1) ** 2 for v, u in edges)
    return inside


@pytest.mark.parametrize("seed", range(4))
def test_bands_against_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((17, 60), np.uint8)
    for _ in range(2 + seed):
        y, x = rng.integers(0, 17), rng.integers(0, 60)
        mask[y : y + rng.integers(1, 7), x : x + rng.integers(1, 7)] = rng.choice([1, 2, 255])
    prediction = rng.integers(0, 3, mask.shape).astype(np.uint8)
    bands = band_confusions(mask, prediction, 3, 255)
    for i, width in enumerate(WIDTHS):
        judged = within(mask, width) & (mask != 255)
        expected = np.zeros((3, 3), np.int64)
        np.add.at(expected, (mask[judged], prediction[judged]), 1)
        assert np.array_equal(bands[: i + 1].sum(0), expected), width
    whole = multiclass_confusion_matrix(
        torch.from_numpy(prediction), torch.from_numpy(mask), num_classes=3, ignore_index=255
    )
    assert np.array_equal(bands.sum(0), whole)


@pytest.mark.parametrize(
    ("labels", "expected"),  # pixels in the bands of width 1, 2, 3, 5, 10, 20, 40
    [
        ("00001111", (2, 4, 6, 8, 8, 8, 8)),
        ("000vv1111", (2, 4, 6, 7, 7, 7, 7)),  # from the edge of the void line
        ("000000", (0, 0, 0, 0, 0, 0, 0)),
        ("vvvv", (0, 0, 0, 0, 0, 0, 0)),
        ("0" * 50 + "1", (2, 3, 4, 6, 11, 21, 41)),
    ],
)
def test_width_of_bands(labels: str, expected: tuple[int, ...]) -> None:
    row = [255 if c == "v" else int(c) for c in labels]
    mask = np.array([row], np.uint8)
    bands = band_confusions(mask, np.zeros_like(mask), 2, 255)
    assert tuple(bands.cumsum(0)[:-1].sum((1, 2)).tolist()) == expected


def test_padding_is_no_boundary(finished_run: Path) -> None:
    module = SegmentationModule.load_from_checkpoint(last_checkpoint(finished_run))
    rng = np.random.default_rng(0)
    masks = [torch.from_numpy(rng.integers(0, 3, shape) // 2) for shape in ((9, 14), (12, 8))]
    alone, together = (ImageScores(["a", "b"], keep=True) for _ in range(2))
    padded = torch.full((2, 12, 14), 255, dtype=torch.uint8)
    for slot, mask in zip(padded, masks, strict=True):
        slot[: mask.shape[0], : mask.shape[1]] = mask
        one = {"prediction": torch.zeros(1, *mask.shape, dtype=torch.uint8)}
        alone.on_validation_batch_end(None, module, one, {"mask": mask[None].byte()}, 0)  # type: ignore[arg-type]
    zeros = {"prediction": torch.zeros(2, 12, 14, dtype=torch.uint8)}
    together.on_validation_batch_end(None, module, zeros, {"mask": padded}, 0)  # type: ignore[arg-type]
    for scores in (alone, together):
        scores.on_validation_end(None, module)  # type: ignore[arg-type]
    assert np.array_equal(alone.bands, together.bands)
    assert alone.rows == together.rows
    assert together.prediction(0, (9, 14)).shape == (9, 14)


def test_all_pixels_are_in_bands_or_beyond(finished_run: Path, tmp_path: Path) -> None:
    metrics = evaluated(f"ckpt={finished_run}", f"output={tmp_path}", "report.images=0")
    assert list(metrics["boundary_miou"]) == [str(w) for w in WIDTHS]
    assert metrics["checkpoint"] == str(best_checkpoint(finished_run))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["boundary_miou"] == metrics["boundary_miou"]
    # Shapes at 48 pixels: no pixel is farther than 40 from a boundary.
    assert metrics["boundary_miou"]["40"] == metrics["miou"]
    assert metrics["boundary_miou"]["1"] != metrics["miou"]


def test_views_at_test_time(finished_run: Path, tmp_path: Path) -> None:
    """The scores are those of `TestTime`, counted here; without views, nothing changes."""
    ckpt = last_checkpoint(finished_run)
    metrics = evaluated(f"ckpt={ckpt}", f"output={tmp_path}", "tta.flip=true", "tta.scales=[1,0.5]")
    plain = evaluated(f"ckpt={ckpt}", f"output={tmp_path}")
    assert metrics["tta"] == {"flip": True, "scales": [1, 0.5]}
    assert metrics["loss"] != plain["loss"]
    module = SegmentationModule.load_from_checkpoint(ckpt).eval()
    for options, expected in (({}, plain), ({"flip": True, "scales": (1, 0.5)}, metrics)):
        network, confusion = TestTime(module.network, **options), torch.zeros(8, 8)  # type: ignore[arg-type]
        data = Shapes(split="val", size=48, val_length=3)
        for i in range(3):
            mask: Tensor = data[i]["mask"]
            with torch.inference_mode():
                prediction = network(data[i]["image"][None]).argmax(1)[0]
            confusion += multiclass_confusion_matrix(
                prediction, torch.Tensor(mask).long(), num_classes=8, ignore_index=255
            )
        assert segmentation_scores(confusion)["miou"] == expected["miou"]
        assert segmentation_scores(confusion)["pixel_acc"] == expected["pixel_acc"]


@pytest.mark.parametrize("setting", ["tta.scales=[]", "tta.scales=[0]", "tile=8"])
def test_impossible_views(finished_run: Path, tmp_path: Path, setting: str) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        evaluated(f"ckpt={finished_run}", f"output={output}", setting)
    assert not output.exists()


def test_comparison(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder and a checkpoint; both as if judged alone, and the difference."""
    other = tmp_path / "other"
    train_tiny(other, "model.head_width=12", "optimizer.lr=0.01")
    pair = f"compare=[{finished_run},{last_checkpoint(other)}]"
    metrics = evaluated(pair, f"output={tmp_path / 'out'}")
    for key, run in (("a", best_checkpoint(finished_run)), ("b", last_checkpoint(other))):
        alone = evaluated(f"ckpt={run}", f"output={tmp_path / key}")
        assert metrics[key]["checkpoint"] == str(run)
        for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss", "boundary_miou"):
            assert metrics[key][name] == alone[name]
    difference = metrics["difference"]
    assert difference["miou"] == metrics["b"]["miou"] - metrics["a"]["miou"]
    assert list(difference["iou"]) == list(Shapes.classes)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"metrics.json", "report.html"}
    page = (tmp_path / "out" / "report.html").read_text("ascii")
    assert "B loses most" in page
    assert str(best_checkpoint(finished_run)) in page
    assert str(last_checkpoint(other)) in page

    evaluated(f"compare=[{other},{other}]", "report.images=0")
    assert (other / "comparison" / "report.html").is_file()  # beside evaluation/, of A
    assert not (other / "evaluation").exists()


def test_comparisons_that_cannot_be(finished_run: Path, tmp_path: Path, tiny_voc: Path) -> None:
    run = tmp_path / "voc"
    tiny = [o for o in TINY if not o.startswith("data")]
    voc = ["data=voc2012", f"data.root={tiny_voc}", "data.crop_size=32", "data.num_workers=0"]
    from train import train

    train(compose_config("train", *tiny, *voc, "trainer.max_steps=1"), run)
    for arguments, message in (
        ((f"compare=[{finished_run},{run}]",), r"A knows 8 classes .* B 21 .*must be the same$"),
        ((f"compare=[{finished_run}]",), r"must be two"),
        ((f"compare={finished_run}",), r"must be two"),
        ((f"compare=[{finished_run},{tmp_path / 'none'}]",), r"none: no such file$"),
        ((f"compare=[{run},{run}]", f"ckpt={run}"), r"not both$"),
    ):
        with pytest.raises(FCNError, match=message) as error:
            evaluated(*arguments, f"output={tmp_path / 'out'}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
