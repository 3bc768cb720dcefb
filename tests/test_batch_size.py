"""data.batch_size=auto, and what happens when memory runs out, with a memory that we make up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, compose_config, train_tiny

from fcn.batch_size import largest_batch
from fcn.errors import ConfigError, TrainingError
from fcn.module import SegmentationModule
from train import build_module, open_data


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
@pytest.mark.parametrize(("fits", "most"), [(3, 50), (5, 50), (9, 4)])
def test_largest_batch(monkeypatch: pytest.MonkeyPatch, fits: int, most: int) -> None:
    cfg = compose_config("train", *TINY)
    module = build_module(cfg, open_data(cfg))
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
    assert message.startswith("cpu ran out of memory: a step of these settings needs about")
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in message


@pytest.mark.slow
def test_system_that_refuses_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    run_out(monkeypatch, refused.value)
    with pytest.raises(TrainingError, match="cpu ran out of memory"):
        train_tiny(tmp_path / "run")
