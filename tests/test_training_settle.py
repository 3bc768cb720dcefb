"""Batch size and length of a run, and what happens when memory runs out, with a made-up memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, compose_config, train_tiny
from omegaconf import OmegaConf

from fcn.checkpoint import last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, TrainingError
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.batch_size import largest_batch
from fcn.training.fit import ran_out_of_memory
from fcn.training.settle import image_size, settle_precision
from train import build_data_and_module, train


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
@pytest.mark.parametrize(("fits", "most"), [(3, 8), (9, 2)])
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


def settled(*overrides: str) -> Any:
    """The settings of a tiny run in which "auto" is replaced, for a CPU."""
    cfg = compose_config("train", *TINY, *overrides)
    settle_precision(cfg)
    return cfg


@pytest.mark.slow
def test_layout_is_settled_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for best in (True, False):
        monkeypatch.setattr(
            "fcn.training.settle.best_layout", lambda device, precision, best=best: best
        )
        assert settled().model.channels_last is best
        assert settled("model.channels_last=false").model.channels_last is False
        assert settled("model.channels_last=true").model.channels_last is True


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), True),  # crops of one size
        (("data.crop_size=null",), False),
        (("trainer.deterministic=true",), False),
        (("trainer.benchmark=false",), False),
        (("data.crop_size=null", "trainer.benchmark=true"), True),
    ],
)
def test_search_for_algorithms(overrides: tuple[str, ...], expected: bool) -> None:
    assert settled(*overrides).trainer.benchmark is expected


@pytest.mark.slow
def test_search_is_off_in_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN is not asked to find its fastest algorithm for every size of an image."""
    seen: dict[str, set[bool]] = {"training_step": set(), "validation_step": set()}
    for name, flags in seen.items():
        step = getattr(SegmentationModule, name)

        def noted(*args: Any, step: Any = step, flags: set[bool] = flags) -> Any:
            flags.add(torch.backends.cudnn.benchmark)
            return step(*args)

        monkeypatch.setattr(SegmentationModule, name, noted)
    try:
        train_tiny(tmp_path / "run")  # 4 steps, a validation after every 2
    finally:
        torch.backends.cudnn.benchmark = False
    assert seen == {"training_step": {True}, "validation_step": {False}}
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.benchmark is True


@pytest.mark.slow
def test_validation_has_a_layout_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a backward pass another layout may be the fast one; evaluate.py takes that, too."""
    layouts: list[tuple[str, bool]] = []
    forward = FCN.forward

    def noted(self: FCN, image: Any) -> Any:
        weight = self.stages[0][0].weight  # type: ignore[index]
        is_last = weight.is_contiguous(memory_format=torch.channels_last)
        layouts.append(("train" if self.training else "val", is_last))
        return forward(self, image)

    monkeypatch.setattr(FCN, "forward", noted)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    train_tiny(tmp_path / "run", "trainer.val_check_interval=2", "trainer.max_steps=4")
    # 2 steps, 3 validation images, 2 steps, 3 validation images
    expected = ["train", "train", "val", "val", "val"] * 2
    assert layouts == [(stage, stage == "val") for stage in expected]


def test_fused_optimizer_that_would_not_clip() -> None:
    scaled = ("trainer.precision=16-mixed", "trainer.gradient_clip_val=1")
    with pytest.raises(ConfigError, match=r"^optimizer\.fused=true: must be auto or false with cl"):
        settled(*scaled, "optimizer.fused=true")
    assert settled(*scaled).optimizer.fused is False
    assert settled(scaled[0], "optimizer.fused=true").optimizer.fused is True
    assert settled(scaled[1]).optimizer.fused is True


@pytest.mark.slow
def test_deterministic_run(tmp_path: Path) -> None:
    """cuBLAS reads the variable when it starts, at the first product on a GPU."""
    try:
        train_tiny(tmp_path / "run", "trainer.deterministic=true")
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


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


def test_memory_of_an_apple_gpu_runs_out() -> None:
    """The words are those of torch's MPSAllocator, as users have reported them."""
    text = "MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max "
    assert ran_out_of_memory(RuntimeError(f"{text}allowed: 6.80 GB). Tried to allocate 768.00 MB"))
    assert not ran_out_of_memory(RuntimeError("MPS backend has no such operation"))


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


def pixels_of_training() -> np.ndarray:
    """How many pixels of each class the training images of TINY have."""
    data = Shapes(split="train", size=48, train_length=10)
    masks = np.stack([sample["mask"].numpy() for sample in data])
    return np.bincount(masks[masks != 255], minlength=8)


@pytest.mark.parametrize(
    "given", ["balanced", pytest.param("[1,2,3,0,1,1,1,1]", marks=pytest.mark.slow)]
)
def test_class_weights(tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They average 1 over the training pixels, and are kept where they are looked for."""
    run = tmp_path / "run"
    train_tiny(run, f"model.class_weights={given}", "trainer.max_steps=1")
    weights = OmegaConf.load(run / "config.yaml").model.class_weights
    pixels = pixels_of_training()
    assert np.dot(weights, pixels) / pixels.sum() == pytest.approx(1, abs=1e-5)
    if given == "balanced":  # all classes have the same share of the loss
        assert np.multiply(weights, pixels) == pytest.approx(pixels.sum() / 8, rel=1e-4)
    else:
        assert np.divide(weights, weights[0]) == pytest.approx([1, 2, 3, 0, 1, 1, 1, 1])
    assert f"class weights: background {weights[0]:.3g}, disc" in capsys.readouterr().out
    again = SegmentationModule.load_from_checkpoint(last_checkpoint(run))
    assert again.class_weights is not None
    torch.testing.assert_close(again.class_weights, torch.tensor([*weights]))
    train(resumed_config(run, ["trainer.max_steps=2"]), run)
    assert OmegaConf.load(run / "config.yaml").model.class_weights == weights


def test_weights_of_classes_that_do_not_occur(tmp_path: Path) -> None:
    options = ["data.dataset.train_length=1", "model.class_weights=[0,0,0,0,0,0,0,1]"]
    with pytest.raises(ConfigError, match=r"^model\.class_weights=\[0, .*: must be above 0 for a"):
        train_tiny(tmp_path / "run", *options)
    assert list(tmp_path.iterdir()) == []


def test_least_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.min_steps=9: must be at most 5"):
        train_tiny(tmp_path / "run", "trainer.max_epochs=1", "+trainer.min_steps=9")


def test_share_of_less_than_one_validation_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.limit_val_batches=0\.3: .* one of 3 batches"):
        train_tiny(tmp_path / "run", "trainer.limit_val_batches=0.3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sanity_check_leaves_no_trace(tmp_path: Path) -> None:
    options = ["+trainer.num_sanity_val_steps=2", "trainer.max_steps=2", "seed=0"]
    train_tiny(tmp_path / "checked", *options)
    train_tiny(tmp_path / "plain", "trainer.max_steps=2")
    checked, plain = (read_metrics(tmp_path / n / "metrics.csv") for n in ("checked", "plain"))
    assert [row["step"] for row in checked] == ["1", "2"]
    assert [row["train/loss"] for row in checked] == [row["train/loss"] for row in plain]
    assert checked[-1]["val/miou"] == plain[-1]["val/miou"]


def test_epochs_are_converted_to_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["trainer.max_epochs=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    options += ["data.dataset.train_length=3", "data.limit=2", "trainer.val_check_interval=100"]
    summary = train_tiny(tmp_path / "run", *options)
    assert summary["steps"] == 2  # of 2 images: twice the 2 that are used
    printed = capsys.readouterr().out
    assert "trainer.max_epochs=2: trainer.max_steps=2, not 4" in printed
    assert summary["val/miou"] > 0
