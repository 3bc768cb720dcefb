"""Loaders: which image comes when depends only on the seed and the position in the stream."""

import errno
import multiprocessing
import os
import pickle
import re
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

from fcn.datamodule import SegmentationDataModule, ShuffledStream
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, DataError
from fcn.loader_process import default_workers, loaders_are_spawned


def shapes(**options: Any) -> SegmentationDataModule:
    dataset = partial(Shapes, size=48, train_length=7, val_length=5)
    options = {"batch_size": 3, "num_workers": 0, "seed": 1} | options
    datamodule = SegmentationDataModule(dataset=dataset, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def take(datamodule: SegmentationDataModule, batches: int) -> list[dict[str, Any]]:
    return list(islice(datamodule.train_dataloader(), batches))


def content(batches: list[dict[str, Any]]) -> list[Any]:
    return [(b["id"], b["image"].tolist(), b["mask"].tolist()) for b in batches]


def stream(length: int, size: int = 7, **options: int) -> list[tuple[int, int]]:
    return list(islice(ShuffledStream(size, **{"seed": 0} | options), length))


def test_stream_is_a_permutation_in_each_epoch() -> None:
    positions = stream(150, 50)
    assert [epoch for epoch, _ in positions] == [0] * 50 + [1] * 50 + [2] * 50
    orders = [[index for _, index in positions[i : i + 50]] for i in (0, 50, 100)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    other_seed = [index for _, index in stream(50, 50, seed=4)]
    assert len({tuple(order) for order in (*orders, other_seed, range(50))}) == 5


def test_stream_goes_on_from_a_position_and_is_shared_by_processes() -> None:
    whole = stream(120)
    for start in (1, 7, 100):
        assert stream(20, start=start) == whole[start : start + 20]
    for rank in range(2):
        assert stream(15, start=4, rank=rank, world=2) == whole[4 + rank : 34 : 2]


@pytest.mark.slow
def test_samples_do_not_depend_on_workers_or_global_randomness() -> None:
    augment: dict[str, Any] = {"crop_size": 32, "scale": [0.7, 1.4], "jitter": 0.2}
    batches = take(shapes(**augment), 4)
    assert all(batch["image"].shape == (3, 3, 32, 32) for batch in batches)
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    for workers in (0, 1, 2):
        again = take(shapes(**augment, num_workers=workers), 4)
        assert content(again) == content(batches)
    assert content(take(shapes(**augment, seed=2), 4)) != content(batches)


def test_augmentation_differs_in_each_epoch_and_leaves_global_randomness_alone() -> None:
    options: dict[str, Any] = {"crop_size": 32, "scale": [0.5, 2.0], "jitter": 0.5}
    batches = iter(shapes(batch_size=7, **options).train_dataloader())
    state, numpys = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    first, second = next(batches), next(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002
    pictures = dict(zip(second["id"], second["image"], strict=True))
    assert pictures.keys() == set(first["id"])
    before = zip(first["id"], first["image"], strict=True)
    assert any(not torch.equal(pictures[name], image) for name, image in before)


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1])])
def test_validation_has_each_image_once(batch_size: int, sizes: list[int]) -> None:
    datamodule = shapes(eval_batch_size=batch_size, crop_size=16, jitter=1.0, flip=1.0)
    batches = list(datamodule.val_dataloader())
    assert [len(batch["image"]) for batch in batches] == sizes
    data = Shapes(split="val", size=48, val_length=5)
    assert [name for batch in batches for name in batch["id"]] == data.ids
    for key in ("image", "mask"):
        found = torch.cat([batch[key] for batch in batches])
        torch.testing.assert_close(found, torch.stack([data[i][key] for i in range(5)]))


def test_limit() -> None:
    datamodule = shapes(limit=2, batch_size=4)
    assert set(take(datamodule, 1)[0]["id"]) == {"train_000000", "train_000001"}
    assert [b["id"] for b in datamodule.val_dataloader()] == [["val_000000"], ["val_000001"]]


def test_classes_are_known_before_the_data_is_there() -> None:
    datamodule = SegmentationDataModule(dataset=partial(VOC2012), root="nowhere")
    assert len(datamodule.classes) == len(datamodule.palette) == 21


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert shapes(num_workers=None).num_workers == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    for cores, workers in ((64, 8), (None, 0)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert shapes(num_workers=None).num_workers == workers


def test_number_of_spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By cores and gigabytes of free memory."""
    table = {(1, 64): 0, (2, 0.1): 1, (8, 2): 1, (8, 4): 2, (8, 64): 7, (64, 64): 8}
    assert {key: default_workers(key[0], key[1] * 1e9) for key in table} == table
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    memory = SimpleNamespace(available=4 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    datamodule = shapes(num_workers=None)
    assert datamodule.train_dataloader().num_workers == 2
    assert datamodule.val_dataloader().num_workers == 1  # beside those of training
    assert datamodule.val_data is not None
    assert datamodule.eval_dataloader(datamodule.val_data).num_workers == 2


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_start_methods(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    assert loaders_are_spawned() == (method != "fork")
    assert shapes(num_workers=2).val_dataloader().num_workers == (2 if method == "fork" else 1)


def test_loaders_leave_interrupts_to_the_run() -> None:
    init = shapes(num_workers=1).train_dataloader().worker_init_fn
    assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    assert init is not None
    init(0)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_what_a_spawned_process_is_handed_needs_no_lightning() -> None:
    """It imports the file of everything that it unpickles. import-linter sees to those files."""
    loader = shapes(num_workers=1).train_dataloader()
    handed = pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    assert b"fcn.loader_process" in handed
    assert b"fcn.transforms" in handed
    assert b"fcn.datamodule" not in handed
    assert b"lightning" not in handed


def test_broken_image(own_voc: Path) -> None:
    broken = own_voc / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2007_000033.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    datamodule = SegmentationDataModule(dataset=VOC2012, root=own_voc, num_workers=1)
    datamodule.setup("validate")
    with pytest.raises(DataError) as caught:
        list(datamodule.val_dataloader())
    traceback.clear_frames(caught.tb)  # they hold the loader, which ends its process only then
    assert str(caught.value).startswith(str(broken))
    assert len(str(caught.value).splitlines()) == 1


def test_folder_that_may_not_be_listed(tiny_voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", listdir)  # root may list everything
    datamodule = SegmentationDataModule(dataset=VOC2012, root=tiny_voc)
    folder = tiny_voc / "VOCdevkit" / "VOC2012" / "JPEGImages"
    with pytest.raises(DataError, match=f"^{re.escape(str(folder))}: Permission denied$"):
        datamodule.setup("fit")


def test_overlap_and_empty_splits_are_refused(tiny_voc: Path) -> None:
    datamodule = SegmentationDataModule(dataset=VOC2012, root=tiny_voc, train_split="trainval")
    with pytest.raises(DataError, match=r"4 of 4 .*trained on too: 2007_000033"):
        datamodule.setup("fit")
    with pytest.raises(DataError, match="no images"):
        ShuffledStream(0, seed=0)


BAD_VALUES: dict[str, list[Any]] = {
    "dataset": ["voc", lambda **options: Shapes(**options)],
    "root": [" ", 5],
    "download": ["yes"],
    "train_split": [""],
    "val_split": [None],
    "batch_size": [0, 2**14 + 1, 2.5, True],
    "eval_batch_size": ["auto"],
    "num_workers": [-1, 257],
    "limit": [0],
    "crop_size": [0, (10, -1), (1, 2, 3), 2**14 + 1, True, "224", [224], [224, 1.5]],
    "scale": [[2.0, 0.5], [0, 1], (1, float("nan")), 0.5, [0.5, 1, 2], ["a", "b"]],
    "flip": [1.5, "often", None],
    "jitter": [-0.1],
    "rotate": [-5, 181],
    "blur": [0, 101],
    "seed": [-1, 2**32],
}


@pytest.mark.parametrize(("name", "values"), BAD_VALUES.items(), ids=BAD_VALUES)
def test_bad_argument_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        shown = "null" if value is None else "true" if value is True else value
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{name}={shown}')}: must be .+$"):
            SegmentationDataModule(**{"dataset": Shapes, name: value})


def test_settings_of_a_checkpoint() -> None:
    dataset = {"class": "fcn.datasets.shapes.Shapes", "size": 48, "train_length": 7}
    settings = {"dataset": dataset, "batch_size": 3, "num_workers": 0, "seed": 1}
    datamodule = SegmentationDataModule.from_settings(settings)
    datamodule.setup("fit")
    assert content(take(datamodule, 4)) == content(take(shapes(), 4))
    assert len(datamodule.classes) == 8
    for wrong, message in (
        ({"rate": 1}, "unexpected keyword argument 'rate'"),
        ({"dataset": dataset | {"split": "val"}}, "argument 'split'"),
        ({"dataset": None}, "^dataset=null: must be"),
        ({"flip": 2}, "^flip=2: must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            SegmentationDataModule.from_settings(settings | wrong)
    for name in ("os.system", "fcn.datasets.shapes.voc_palette", "fcn.datasets.none.Data", None):
        with pytest.raises(DataError, match=f"the checkpoint's data set {name} is none of"):
            SegmentationDataModule.from_settings(settings | {"dataset": {"class": name}})
