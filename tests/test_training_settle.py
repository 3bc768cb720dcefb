"""Batch size and length of a run, and what happens when memory runs out, with a made-up memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, compose_config, train_tiny

from fcn.errors import ConfigError, TrainingError
from fcn.module import SegmentationModule
from fcn.training.batch_size import largest_batch
from fcn.training.settle import image_size
from train import build_data_and_module


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> list[tuple[int, ...]]:
    """Steps of more images fail as they do on a GPU; the sizes that were tried."""
    step, tried = SegmentationModule.training_step, []

    def limited(self: SegmentationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        tried.append(tuple(batch["image"].shape))
        if len(batch["image"]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", limited)
    return tried


@pytest.mark.slow
@pytest.mark.parametrize(("fits", "most"), [(5, 20), (9, 4)])
def test_largest_batch(monkeypatch: pytest.MonkeyPatch, fits: int, most: int) -> None:
    cfg = compose_config("train", *TINY)
    _, module = build_data_and_module(cfg)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tried = limit_memory(monkeypatch, fits)
    found = largest_batch(module, (48, 64), most=most, accelerator="cpu", devices=1)
    assert found == min(fits, most)
    assert {shape[1:] for shape in tried} == {(3, 48, 64)}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_auto_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size=auto .* 1 x cpu.*python -m fcn\.memory"):
        train_tiny(tmp_path / "run", "data.batch_size=auto")
    assert not (tmp_path / "run").exists()


def run_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: SegmentationModule, batch: Any, batch_idx: int) -> None:
        raise error

    monkeypatch.setattr(SegmentationModule, "on_train_batch_start", fail)


@pytest.mark.slow
def test_out_of_memory_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(TrainingError) as error:
        train_tiny(tmp_path / "run", "data.batch_size=4", "data.crop_size=256")
    message = str(error.value)
    assert message.startswith("cpu ran out of memory: a step needs about")
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in message


def test_system_that_refuses_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcn.memory.advice", lambda config, size: f"{size} bytes are too few")
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    run_out(monkeypatch, refused.value)
    with pytest.raises(TrainingError, match=r"^cpu ran out of memory: \d+ bytes are too few$"):
        train_tiny(tmp_path / "run")


@pytest.mark.parametrize(
    ("crop", "scale", "size"),
    [([64, 96], None, (64, 96)), (320, [0.5, 2], (320, 320)), (None, None, (500, 500))],
)
def test_size_of_the_largest_image(crop: Any, scale: Any, size: tuple[int, int]) -> None:
    assert image_size({"crop_size": crop, "scale": scale, "dataset": {}}) == size


def test_largest_image_is_scaled() -> None:
    assert image_size({"crop_size": None, "scale": [0.5, 1.5], "dataset": {}}) == (750, 750)
    assert image_size({"crop_size": None, "scale": None, "dataset": {"size": 96}}) == (96, 96)


def test_epochs_are_converted_to_steps(tmp_path: Path) -> None:
    options = ["trainer.max_epochs=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    options += ["data.dataset.train_length=3", "data.limit=2", "trainer.val_check_interval=100"]
    summary = train_tiny(tmp_path / "run", *options)
    assert summary["steps"] == 2  # of 2 images: twice the 2 that are used
    assert summary["val/miou"] > 0
