"""Rows of `python -m benchmarks.gpu` that check: agreement with the CPU, steps, synchronisation.

A row is a function that returns its result in words. It raises `Skip` where it says nothing on this
device, and `Wrong` where a check has failed. gpu.py lists the rows, those of gpu_processes.py and
gpu_speed.py too, and turns every exception into a line of the table.
"""

import copy
import io
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peers
import pytorch_lightning as pl
import torch
from timing import ROOT
from torch import Tensor, nn

from fcn import cli
from fcn.module import SegmentationModule
from fcn.precision import AUTOCAST, best_precision
from fcn.runs.metrics import read_numbers

RECIPES = ("default", *sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
NARROW = ("model.backbone=vgg11", "model.head_width=16", "model.head_kernel=1")
BARE = [f"callbacks.{name}=null" for name in ("best_checkpoint", "panels", "curves")]
BARE += ["callbacks.score_table=null", "logger=none", "data.num_workers=0"]
BARE += ["data.dataset.train_length=100", "data.dataset.val_length=2"]
SYNC = "synchronizing CUDA operation"  # torch's words for it
STRICT = "float32 without TF32"
# The largest relative errors of logits, loss and gradients that count as agreement. For a VGG-19 of
# full width on a CPU, float32 differs from float64 by 1.5e-6, 2e-7 and 7e-5, and bfloat16 from
# float32 by 0.007, 0.004 and 0.045 (2026-11-26). float16 and TF32 have three more bits than that.
BARS = {
    STRICT: (1e-4, 1e-5, 5e-3),
    "32-true": (1e-2, 3e-3, 5e-2),
    "16-mixed": (1e-2, 3e-3, 5e-2),
    "bf16-mixed": (5e-2, 2e-2, 2e-1),
}


class Skip(Exception):
    """Why a row cannot say anything here."""


class Wrong(Exception):
    """What is not as it should be."""


@dataclass
class Bench:
    """What the rows share.

    device: cuda, mps, or cpu, the stand-in with narrow networks and small images.
    folder: for the files of runs; it is removed afterwards.
    ends: the time by time.monotonic() at which the command should have ended.
    rates: images per second that rows have measured, for the ratios of later rows.
    """

    device: str
    folder: Path
    ends: float
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def stand_in(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until the command should have ended."""
        return self.ends - time.monotonic()

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


def precisions(device: str) -> list[str]:
    """The precisions that a run on this device can be given, the one that `auto` means first."""
    best = best_precision(device)
    others = ["32-true", "bf16-mixed"] + ["16-mixed"] * (device != "cpu")
    return list(dict.fromkeys((best, *others)))


def need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


def require_precision(bench: Bench, precision: str) -> None:
    """Skip a precision that this device does not have."""
    lacks = bench.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16-mixed" and lacks:
        raise Skip("this GPU has no bfloat16, and `auto` does not choose it here")


@contextmanager
def global_settings_kept() -> Iterator[None]:
    """Put back what a row, or Lightning within it, has set for the whole process."""
    cudnn, names = torch.backends.cudnn, ("benchmark", "deterministic", "allow_tf32")
    before = {name: getattr(cudnn, name) for name in names}
    deterministic = torch.get_deterministic_debug_mode()
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(deterministic)
        for name, value in before.items():
            setattr(cudnn, name, value)


# The CPU and the device agree.


class Errors(NamedTuple):
    """Relative errors, |a - b| / |b|, against the CPU's float32; the loss as absolute values."""

    logits: float
    loss: float
    gradients: float  # of all parameters as one vector
    worst: float  # of the gradients of the one tensor where it is largest
    labels: float  # the share of pixels with the same prediction


def agree(bench: Bench, precision: str) -> str:
    """Logits, loss and gradients of one batch, with the CPU's float32 as the reference."""
    require_precision(bench, precision)
    settings = NARROW if bench.stand_in else ()
    _, module = peers.configured(f"trainer.accelerator={bench.device}", *settings)
    batch = peers.random_batch(2, 64, 96) if bench.stand_in else peers.random_batch(2, 160, 224)
    torch.backends.cudnn.allow_tf32 = precision != STRICT
    errors = agreement(module, batch, bench.device, precision)
    text = f"logits differ by {errors.logits:.1e}, the loss by {errors.loss:.1e}, gradients by "
    text += f"{errors.gradients:.1e} (at most {errors.worst:.1e} in one tensor); "
    text += f"{errors.labels:.2%} of pixels get the same label"
    met = all(error <= bar for error, bar in zip(errors, BARS[precision], strict=False))
    need(met, f"{text}; the bars are {', '.join(f'{bar:.0e}' for bar in BARS[precision])}")
    return text


def agreement(
    module: SegmentationModule, batch: tuple[Tensor, Tensor], device: str, precision: str
) -> Errors:
    """How far a device in a precision is from the CPU in float32.

    Args:
        module: its scores start at zero, so that logits would agree in any case; here they get
            random weights. It stays on the CPU.
        batch: images (N, 3, H, W) and masks (N, H, W), uint8.
    """
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    expected = _forward_and_backward(module, batch, "cpu", "32-true")
    got = _forward_and_backward(copy.deepcopy(module), batch, device, precision)
    norms = [(norm(a - b), norm(b)) for a, b in zip(got[2], expected[2], strict=True)]
    return Errors(
        norm(got[0] - expected[0]) / norm(expected[0]),
        abs(got[1] - expected[1]) / abs(expected[1]),
        math.hypot(*(error for error, _ in norms)) / math.hypot(*(norm for _, norm in norms)),
        max(error / norm for error, norm in norms if norm),
        (got[0].argmax(1) == expected[0].argmax(1)).double().mean().item(),
    )


def norm(values: Tensor) -> float:
    return values.double().norm().item()


def _forward_and_backward(
    module: SegmentationModule, batch: tuple[Tensor, Tensor], device: str, precision: str
) -> tuple[Tensor, float, list[Tensor]]:
    """Logits, the loss and all gradients, on the CPU; without dropout."""
    module.to(device).eval()
    image, mask = (part.to(device) for part in batch)
    dtype = AUTOCAST.get(precision)
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # where GradScaler begins
    while True:
        module.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            logits = module(image)
            loss = module.loss(logits, mask)
        (loss * scale).backward()
        found = [p.grad.cpu().float() / scale for p in module.parameters() if p.grad is not None]
        if scale == 1 or all(gradient.isfinite().all() for gradient in found):
            return logits.detach().cpu().float(), loss.item(), found
        scale /= 2  # as GradScaler does after an overflow


# Recipes take steps, and no step waits for the device.


def steps(bench: Bench, recipe: str, precision: str) -> str:
    """train.py with a recipe: the loss is finite, and the weights move."""
    require_precision(bench, precision)
    most = 8 if precision == "16-mixed" else 4  # GradScaler may leave out the first ones
    given = [*on_shapes(recipe, stand_in=bench.stand_in), *BARE]
    given += [f"trainer.max_steps={most}", "trainer.max_epochs=null"]
    given += ["trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"]
    given += [f"trainer.precision={precision}", f"trainer.accelerator={bench.device}"]
    columns = _train(bench, *given)
    loss, norm = columns["train/loss"], columns["train/grad_norm"]
    loss, norm = loss[~np.isnan(loss)], norm[~np.isnan(loss)]
    taken = int((np.isfinite(norm) & (norm > 0)).sum())
    need(len(loss) == most, f"{len(loss)} of {most} steps are in metrics.csv")
    need(taken > 0, f"no step had a finite gradient: the norms are {norm.tolist()}")
    left_out = f", {most - taken} of them left out by GradScaler" if taken < most else ""
    scores = columns["val/miou"]
    need(bool(np.isfinite(scores).any()), "the validation has no score")
    return f"{most} steps{left_out}, loss {loss[0]:.3f} to {loss[-1]:.3f}, and a validation"


def on_shapes(recipe: str, *, stand_in: bool) -> list[str]:
    """The settings of a recipe on generated shapes, which have other classes than its own data."""
    given = ["name=gpu", *([] if recipe == "default" else [f"experiment={recipe}"])]
    cfg = cli.compose(given)
    if stand_in:
        size = 64
        given += [*NARROW, *(["data.crop_size=64"] if cfg.data.crop_size else [])]
    else:
        size = cfg.data.dataset.get("size") or 500  # as large as the largest of VOC2012
    given += ["data=shapes", "data.train_split=train", "data.val_split=val"]
    given += [f"data.dataset.size={size}", "model.weights=null", "model.class_weights=null"]
    batches = min(cfg.trainer.accumulate_grad_batches, 2)
    return [*given, f"trainer.accumulate_grad_batches={batches}"]


def _train(bench: Bench, *settings: str) -> dict[str, np.ndarray]:
    """A run of train.py in this process; the columns of its metrics.csv."""
    from train import train

    run, settings = bench.new_folder() / "run", (*settings, "callbacks.last_checkpoint=null")
    with redirect_stdout(io.StringIO()):
        train(cli.compose(settings), run, list(settings))
    return read_numbers(run / "metrics.csv")


class SyncWatch(pl.Callback):
    """Makes torch warn of what waits for the GPU, from the batch `FIRST` up to the batch `LAST`.

    The first batches are left out, in which CUDA is set up. No step is logged in between: reading
    the losses of `trainer.log_every_n_steps` steps is meant to wait.
    """

    FIRST, LAST = 3, 9

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.FIRST, self.LAST):
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == self.FIRST else "default")

    def teardown(self, *_: Any, **__: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def waits(bench: Bench, precision: str) -> str:
    """No hidden synchronisation in a step, outside of GradScaler's own."""
    require_precision(bench, precision)
    if bench.device != "cuda":
        raise Skip("torch.cuda.set_sync_debug_mode is for CUDA only")
    given = ["name=gpu", "data=shapes", "data.dataset.size=320", "model.weights=null", *BARE]
    given += [f"trainer.precision={precision}", f"trainer.accelerator={bench.device}"]
    places = places_that_wait(bench, *given)
    hidden = {place: n for place, n in places.items() if "grad_scaler.py" not in place}
    named = ", ".join(f"{place} ({n} times)" for place, n in hidden.items())
    count = SyncWatch.LAST - SyncWatch.FIRST
    need(not hidden, f"in {count} steps Python waits for the GPU at {named}")
    return f"none in {count} steps; GradScaler's own: {places.total() / count:g} in a step"


def places_that_wait(bench: Bench, *settings: str) -> Counter[str]:
    """Where in the code, and how often, the steps of a run wait for the GPU.

    Raises:
        Wrong: this torch does not tell.
    """
    more = [f"trainer.max_steps={SyncWatch.LAST + 2}", "trainer.log_every_n_steps=1000"]
    more += ["trainer.val_check_interval=1000"]
    more += [f"+callbacks.watch._target_={SyncWatch.__module__}.SyncWatch"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.zeros(1, device=bench.device).item()
        torch.cuda.set_sync_debug_mode("default")
        found = [warning for warning in caught if SYNC in str(warning.message)]
        need(len(found) > 0, "torch does not tell of a `.item()`, so it would tell of nothing")
        caught.clear()
        _train(bench, *settings, *more)
    where = (w for w in caught if SYNC in str(w.message))
    return Counter(f"{_short(w.filename)}:{w.lineno}" for w in where)


def _short(path: str) -> str:
    """A path from the project's folder on, or from site-packages on."""
    file = Path(path)
    for root in (ROOT, Path(torch.__file__).parents[1]):
        if file.is_relative_to(root):
            return file.relative_to(root).as_posix()
    return file.as_posix()
