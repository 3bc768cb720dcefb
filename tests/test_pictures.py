"""Panels and animations of a run, also of a resumed one; what W&B got, read back from its files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, train_tiny
from PIL import Image

from fcn.datasets.shapes import Shapes
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.pictures import Panels
from fcn.runs import best_checkpoint
from fcn.visualize import animate
from train import resumed_config, train

IDS = ["2007_000033", "../odd/\n\udcff\0 name " + "x" * 300]


@pytest.fixture(scope="module")
def module() -> SegmentationModule:
    module = SegmentationModule(
        class_names=["ground", "cat", "dog"],
        palette=[(0, 0, 0), (255, 0, 0), (0, 128, 64)],
        backbone="vgg11",
        head_width=8,
        head_kernel=3,
        weights=None,
    )
    module.scores = segmentation_scores(torch.eye(3))
    return module


def validate(
    panels: Panels, module: SegmentationModule, step: int, ids: list[str] = IDS, **trainer: Any
) -> None:
    """One validation of images of 20 × 30 pixels, in batches of one; `step` is predicted."""
    state = {"global_step": step, "sanity_checking": False, "is_global_zero": True, "loggers": []}
    stand_in: Any = SimpleNamespace(**state | trainer)
    panels.on_validation_epoch_start(stand_in, module)
    for name in ids:
        batch = {
            "id": [name],
            "image": torch.full((1, 3, 20, 30), 90, dtype=torch.uint8),
            "mask": torch.ones(1, 20, 30, dtype=torch.uint8),
        }
        prediction = torch.ones(1, 20, 30, dtype=torch.uint8)
        prediction[..., : step % 30] = 2
        panels.on_validation_batch_end(stand_in, module, {"prediction": prediction}, batch, 0)
    panels.on_validation_end(stand_in, module)


def frames(path: Path) -> list[int]:
    """Columns of the label's 30 that each frame of an animation has in the colour of class 2."""
    counts = []
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        for number in range(animation.n_frames):
            animation.seek(number)
            pixels = np.asarray(animation.convert("RGB"))
            counts.append(round((pixels == (0, 128, 64)).all(-1).sum() / 160 / 8))
    return counts


def test_animations_of_a_resumed_run(tmp_path: Path, module: SegmentationModule) -> None:
    for step in (5, 10, 15):
        validate(Panels(images=2, folder=tmp_path), module, step)
    assert frames(tmp_path / "progress_1.gif") == [5, 10, 15]

    resumed = Panels(images=2, folder=tmp_path)
    resumed.on_train_start(SimpleNamespace(global_step=10, is_global_zero=True), module)  # type: ignore[arg-type]
    assert [p.name for p in sorted(tmp_path.glob("*.png"))] == [
        "step_0000005.png",
        "step_0000010.png",
    ]
    validate(resumed, module, 10)  # a validation that was due is done again
    assert frames(tmp_path / "progress_1.gif") == [5, 10]
    validate(resumed, module, 12)
    for number in (1, 2):
        assert frames(tmp_path / f"progress_{number}.gif") == [5, 10, 12]
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"step_{step:07d}.png" for step in (5, 10, 12)),
        *("progress_1.gif", "progress_2.gif", "frames"),
    }


def test_other_images_after_a_resume_start_other_animations(
    tmp_path: Path, module: SegmentationModule
) -> None:
    validate(Panels(images=1, folder=tmp_path), module, 5)
    validate(Panels(images=1, folder=tmp_path), module, 6, ["another"])
    validate(Panels(images=1, folder=tmp_path), module, 7, ["another"])
    assert frames(tmp_path / "progress_1.gif") == [6, 7]
    assert not (tmp_path / "progress_2.gif").exists()


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 2), (40, 40), (41, 40), (300, 40)])
def test_long_animations_thin_out(length: int, kept: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(length)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (number % 256, 255 * (number > 255), 0)).save(path)
    animate(paths, tmp_path / "all.gif")
    with Image.open(tmp_path / "all.gif") as animation:
        assert animation.n_frames == kept
        seen = []
        for number in range(kept):
            animation.seek(number)
            red, green, _ = animation.convert("RGB").getpixel((0, 0))
            seen.append(red + green + (green > 0))
    assert seen == sorted(set(seen))
    assert (seen[0], seen[-1]) == (0, length - 1)


@pytest.mark.parametrize(
    "trainer", [{"is_global_zero": False}, {"sanity_checking": True}, {"images": 0}]
)
def test_nothing_is_written(
    trainer: dict[str, Any], tmp_path: Path, module: SegmentationModule
) -> None:
    panels = Panels(images=trainer.pop("images", 2), folder=tmp_path / "panels")
    validate(panels, module, 5, **trainer)
    assert not list(tmp_path.iterdir())


def test_pictures_of_a_run(tmp_path: Path, finished_run: Path) -> None:
    panels = finished_run / "panels"
    for number in (1, 2):
        with Image.open(panels / f"progress_{number}.gif") as animation:
            assert animation.n_frames == 2
    assert len(list((panels / "frames").iterdir())) == 4

    run = tmp_path / "run"
    train_tiny(run, "trainer.max_steps=2")
    train(resumed_config(run, ["trainer.max_steps=4"]), run)
    with Image.open(run / "panels" / "progress_2.gif") as animation:
        assert animation.n_frames == 2
    assert sorted(p.name for p in (run / "panels").glob("step*")) == [
        "step_0000002.png",
        "step_0000004.png",
    ]


def wandb_records(run: Path) -> Iterator[Any]:
    """What an offline run holds: LevelDB's log format, of the wandb package's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    data, at, parts, block = path.read_bytes(), 7, b"", 1 << 15
    while at < len(data):
        if block - at % block < 7:  # no room for a header: the rest of the block is empty
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def values(items: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = result
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return result


def test_what_wandb_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads its environment once
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    summary = train_tiny(run, "logger=wandb", "trainer.max_steps=2", "trainer.val_check_interval=1")
    records = list(wandb_records(run))
    history = [values(record.history.item) for record in records if record.HasField("history")]
    (files,) = (run / "wandb").glob("offline-run-*/files")
    data = Shapes(split="val", size=48, val_length=3)
    names = list(Shapes.classes)

    shown = [row for row in history if "val/panels" in row]
    assert [row["trainer/global_step"] for row in shown] == [1, 2]
    pictures = shown[-1]["val/panels"]
    assert pictures["count"] == 2
    for number, caption in enumerate(pictures["captions"]):
        assert caption.startswith(f"{data.ids[number]}, IoU 0.")
        with Image.open(files / pictures["filenames"][number]) as image:
            difference = np.asarray(image, float) - data[number]["image"].permute(1, 2, 0).numpy()
            assert np.abs(difference).mean() < 16  # a small JPEG of camera noise
        masks = pictures["all_masks"][number]
        assert set(masks) == {"ground_truth", "predictions"}
        with Image.open(files / masks["ground_truth"]["path"]) as mask:
            assert (np.asarray(mask) == data[number]["mask"].numpy()).all()  # void is 255 still
        with Image.open(files / masks["predictions"]["path"]) as mask:
            assert mask.size == (48, 48)
            assert np.asarray(mask).max() < len(names)
    settings = [values(record.config.update) for record in records if record.HasField("config")]
    known = json.dumps(settings)
    for name in (*names, "void"):
        assert f'"{name}"' in known
    assert "val/panels_wandb_delimeter_predictions" in known

    (last,) = (row for row in history if "confusion_matrix" in row)
    assert last["trainer/global_step"] == 2
    table = json.loads((files / last["confusion_matrix"]["path"]).read_text())
    assert table["columns"][1:] == names
    assert [row[0] for row in table["data"]] == names
    confusion = torch.tensor([row[1:] for row in table["data"]])
    assert confusion.sum() == sum(int((sample["mask"] != 255).sum()) for sample in data)
    assert segmentation_scores(confusion)["miou"] == pytest.approx(summary["val/miou"])
    bars = json.loads((files / last["iou_by_class_table"]["path"]).read_text())
    assert bars["columns"] == ["class", "IoU"]
    assert [name for name, _ in bars["data"]] == names
    for name, iou in bars["data"]:
        expected = summary[f"val/iou/{name}"]
        assert iou == (None if np.isnan(expected) else pytest.approx(expected))
    assert "wandb/bar/v0" in known
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_picture_of_the_readme(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "docs"))
    import skips

    arguments = [str(best_checkpoint(finished_run))] * 3
    skips.main([*arguments, str(tmp_path / "skips.png"), "--images", "0", "2", "--width", "96"])
    with Image.open(tmp_path / "skips.png") as picture:
        assert picture.width > 5 * 96
        assert picture.height > 2 * 96
    with pytest.raises(SystemExit):
        skips.main([*arguments[:2], str(tmp_path / "none.ckpt"), str(tmp_path / "skips.png")])
