"""Panels of a run, also of a resumed one; what W&B got, read back from its files."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, train_tiny
from omegaconf import OmegaConf
from PIL import Image

from fcn.checkpoint import best_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.training.panels import Panels, _score

IDS = ["2007_000033", "../odd/\n\udcff\0 name " + "x" * 300]


@pytest.fixture(scope="module")
def module() -> SegmentationModule:
    module = SegmentationModule(
        class_names=["ground", "cat", "dog"],
        palette=[(0, 0, 0), (255, 0, 0), (0, 128, 64)],
        backbone="vgg_tiny",
        head_width=8,
        head_kernel=3,
        weights=None,
    )
    module.scores = segmentation_scores(torch.eye(3))
    return module


def validate(
    panels: Panels,
    module: SegmentationModule,
    step: int = 5,
    ids: list[str] = IDS,
    batch_size: int = 1,
    padding: int = 0,
    **trainer: Any,
) -> None:
    """One validation of images of 20 × 30 pixels, whose grey tells them apart.

    Args:
        padding: columns of these that are padding of the batch.
    """
    state = {"global_step": step, "sanity_checking": False, "is_global_zero": True, "loggers": []}
    state["val_dataloaders"] = SimpleNamespace(sampler=ids, batch_size=batch_size)
    state["num_val_batches"] = [math.ceil(len(ids) / batch_size)]
    stand_in: Any = SimpleNamespace(**state | trainer)
    panels.on_validation_epoch_start(stand_in)
    for start in range(0, len(ids), batch_size):
        names = ids[start : start + batch_size]
        grey = torch.tensor([ord(name[0]) for name in names], dtype=torch.uint8)
        image = grey.view(-1, 1, 1, 1).expand(-1, 3, 20, 30)
        label = torch.ones(len(names), 20, 30, dtype=torch.uint8)
        batch = {"id": names, "image": image, "mask": label, "size": [(20, 30 - padding)] * 8}
        panels.on_validation_batch_end(stand_in, module, {"prediction": 1 + label % 2}, batch)
    panels.on_validation_end(stand_in, module)


def test_panels_of_a_resumed_run(tmp_path: Path, module: SegmentationModule) -> None:
    for step in (5, 10, 15):
        validate(Panels(images=2), module, step, default_root_dir=tmp_path)
    trainer: Any = SimpleNamespace(global_step=10, is_global_zero=True, default_root_dir=tmp_path)
    Panels(images=2).on_train_start(trainer, module)  # 15 is trained again
    names = ["step_0000005.png", "step_0000010.png"]
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == names


def test_padding_is_not_drawn(module: SegmentationModule, tmp_path: Path) -> None:
    panels = Panels(images=2)
    validate(panels, module, batch_size=2, padding=12, default_root_dir=tmp_path)
    assert {part.shape[-2:] for row in panels.rows for part in row} == {(20, 18)}


@pytest.mark.parametrize(
    ("images", "trainer"),
    [(2, {"is_global_zero": False}), (2, {"sanity_checking": True}), (0, {})],
)
def test_nothing_is_written(
    images: int, trainer: Any, tmp_path: Path, module: SegmentationModule
) -> None:
    validate(Panels(images=images), module, default_root_dir=tmp_path, **trainer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "batch_size", "trainer", "expected"),
    [
        (3, 1, {}, "036"),
        (3, 4, {}, "036"),  # the last batch is smaller
        (3, 1, {"num_val_batches": [5]}, "013"),  # limit_val_batches=5
        (30, 1, {}, "0123456789"),
    ],
)
def test_images_come_from_the_whole_split(
    images: int, batch_size: int, trainer: Any, expected: str, module: SegmentationModule
) -> None:
    """The first frames of CamVid's val are one street corner: they would show little."""
    panels = Panels(images=images)
    for _ in range(2):
        names = [*"0123456789"]
        validate(panels, module, 5, names, batch_size, sanity_checking=True, **trainer)
        assert panels.ids == [*expected]
        assert "".join(chr(image[0, 0, 0]) for image, _, _ in panels.rows) == expected


def test_wandb_gets_pictures_of_one_size(module: SegmentationModule) -> None:
    """It shows all of them in the size of the first one. Padding counts as void."""
    panels, logged = Panels(), []
    panels.ids = ["high", "wide"]
    for h, w in ((6, 4), (3, 8)):
        label = torch.ones(h, w, dtype=torch.uint8)
        panels.rows.append((torch.zeros(3, h, w, dtype=torch.uint8), label, label.clone()))
    logger: Any = SimpleNamespace(log_image=lambda *args, **more: logged.append((args, more)))
    panels._log(logger, 5, module, ["IoU 1.000"] * 2)
    (((_, pictures, _), more),) = logged
    assert [picture.size for picture in pictures] == [(8, 6), (8, 6)]
    for mask, (h, w) in zip(more["masks"], ((6, 4), (3, 8)), strict=True):
        for values in (mask["ground_truth"]["mask_data"], mask["predictions"]["mask_data"]):
            assert values.shape == (6, 8)
            assert (values[:h, :w] == 1).all()
            assert (values == 1).sum() == h * w
            assert set(np.unique(values)) == {1, 255}


def test_iou_of_one_image(module: SegmentationModule) -> None:
    label = torch.tensor([[1, 1, 2, 255]])
    prediction = torch.tensor([[1, 2, 2, 0]])
    assert _score(label, prediction, module) == "IoU 0.500"  # 1: 1/2, 2: 1/2, no 0
    assert _score(torch.full((1, 4), 255), prediction, module) == "all void"


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


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


@pytest.mark.slow
def test_what_wandb_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package makes an offline run, which writes nothing elsewhere."""
    import wandb

    wandb.teardown()  # it reads its environment once
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["logger=wandb", "logger.wandb.log_model=true", "trainer.max_steps=2"]
    summary = train_tiny(run, *options, "trainer.val_check_interval=1")
    assert wandb.run is None  # finished: the next job of a sweep starts its own
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert offline.name.endswith(f"-{OmegaConf.load(run / 'config.yaml').logger.wandb.id}")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "run"}
    records = list(wandb_records(run))
    history = [values(record.history.item) for record in records if record.HasField("history")]
    files = offline / "files"
    data = Shapes(split="val", size=48, val_length=3)
    names = list(Shapes.classes)
    kept = {path.read_bytes() for path in (run / "wandb").rglob("*") if path.is_file()}
    assert {path.read_bytes() for path in (run / "checkpoints").iterdir()} <= kept  # log_model

    assert {"train/loss_smooth", "val/iou/ring"} <= {name for row in history for name in row}
    shown = [row for row in history if "val/panels" in row]
    assert [row["trainer/global_step"] for row in shown] == [1, 2]
    pictures = shown[-1]["val/panels"]
    assert pictures["count"] == 2
    for number, caption in enumerate(pictures["captions"]):
        assert caption.startswith(f"{data.ids[number]}, IoU 0.")
        difference = pixels(files / pictures["filenames"][number]).float()
        difference -= data[number]["image"].permute(1, 2, 0)
        assert difference.abs().mean() < 16  # a small JPEG of camera noise
        masks = {kind: files / mask["path"] for kind, mask in pictures["all_masks"][number].items()}
        assert pixels(masks.pop("ground_truth")).equal(data[number]["mask"])  # void is 255 still
        prediction = pixels(masks.pop("predictions"))
        assert prediction.shape == (48, 48)
        assert prediction.max() < len(names)
        assert masks == {}
    known = json.dumps([values(r.config.update) for r in records if r.HasField("config")])
    for name in (*names, "void", "val_check_interval", "head_width"):
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
        assert iou == (None if np.isnan(expected) else pytest.approx(expected)), name
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
