"""How much GPU memory a training step needs, found in seconds on a machine without a GPU.

    python -m fcn.memory                                                the default settings
    python -m fcn.memory model=fcn8s data.batch_size=1,2,3 data.crop_size=320,null
    python -m fcn.memory experiment=paper_fcn8s data.batch_size=20 trainer.accumulate_grad_batches=1

The settings are those of train.py. A list gives a row of the table for each of its values, several
lists give a row for each combination. `trainer.precision=auto` is planned as bf16-mixed (on a card
without tensor cores it is 32-true), and `data.crop_size=null` as images of 500x500 pixels, the
largest of VOC2012.

Nothing is calculated from a formula. The module that train.py would build takes a training step on
tensors that have shapes but no data (torch's FakeTensorMode), and torch's MemTracker adds up the
bytes of all tensors that exist during each operation of that step. Both are private parts of torch,
which has no public way to do this. Of the other files, only fcn/inference/export.py uses a private
setting of torch.
benchmarks/memory_plan.py compares the result with the memory of real steps.

The columns of the table, in GB of 2**30 bytes, for one device and without trainer.compile:
    weights      with a second set of them where callbacks.ema keeps their moving average
    gradients    of the weights
    optimizer    its state, and what its own step needs for a moment
    activations  what the backward pass needs of the forward pass, and the 16-bit copies of the
                 weights that mixed precision makes
    rest         the batch itself, and the gradients of activations
    8 GB, ...    whether the row's batch fits on a GPU of that size, and the largest batch that
                 does. Some of the memory is left for what the plan cannot see: CUDA itself,
                 cuDNN's workspaces, gaps between tensors, and other programs
    settings     the size of the images, and what differs between the rows
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

from fcn import cli
from fcn.errors import ConfigError, check_whole
from fcn.module import SegmentationModule
from fcn.precision import AUTOCAST
from fcn.training import in_backward
from fcn.training.settings import check_settings
from fcn.training.settle import batch_image_size

GB = 2**30
CARDS = (6, 8, 11, 16, 24)  # memory of common GPUs, in GB
RESERVE = int(0.8 * GB)
LOW = AUTOCAST | {"auto": torch.bfloat16}  # what `auto` means on a GPU with bfloat16
IN_BACKWARD = "optimizer=sgd_in_backward"
KINDS = (_MemRefType.PARAM, _MemRefType.GRAD, _MemRefType.OPT, _MemRefType.ACT)


class Plan(NamedTuple):
    """Bytes of each kind at the moment of a training step when their `total` is largest."""

    weights: int
    gradients: int  # of the weights
    optimizer: int  # its state, and what its own step needs for a moment
    activations: int
    rest: int

    @property
    def total(self) -> int:
        return sum(self)


class Recorder(MemTracker):
    """A MemTracker that keeps a row of `moments` for each operation, with the columns of a Plan."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        (now,) = self.get_tracker_snapshot().values()  # there is one device
        kinds = [now[kind] for kind in KINDS]
        self.moments.append([*kinds, now["Total"] - sum(kinds)])
        return result

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):  # type: ignore[no-untyped-def]
        # The hooks recognise gradients as such. A frozen parameter has none and refuses the hook.
        hooks = install_grad_hooks and all(p.requires_grad for p in module.parameters())
        return super()._track_module_params_and_buffers(module, hooks)


class Need:
    """The memory of a step as a function of the batch size.

    At each operation of the step it is constant + slope * images. The numbers come from a step on
    one image and a step on two.
    """

    def __init__(self, config: DictConfig) -> None:
        one, two = trace(config, 1), trace(config, 2)
        self.constant, self.slope = 2 * one - two, two - one  # (moments, 5) each

    def largest_batch(self, size: int) -> int:
        """How many images fit in `size` bytes; 0 if not even one does."""
        left, slope = size - self.constant.sum(1), self.slope.sum(1)  # (moments,)
        if (left < slope).any():
            return 0
        return int((left[slope > 0] // slope[slope > 0]).min())


def plan(config: DictConfig, largest: tuple[int, int] | None = None) -> Plan:
    """The peak of a step.

    Args:
        config: the settings of train.py, composed and resolved.
        largest: the greatest height and width of the images, as for `batch_image_size`.

    Raises:
        ConfigError: a constructor refuses a setting.
    """
    return peak(trace(config, config.data.batch_size, largest))


def peak(moments: np.ndarray) -> Plan:
    """The moment at which the most memory is in use.

    Args:
        moments: (moments, 5), bytes with the columns of a Plan.
    """
    return Plan(*map(int, moments[moments.sum(1).argmax()]))


def advice(config: DictConfig, size: int, largest: tuple[int, int] | None = None) -> str:
    """A message after memory ran out: what a step needs, and which settings would need less.

    Args:
        config: the settings of the run.
        size: bytes of the device's memory.
        largest: the greatest height and width of the images, as for `batch_image_size`.
    """
    images = config.data.batch_size * config.trainer.accumulate_grad_batches
    one_by_one = f"data.batch_size=1 trainer.accumulate_grad_batches={images}"
    suggestions = {
        "trainer.precision=bf16-mixed": "if the device has bfloat16",
        "trainer.precision=16-mixed": "on other NVIDIA GPUs, but not on a GTX 16xx",
        one_by_one: "as many images a step",
        IN_BACKWARD: "the same results",
        "model.checkpoint_stages=2": "the same results, but slower",
        "data.crop_size=320": "trains on parts of the images",
        "model.freeze_stages=2": "the first two VGG stages stay as they were loaded",
        "model.head_width=1024": "conv6 and conv7 start with random weights",
    }
    if config.optimizer._target_ == in_backward.TARGET:
        del suggestions[one_by_one]  # it cannot accumulate
    try:
        in_backward.check_trainer(config.trainer)
    except ConfigError:
        del suggestions[IN_BACKWARD]
    if config.optimizer._target_ != "torch.optim.SGD":
        suggestions.pop(IN_BACKWARD, None)
    need = plan(config, largest).total
    text = f"a step needs about {need / GB:.1f} GB, and CUDA up to {RESERVE / GB:.1f} GB more; the "
    text += f"device has {size / GB:.1f} GB. Settings that need less:"
    for settings, remark in suggestions.items():
        changes = settings.replace(IN_BACKWARD, f"optimizer._target_={in_backward.TARGET}").split()
        changed: Any = OmegaConf.merge(config, OmegaConf.from_dotlist(changes))
        total = plan(changed, largest).total
        if total < 0.98 * need:
            fits = "" if total + RESERVE <= size else "; this alone is not enough"
            text += f"\n  {settings}    {total / GB:.1f} GB ({remark}{fits})"
    return text


def trace(config: DictConfig, images: int, largest: tuple[int, int] | None = None) -> np.ndarray:
    """The bytes (moments, 5) during every operation of a step on `images`, with a Plan's columns.

    It is not the run's first step: the optimizer has its state, and the gradients of the step
    before exist until Lightning sets them to None, which it does after the forward pass. Where the
    gradients of several batches are accumulated, this is the last of these batches: those of the
    batches before it stay.
    """
    module, low = build(config), LOW.get(config.trainer.precision)
    # With deep skips, a stage without its pool is a module that ends before the backward pass.
    warnings.filterwarnings("ignore", "Module is None")
    with FakeTensorMode(allow_non_fake_inputs=True):  # the module's tensors are not fake ones yet
        # They claim to be on the CPU, because autocast and fused optimizers refuse the meta device.
        module.to_empty(device="cpu")
        optimizer: Any = module.configure_optimizers()  # without a schedule, only the optimizer
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            if group.get("foreach") is None and group.get("fused") is None:
                group["foreach"] = True  # torch's default on a GPU
        for parameter in learned:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        applied: Any = nullcontext()
        if isinstance(optimizer, in_backward.SGDInBackward):  # no gradient outlives its own step
            applied = optimizer.applied_in_backward()
            optimizer.zero_grad()

        image = torch.empty(images, 3, *batch_image_size(config.data, largest), dtype=torch.uint8)
        mask = torch.empty_like(image[:, 0])  # (images, H, W)
        recorder = Recorder()
        recorder.track_external(module, optimizer, image, mask)
        with recorder:
            with torch.autocast("cpu", low, enabled=low is not None):
                loss = module.training_step({"image": image, "mask": mask}, 0)
            if config.trainer.accumulate_grad_batches == 1:
                optimizer.zero_grad()
            with applied:
                loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)  # every run at least logs the norm
            optimizer.step()
    moments = np.array(recorder.moments)
    if OmegaConf.select(config, "callbacks.ema"):  # a second set of weights, their moving average
        moments[:, 0] += sum(p.nbytes for p in module.parameters())
    return moments


def build(config: DictConfig) -> SegmentationModule:
    """The module that train.py would make, on torch's meta device and without a schedule.

    Raises:
        ConfigError: a setting cannot work.
    """
    optimizer, names = cli.build(config, "optimizer"), list(cli.build(config, "data").classes)
    with torch.device("meta"):
        module = cli.build(config, "model", weights=None, class_names=names, optimizer=optimizer)
    return module.double() if config.trainer.precision == "64-true" else module


def compose(overrides: Sequence[str]) -> DictConfig:
    """The settings of train.py with these overrides.

    Raises:
        ConfigError, or an error of Hydra's or OmegaConf's: an override is wrong.
    """
    cfg = cli.resolved(cli.compose(["name=plan", *overrides]))
    check_settings(cli.plain(cfg))
    if cfg.optimizer._target_ == in_backward.TARGET:
        in_backward.check_trainer(cfg.trainer)
    check_whole("data.batch_size", cfg.data.batch_size, 1)  # "auto" is no number to plan for
    if cfg.optimizer.get("fused") == "auto":
        cfg.optimizer.fused = cfg.trainer.precision != "16-mixed"
    return cfg


def combinations(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each row: every combination of the values in lists, such as `a=1,2`."""
    choices: list[list[str]] = []
    readable = [cli.quoted(argument) for argument in arguments]
    for override in OverridesParser.create().parse_overrides(readable):
        choices.append([override.input_line or ""])
        if override.is_sweep_override():
            key, values = override.get_key_element(), override.sweep_string_iterator()
            choices[-1] = [f"{key}={value}" for value in values]
    return list(product(*choices))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: print a table with a row for every combination of settings."""
    rows = combinations(cli.read_settings(arguments, "fcn.memory", __doc__))
    titles = [*Plan._fields, "total", *(f"{card} GB" for card in CARDS), "settings"]
    print("".join(f"{title:>12}" for title in titles))
    needs: dict[tuple[str, ...], Need] = {}  # rows that differ in the batch size alone share one
    for overrides in rows:
        cfg, others = compose(overrides), tuple(o for o in overrides if "batch_size=" not in o)
        need = needs[others] = needs.get(others) or Need(cfg)
        planned = peak(need.constant + cfg.data.batch_size * need.slope)
        height, width = batch_image_size(cfg.data)
        most = [need.largest_batch(card * GB - RESERVE) for card in CARDS]
        cells = [f"{size / GB:.2f}" for size in (*planned, planned.total)]
        cells += [f"{'yes' if cfg.data.batch_size <= n else 'no'}, {n}" for n in most]
        varied = [o for o in overrides if any(o not in row for row in rows)]
        print("".join(f"{cell:>12}" for cell in cells), f"  {height}x{width}", *varied, flush=True)
    print(f"{RESERVE / GB:.1f} GB of each card are left to CUDA. --help explains the columns.")


if __name__ == "__main__":
    cli.run(main)
