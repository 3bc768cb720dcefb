"""Loaders: which image comes when depends only on the seed and the position in the stream."""

import multiprocessing
import os
import signal
import traceback
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import fcn.datamodule
from fcn.cli import short_messages
from fcn.datamodule import (
    SegmentationDataModule,
    ShuffledStream,
    default_workers,
    loaders_are_spawned,
)
from fcn.datasets import Sample
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, DataError


def shapes(**options: Any) -> SegmentationDataModule:
    dataset = partial(Shapes, size=48, train_length=7, val_length=5)
    options = {"batch_size": 3, "num_workers": 0, "seed": 1} | options
    datamodule = SegmentationDataModule(dataset=dataset, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def take(datamodule: SegmentationDataModule, batches: int) -> list[dict[str, Any]]:
    return list(islice(datamodule.train_dataloader(), batches))


def equal(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    return len(one) == len(two) and all(
        a["id"] == b["id"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["mask"], b["mask"])
        for a, b in zip(one, two, strict=True)
    )


def test_stream_is_a_permutation_in_each_epoch() -> None:
    positions = list(islice(ShuffledStream(50, seed=3), 150))
    epochs = [positions[i : i + 50] for i in (0, 50, 100)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * 50
        assert sorted(index for _, index in epoch) == list(range(50))
    orders = [[index for _, index in epoch] for epoch in epochs]
    other_seed = [index for _, index in islice(ShuffledStream(50, seed=4), 50)]
    distinct = {tuple(order) for order in (*orders, other_seed, list(range(50)))}
    assert len(distinct) == 5


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 100])
def test_stream_goes_on_from_a_position(start: int) -> None:
    whole = list(islice(ShuffledStream(7, seed=0), start + 20))
    assert list(islice(ShuffledStream(7, seed=0, start=start), 20)) == whole[start:]


def test_processes_share_the_stream() -> None:
    whole = list(islice(ShuffledStream(7, seed=0, start=4), 30))
    for rank in range(2):
        part = list(islice(ShuffledStream(7, seed=0, start=4, rank=rank, world=2), 15))
        assert part == whole[rank::2]


def test_stream_of_nothing() -> None:
    with pytest.raises(DataError, match="no images"):
        ShuffledStream(0, seed=0)


@pytest.mark.slow
def test_samples_do_not_depend_on_workers_or_global_randomness() -> None:
    augment: dict[str, Any] = {"crop_size": 32, "scale": [0.7, 1.4], "jitter": 0.2}
    expected = take(shapes(**augment), 4)
    assert all(batch["image"].shape == (3, 3, 32, 32) for batch in expected)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    assert equal(take(shapes(**augment), 4), expected)
    for workers in (1, 2):
        assert equal(take(shapes(**augment, num_workers=workers), 4), expected)
    assert not equal(take(shapes(**augment, seed=2), 4), expected)


def test_augmentation_differs_from_epoch_to_epoch() -> None:
    batches = take(shapes(batch_size=7, crop_size=32), 2)
    pictures = [dict(zip(b["id"], b["image"], strict=True)) for b in batches]
    assert pictures[0].keys() == pictures[1].keys()
    assert any(not torch.equal(pictures[0][name], pictures[1][name]) for name in pictures[0])


def test_loading_leaves_global_randomness_alone() -> None:
    datamodule = shapes(crop_size=32, scale=[0.5, 2.0], jitter=0.5)
    batches = iter(datamodule.train_dataloader())
    state, numpys = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    next(batches)
    next(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys[1])  # type: ignore[arg-type]  # noqa: NPY002


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (8, [5])])
def test_validation_has_each_image_once(batch_size: int, sizes: list[int]) -> None:
    datamodule = shapes(eval_batch_size=batch_size, crop_size=16, jitter=1.0, flip=1.0)
    batches = list(datamodule.val_dataloader())
    assert [len(batch["image"]) for batch in batches] == sizes
    data = Shapes(split="val", size=48, val_length=5)
    assert [name for batch in batches for name in batch["id"]] == data.ids
    images = [image for batch in batches for image in batch["image"]]
    masks = [mask for batch in batches for mask in batch["mask"]]
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        assert image.dtype == mask.dtype == torch.uint8
        assert torch.equal(image, data[index]["image"])
        assert torch.equal(mask, data[index]["mask"])


def test_limit() -> None:
    datamodule = shapes(limit=2, batch_size=4)
    (batch,) = take(datamodule, 1)
    assert set(batch["id"]) == {"train_000000", "train_000001"}
    assert [b["id"] for b in datamodule.val_dataloader()] == [["val_000000"], ["val_000001"]]
    more = shapes(limit=100)
    assert len(more.open("val")) == 5


def test_classes_are_known_before_the_data_is_there() -> None:
    datamodule = SegmentationDataModule(dataset=partial(VOC2012), root="nowhere")
    assert len(datamodule.classes) == len(datamodule.palette) == 21
    with pytest.raises(DataError, match="nowhere"):
        datamodule.prepare_data()


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcn.datamodule, "loaders_are_spawned", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert shapes(num_workers=None).num_workers == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert shapes(num_workers=None).num_workers == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert shapes(num_workers=None).num_workers == 0


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"),
    [(1, 64, 0), (2, 0.1, 1), (8, 2, 1), (8, 4, 2), (8, 8, 4), (8, 64, 7), (64, 64, 8)],
)
def test_number_of_spawned_workers(
    cores: int, gigabytes: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_workers(cores, gigabytes * 1e9) == workers
    monkeypatch.setattr(fcn.datamodule, "loaders_are_spawned", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    memory = SimpleNamespace(available=int(gigabytes * 1e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    datamodule = shapes(num_workers=None)
    assert datamodule.train_dataloader().num_workers == workers
    assert datamodule.val_dataloader().num_workers == min(1, workers)  # beside those of training
    assert datamodule.val_data is not None
    assert datamodule.eval_dataloader(datamodule.val_data).num_workers == workers


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_start_methods(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    assert loaders_are_spawned() == (method != "fork")
    datamodule = shapes(num_workers=2)
    workers = 2 if method == "fork" else 1
    assert datamodule.val_dataloader().num_workers == workers


class Interruptible(Shapes):
    """Its ids say what Ctrl-C would do to the process that reads it."""

    def __getitem__(self, index: int) -> Sample:
        return {**super().__getitem__(index), "id": str(signal.getsignal(signal.SIGINT))}


def test_loaders_leave_interrupts_to_the_run() -> None:
    datamodule = SegmentationDataModule(
        dataset=partial(Interruptible, size=48, val_length=1), num_workers=1
    )
    datamodule.setup("validate")
    assert datamodule.val_data is not None
    batch = next(iter(datamodule.val_dataloader()))
    assert batch["id"] == [str(signal.SIG_IGN)]
    assert datamodule.val_data[0]["id"] != str(signal.SIG_IGN)  # in this process


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image(own_voc: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = "2007_000033"
    broken = own_voc / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{name}.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    datamodule = SegmentationDataModule(dataset=VOC2012, root=own_voc, num_workers=workers)
    datamodule.setup("validate")
    with pytest.raises(DataError) as caught:
        list(datamodule.val_dataloader())
    traceback.clear_frames(caught.tb)  # they hold the loader, which ends its process only then
    assert str(broken) in str(caught.value)
    with pytest.raises(SystemExit) as exit_, short_messages():  # as train.py reports it
        raise caught.value
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {broken}")
    assert len(message.splitlines()) == 1


def test_pictures_of_several_sizes_are_padded_with_void(tiny_voc: Path) -> None:
    datamodule = SegmentationDataModule(
        dataset=VOC2012, root=tiny_voc, batch_size=6, num_workers=0, flip=0.0
    )
    datamodule.setup("fit")
    (batch,) = take(datamodule, 1)
    assert batch["image"].shape == (6, 3, 96, 96)
    data = VOC2012(split="train", root=tiny_voc)
    for name, image, mask in zip(batch["id"], batch["image"], batch["mask"], strict=True):
        sample = data[data.ids.index(name)]
        height, width = sample["mask"].shape
        assert torch.equal(image[:, :height, :width], sample["image"])
        assert torch.equal(mask[:height, :width], sample["mask"])
        assert (mask[height:] == 255).all()
        assert (mask[:, width:] == 255).all()


def test_real_pairs(real_voc_root: Path) -> None:
    datamodule = SegmentationDataModule(
        dataset=VOC2012, root=real_voc_root, crop_size=160, scale=[0.5, 1.5], num_workers=0, limit=8
    )
    datamodule.setup("fit")
    (batch,) = take(datamodule, 1)
    assert batch["image"].shape == (2, 3, 160, 160)
    (first, *_) = list(datamodule.val_dataloader())
    assert first["image"].shape[2:] == first["mask"].shape[1:]
    assert set(first["mask"].unique().tolist()) <= {*range(21), 255}


def test_overlap_is_refused(tiny_voc: Path) -> None:
    datamodule = SegmentationDataModule(dataset=VOC2012, root=tiny_voc, train_split="trainval")
    with pytest.raises(DataError, match=r"4 of 4 .*trained on too: 2007_000033"):
        datamodule.setup("fit")


BAD_VALUES: dict[str, list[Any]] = {
    "dataset": ["voc"],
    "root": [" ", 5],
    "download": ["yes"],
    "train_split": [""],
    "val_split": [None],
    "batch_size": [-2, 0, 2**14 + 1, 2.5, True, "two", None],
    "eval_batch_size": ["auto"],
    "num_workers": [-1, 257],
    "limit": [0],
    "crop_size": [0, [224]],
    "scale": [[2.0, 0.5], [0, 1], 0.5],
    "flip": [1.5],
    "jitter": [-0.1],
    "rotate": [-5, 181, "a lot"],
    "blur": [0, 101],
    "seed": [-1, 1.5, 2**32],
}


@pytest.mark.parametrize(("name", "values"), BAD_VALUES.items(), ids=BAD_VALUES)
def test_bad_argument_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            SegmentationDataModule(**{"dataset": Shapes, name: value})
        shown = "null" if value is None else "true" if value is True else value
        assert str(caught.value).startswith(f"{name}={shown}: must be ")
        assert len(str(caught.value).splitlines()) == 1


def test_good_arguments() -> None:
    options = {"root": Path("data"), "batch_size": "auto", "crop_size": [224, 320], "jitter": None}
    assert SegmentationDataModule(dataset=Shapes, scale=[0.5, 2], **options).batch_size == "auto"


def test_settings_of_a_checkpoint() -> None:
    dataset = {"class": "fcn.datasets.shapes.Shapes", "size": 48, "train_length": 7}
    settings = {"dataset": dataset, "batch_size": 3, "num_workers": 0, "seed": 1}
    datamodule = SegmentationDataModule.from_settings(settings)
    datamodule.setup("fit")
    assert equal(take(datamodule, 4), take(shapes(), 4))
    assert len(datamodule.classes) == 8
    for wrong, message in (
        (
            {"rate": 1},
            "unexpected keyword argument 'rate'",
        ),
        ({"dataset": dataset | {"sizes": 48}}, "unexpected keyword argument 'sizes'"),
        ({"dataset": dataset | {"split": "val"}}, "argument 'split'"),
        ({"dataset": None}, "^dataset=null: must be"),
        ({"flip": 2}, "^flip=2: must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            SegmentationDataModule.from_settings(settings | wrong)
    for name in ("os.system", "fcn.datasets.shapes.voc_palette", "fcn.datasets.none.Data", None):
        with pytest.raises(DataError, match=f"the checkpoint's data set {name} is none of"):
            SegmentationDataModule.from_settings(settings | {"dataset": {"class": name}})
