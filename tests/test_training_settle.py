"""Batch size and length of a run, and what happens when memory runs out, with a made-up memory."""

import gc
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FINISHED, TINY, compose_config, train_tiny
from omegaconf import DictConfig, OmegaConf

from fcn import memory
from fcn.checkpoint import last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, TrainingError
from fcn.memory import Plan
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.batch_size import largest_batch
from fcn.training.fit import ran_out_of_memory
from fcn.training.settle import (
    batch_image_size,
    largest_image,
    settle_class_weights,
    settle_precision,
)
from train import build_data_and_module, train


@pytest.fixture(scope="module")
def tiny() -> DictConfig:
    return compose_config("train", *TINY)


def settled(cfg: DictConfig, changes: str) -> DictConfig:
    """These settings with changes `key=value`, and with "auto" replaced, for a CPU."""
    changed = OmegaConf.merge(cfg, OmegaConf.from_dotlist(changes.split()))
    assert isinstance(changed, DictConfig)
    settle_precision(changed)
    return changed


@pytest.mark.slow
def test_largest_batch(tiny: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of more images than fit fail as they do on a GPU."""
    _, module = build_data_and_module(settled(tiny, ""))
    before = deepcopy(module.state_dict())
    step, tried, fits = SegmentationModule.training_step, set[tuple[int, ...]](), 0

    def limited(self: SegmentationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        tried.add(tuple(batch["image"].shape[1:]))
        if len(batch["image"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", limited)
    gc.freeze()  # Lightning collects garbage at every try, among all that other tests have left
    # The third once never ended, and the fourth gave 8, which nothing had tried.
    for most, fitting, expected in ((8, 3, 3), (2, 3, 2), (5, 4, 4), (5, 16, 5)):
        fits = fitting
        found = largest_batch(module, (32, 64), most=most, accelerator="cpu", devices=1)
        assert found == expected
    gc.unfreeze()
    assert tried == {(3, 32, 64)}
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


CLIPPED, SCALED = "trainer.gradient_clip_val=1 ", "trainer.precision=16-mixed "
NOTHING = "data.dataset.train_length=1 model.class_weights=[0,0,0,0,0,0,0,1]"


@pytest.mark.slow
def test_the_batch_size_is_looked_for_with_class_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are tried need the weights, too."""

    def found(config: Any, images: Any, module: SegmentationModule, trainer: Any) -> int:
        assert module.class_weights is not None
        return 2

    monkeypatch.setattr("fcn.training.settle._find_batch_size", found)
    options = ["data.batch_size=auto", "model.class_weights=balanced", "trainer.max_steps=1"]
    assert train_tiny(tmp_path / "run", *options)["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("data.batch_size=auto", r".*batch_size=auto .* 1 x cpu.*python -m fcn\.memory"),
        (NOTHING, r"model\.class_weights=\[0, .*: must be above 0 for a"),
        ("trainer.max_epochs=1 +trainer.min_steps=9", r"trainer\.min_steps=9: must be at most 5"),
        ("trainer.limit_val_batches=0.3", r"trainer\.limit_val_batches=0\.3: .* one of 3 batches"),
        (
            SCALED + "optimizer.fused=true",
            r"optimizer\.fused=true: must be auto or false in 16-mixed",
        ),
    ],
)
def test_what_the_data_or_the_device_refuse(options: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        train_tiny(tmp_path / "run", *options.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ("model.channels_last=auto", "model.channels_last", True),
        ("model.channels_last=false", "model.channels_last", False),
        ("", "trainer.benchmark", True),  # crops have one size
        ("data.crop_size=null", "trainer.benchmark", False),
        ("trainer.deterministic=true", "trainer.benchmark", False),
        ("trainer.benchmark=false", "trainer.benchmark", False),
        ("data.crop_size=null trainer.benchmark=true", "trainer.benchmark", True),
        (CLIPPED, "optimizer.fused", True),
        (CLIPPED + SCALED, "optimizer.fused", False),
    ],
)
def test_what_depends_on_the_device_and_on_other_settings(
    changes: str, key: str, expected: bool, tiny: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory layout, cuDNN's search for the fastest algorithm, an optimizer that clips."""
    monkeypatch.setattr("fcn.training.settle.best_layout", lambda *_: True)
    assert OmegaConf.select(settled(tiny, changes), key) is expected


def test_float64_on_apples_gpus(tiny: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have none: torch would end with a TypeError at the first step."""
    monkeypatch.setattr("fcn.training.settle.main_device", lambda *_: torch.device("mps"))
    with pytest.raises(ConfigError, match=r"^trainer\.precision=64-true: must be 32-true, or auto"):
        settled(tiny, "trainer.precision=64-true")


@pytest.mark.slow
def test_layout_and_search_in_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backward pass another layout may be the fast one; evaluate.py takes that, too.

    cuDNN is not asked to find its fastest algorithm for every size of an image.
    """
    seen: list[tuple[bool, bool, bool]] = []
    forward = FCN.forward

    def noted(self: FCN, image: Any) -> Any:
        weight = self.stages[0][0].weight  # type: ignore[index]
        is_last = weight.is_contiguous(memory_format=torch.channels_last)
        seen.append((self.training, is_last, torch.backends.cudnn.benchmark))
        return forward(self, image)

    monkeypatch.setattr(FCN, "forward", noted)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    try:
        train_tiny(tmp_path / "run", "trainer.val_check_interval=2", "trainer.max_steps=4")
    finally:
        torch.backends.cudnn.benchmark = False
    # 2 steps, 3 validation images, 2 steps, 3 validation images
    assert seen == ([(True, False, True)] * 2 + [(False, True, False)] * 3) * 2
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").trainer.benchmark is True


@pytest.mark.slow
def test_out_of_memory_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        torch.empty(2**60)  # which the system refuses

    plan, plans = memory.plan, list[Plan]()

    def planned(*arguments: Any) -> Plan:
        """The first is that of the run. With each other setting, a step needs nothing."""
        plans.append(Plan(0, 0, 0, 0, 0) if plans else plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(memory, "plan", planned)
    monkeypatch.setattr(SegmentationModule, "on_train_batch_start", fail)
    with pytest.raises(TrainingError) as error:
        train_tiny(tmp_path / "run", "data.batch_size=4", "data.crop_size=128")
    message = str(error.value)
    assert message.startswith("cpu ran out of memory: a step needs about")
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in message


@pytest.mark.slow
def test_out_of_memory_in_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training step needs has nothing to do with it."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SegmentationModule, "validation_step", fail)
    with pytest.raises(TrainingError, match="cpu ran out of memory in a validation, ") as error:
        train_tiny(tmp_path / "two", "data.eval_batch_size=2")
    assert str(error.value).endswith(f"resume={tmp_path / 'two'} data.eval_batch_size=1")
    with pytest.raises(TrainingError, match="16 bits where the device has them") as error:
        train_tiny(tmp_path / "one")  # where this would change nothing
    assert str(error.value).endswith(f"resume={tmp_path / 'one'}")


def test_memory_of_a_gpu_runs_out() -> None:
    """The words for Apple's GPUs are those of torch's MPSAllocator, as users have reported them."""
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    text = "MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max "
    assert ran_out_of_memory(RuntimeError(f"{text}allowed: 6.80 GB). Tried to allocate 768.00 MB"))
    assert not ran_out_of_memory(RuntimeError("MPS backend has no such operation"))


@pytest.mark.parametrize(
    ("data", "size"),
    [
        ({"crop_size": [64, 96], "scale": None, "dataset": {}}, (64, 96)),
        ({"crop_size": 320, "scale": [0.5, 2], "dataset": {}}, (320, 320)),
        ({"crop_size": None, "scale": [0.5, 1.5], "dataset": {}}, (750, 750)),
        ({"crop_size": None, "scale": None, "dataset": {"size": 96}}, (96, 96)),
    ],
)
def test_size_of_the_largest_image(data: dict[str, Any], size: tuple[int, int]) -> None:
    assert batch_image_size(data) == size


def test_size_of_the_largest_image_of_own_data(tiny_voc: Path) -> None:
    """A batch is padded to the greatest height and the greatest width that meet in it."""
    largest = largest_image(VOC2012(split="train", root=tiny_voc))
    assert largest == (96, 96)
    assert largest_image(Shapes(split="train")) is None
    data = {"crop_size": None, "scale": [0.5, 2], "dataset": {}}
    assert batch_image_size(data, largest) == (192, 192)
    assert batch_image_size(data | {"crop_size": 64}, largest) == (64, 64)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """How many pixels of each class the training images of TINY have."""
    data = Shapes(split="train", size=48, train_length=10)
    masks = np.stack([sample["mask"].numpy() for sample in data])
    return np.bincount(masks[masks != 255], minlength=8)


def test_class_weights_average_1(tiny: DictConfig, pixels: np.ndarray) -> None:
    given = [1, 2, 3, 0, 1, 1, 1, 1]
    cfg = settled(tiny, f"model.class_weights={given}".replace(" ", ""))
    settle_class_weights(cfg, *build_data_and_module(cfg))
    weights = cfg.model.class_weights
    assert np.dot(weights, pixels) / pixels.sum() == pytest.approx(1, abs=1e-5)
    assert np.divide(weights, weights[0]) == pytest.approx(given)


@pytest.mark.slow
def test_balanced_class_weights(
    tmp_path: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """All classes have the same share of the loss. Config and checkpoint keep the weights."""
    run = tmp_path / "run"
    train_tiny(run, "model.class_weights=balanced", "trainer.max_steps=1")
    weights = OmegaConf.load(run / "config.yaml").model.class_weights
    assert np.multiply(weights, pixels) == pytest.approx(pixels.sum() / 8, rel=1e-4)
    assert f"class weights: background {weights[0]:.3g}, disc" in capsys.readouterr().out
    again = SegmentationModule.load_from_checkpoint(last_checkpoint(run))
    assert again.class_weights is not None
    torch.testing.assert_close(again.class_weights, torch.tensor([*weights]))
    train(resumed_config(run, ["trainer.max_steps=2"]), run)
    assert OmegaConf.load(run / "config.yaml").model.class_weights == weights


@pytest.mark.slow
def test_sanity_check_leaves_no_trace(tmp_path: Path, finished_run: Path) -> None:
    """The rows are those of a run without it, since the seed decides them."""
    torch.manual_seed(99)
    train_tiny(tmp_path / "run", *FINISHED, "+trainer.num_sanity_val_steps=2")
    checked, plain = (read_metrics(r / "metrics.csv") for r in (tmp_path / "run", finished_run))
    for row in (*checked, *plain):
        del row["train/images_per_second"]
    assert checked == plain


@pytest.mark.slow
def test_epochs_are_converted_to_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["trainer.max_epochs=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    options += ["data.dataset.train_length=3", "data.limit=2", "trainer.val_check_interval=100"]
    summary = train_tiny(tmp_path / "run", *options)
    assert summary["steps"] == 2  # of 2 images: twice the 2 that are used
    assert (
        "trainer.max_epochs=2: these are 2 steps, as trainer.max_steps=2" in capsys.readouterr().out
    )
    assert summary["val/miou"] > 0
