"""What only a GPU can show: `python -m pytest -m gpu`, which `python -m benchmarks.gpu` runs too.

GPU_TESTS_ON=cpu runs these tests on the CPU, to see that they themselves work.
"""

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, train_tiny
from test_runs_resume import assert_same, stopped

from fcn.checkpoint import best_checkpoint
from fcn.metrics import ConfusionMatrix
from fcn.module import SegmentationModule
from fcn.runs.resume import resumed_config
from train import train

FOUND = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else ""
DEVICE = os.environ.get("GPU_TESTS_ON") or FOUND
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not DEVICE, reason="there is no CUDA or MPS device"),
]
ON_DEVICE = f"trainer.accelerator={DEVICE}"
# cuBLAS reads this once, at its first call, and deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def needs(*devices: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(DEVICE not in devices, reason=f"needs {' or '.join(devices)}")


@pytest.fixture(autouse=True)
def process_wide_settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`import gpu_rows` works, and what a run sets for its process does not stay."""
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    from gpu_rows import global_settings_kept

    with global_settings_kept():
        yield


@pytest.mark.parametrize("precision", ["float32 without TF32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_logits_loss_and_gradients_are_those_of_the_cpu(
    precision: str, channels_last: bool
) -> None:
    from gpu_rows import BARS, agreement
    from peers import random_batch

    lacks = DEVICE == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16-mixed" and lacks:
        pytest.skip("this GPU has no bfloat16")
    torch.manual_seed(0)
    small = {"backbone": "vgg_tiny", "head_width": 32, "head_kernel": 3}
    module = SegmentationModule(num_classes=21, channels_last=channels_last, **small)
    torch.backends.cudnn.allow_tf32 = False
    errors = agreement(module, random_batch(2, 90, 110), DEVICE, precision)
    assert all(e <= bar for e, bar in zip(errors, BARS[precision], strict=False)), errors


@pytest.mark.parametrize("deterministic", [False, True])
def test_confusion_matrix_is_that_of_numpy(deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    rng, k = np.random.default_rng(0), 150
    label = rng.integers(0, k + 1, (2, 300, 400)).astype(np.uint8)
    label[label == k] = 255
    label[0] = 3  # one class for most pixels, so that many are added to one number
    prediction = rng.integers(0, k, label.shape)
    counted = ConfusionMatrix(k, void=255).to(DEVICE)
    for i in range(2):
        counted.update(*(torch.from_numpy(x[i]).to(DEVICE) for x in (prediction, label)))
    expected = np.zeros((k, k), np.int64)
    np.add.at(expected, (label[label != 255], prediction[label != 255]), 1)
    assert np.array_equal(counted.compute().cpu().numpy(), expected)


@needs("cuda")
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_does_not_wait_for_the_gpu(precision: str, optimizer: str, tmp_path: Path) -> None:
    from gpu_rows import BARE, Bench, places_that_wait

    given = [*TINY, *BARE, ON_DEVICE, f"trainer.precision={precision}", f"optimizer={optimizer}"]
    given += ["trainer.enable_progress_bar=true", "trainer.gradient_clip_val=1"]
    given += ["model.class_weights=balanced"]
    places = places_that_wait(Bench(DEVICE, tmp_path, 0), *given)
    assert all("grad_scaler.py" in place for place in places), places
    assert bool(places) == (precision == "16-mixed")


def test_a_deterministic_run_is_the_same_again(tmp_path: Path) -> None:
    given = ("model=fcn8s", "trainer.deterministic=true", ON_DEVICE)
    for name in ("one", "two"):
        train_tiny(tmp_path / name, *given)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    given = ("model=fcn8s", "optimizer=adamw", "scheduler=poly", "trainer.deterministic=true")
    given += (ON_DEVICE, "callbacks=ema", "callbacks.ema.decay=0.9", "trainer.log_every_n_steps=1")
    train_tiny(tmp_path / "whole", *given)
    with stopped(2, signal.SIGINT):
        train_tiny(tmp_path / "stopped", *given)
    train(resumed_config(tmp_path / "stopped", []), tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_clipping_is_of_gradients_without_the_loss_scale(precision: str, tmp_path: Path) -> None:
    """A step of plain SGD on gradients that were clipped to a norm c changes the weights by lr c.

    Clipped before the loss scale is divided away, it would be lr c / 65536, or less than that.
    """
    if precision == "16-mixed" and DEVICE == "cpu":
        pytest.skip("16-mixed is for GPUs")
    rate, norm, steps = 1e-2, 1e-3, 4
    given = [ON_DEVICE, f"trainer.precision={precision}", f"trainer.gradient_clip_val={norm}"]
    given += [f"optimizer.lr={rate}", "optimizer.momentum=0", "optimizer.weight_decay=0"]
    given += ["model.bias_lr_multiplier=1", f"trainer.max_steps={steps}"]
    given += ["trainer.val_check_interval=1"]
    states: list[dict[str, torch.Tensor]] = []
    validation_starts = SegmentationModule.on_validation_epoch_start

    def keep(module: SegmentationModule) -> None:
        states.append({n: p.detach().cpu().clone() for n, p in module.named_parameters()})
        validation_starts(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "on_validation_epoch_start", keep)
        train_tiny(tmp_path / "run", *given)
    moves = [
        torch.stack([(after[n] - before[n]).norm() for n in after]).norm().item()
        for before, after in pairwise(states)
    ]
    taken = [move for move in moves if move > 0]  # GradScaler may leave out the first steps
    assert taken
    assert taken == pytest.approx([rate * norm] * len(taken), rel=0.02)


def test_a_checkpoint_of_the_gpu_gives_the_same_logits_on_the_cpu(tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", "model=fcn8s", "trainer.max_steps=2", ON_DEVICE)
    module = SegmentationModule.load_from_checkpoint(best_checkpoint(tmp_path / "run")).eval()
    image = torch.randint(256, (2, 3, 75, 91), dtype=torch.uint8)
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        expected = module(image)
        got = module.to(DEVICE)(image.to(DEVICE)).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
