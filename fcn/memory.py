"""The peak memory of a training step, without a GPU and in seconds: what fits, and how to fit.

    python -m fcn.memory                                                the default settings
    python -m fcn.memory model=fcn8s data.batch_size=1,2,3 data.crop_size=320,null
    python -m fcn.memory experiment=voc_mini trainer.precision=32-true,bf16-mixed

Settings are those of train.py; a list gives a row for each choice, several lists every combination.
`trainer.precision=auto` is planned as bf16-mixed, `data.crop_size=null` as 500x500 pixels, VOC's
largest. The real module takes a real step on tensors without data (torch's FakeTensorMode), and
torch's MemTracker says which of them live. benchmarks/memory_plan.py checks it.
"""

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mem_tracker import _MemRefType as Kind

from fcn.config import check_training, short_messages
from fcn.errors import ConfigError

if TYPE_CHECKING:
    from fcn.module import SegmentationModule

Config = Mapping[str, Any]  # what conf/train.yaml composes to, resolved, as plain Python

GB = 2**30
CARDS = (6, 8, 11, 16, 24)  # GB
RESERVE = int(0.8 * GB)
LARGEST_IMAGE = 500  # pixels, of VOC2012
NOTES = f"""\
GB = 2**30 bytes, on one device, without torch.compile. Card columns: does the row fit, and the
largest batch that does. {RESERVE / GB:.1f} GB of each card are kept for what cannot be seen here: \
the CUDA context,
cuDNN's workspaces, fragmentation in the allocator, other programs. rest: gradients of activations,
16-bit copies of weights, the batch, and the copies in another layout that oneDNN makes for a
convolution on a CPU: measured there, and here in the place of cuDNN's own."""


@dataclass(frozen=True)
class Plan:
    """Bytes that live at the peak of a step that is not the first; together the `total`."""

    weights: int
    gradients: int  # of weights
    optimizer: int  # its state, and what its step needs for a moment
    activations: int
    rest: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


class Recorder(MemTracker):
    """MemTracker that writes down what lives during every operation: `moments`, as in a Plan."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten._to_copy.default:  # autocast's: of a weight, of its gradient
            info, *_ = self._WINFO.get(args[0].untyped_storage(), (None,))
            if info is not None and info.reftype in (Kind.PARAM, Kind.GRAD):
                kind = Kind.OTH if info.reftype is Kind.PARAM else Kind.GRAD
                self._update_and_maybe_create_winfos(result, kind)
        elif func is torch.ops.aten.convolution_backward.default:
            for gradient in result[1:]:
                if gradient is not None:
                    self._update_and_maybe_create_winfos(gradient, Kind.GRAD)
        (now,) = self.get_tracker_snapshot().values()
        kept = [now[kind] for kind in (Kind.PARAM, Kind.GRAD, Kind.OPT, Kind.ACT)]
        for extra in workspace(func, args, result):
            self.moments.append([*kept, now["Total"] - sum(kept) + extra])
        return result

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, False)  # frozen ones take no hook


def workspace(func: object, args: Sequence[Any], result: Any) -> tuple[int, ...]:
    """Bytes that an operation needs while it runs, beside operands and results; by its phases.

    A softmax copies what is not contiguous. oneDNN's convolutions: channels last is their own
    layout but for weights, which they copy, and whose gradient they sum up apart; torch first
    brings all operands there. Else they work on copies of operands and results, the latter when
    the former are gone. The gradient of 16-bit weights is summed up in float32, from transposed
    copies of one image. Found with ONEDNN_VERBOSE=1 and VmHWM, one operation at a time.
    """
    if func is torch.ops.aten._log_softmax.default and not args[0].is_contiguous():
        return (args[0].nbytes,)
    forward = func is torch.ops.aten.convolution.default
    if not forward and func is not torch.ops.aten.convolution_backward.default:
        return (0,)
    *features, weight = operands = args[: 2 if forward else 3]
    x, features_size = features[-1], sum(f.nbytes for f in features)
    transposed = 0 if forward or weight.element_size() > 2 else features_size // len(x)
    last = [t.is_contiguous(memory_format=torch.channels_last) for t in operands]
    if any(done and not t.is_contiguous() for done, t in zip(last, operands, strict=True)):
        brought = sum(t.nbytes for done, t in zip(last, operands, strict=True) if not done)
        return (brought + weight.nbytes * (1 if forward else 2) + transposed,)
    if forward:
        return features_size + weight.nbytes, result.nbytes
    if transposed:
        return (features_size + transposed + 2 * weight.nbytes,)
    return features_size, weight.nbytes


class Need:
    """A step's memory for any batch size: what lives during each operation is affine in it."""

    def __init__(self, config: Config) -> None:
        one, two = trace(config, 1), trace(config, 2)
        self.constant, self.slope = 2 * one - two, two - one

    def plan(self, images: int) -> Plan:
        return _peak(self.constant + images * self.slope)

    def largest_batch(self, size: int) -> int:
        left, slope = size - self.constant.sum(1), self.slope.sum(1)
        if (left < slope).any():
            return 0
        return int((left[slope > 0] // slope[slope > 0]).min())


def plan(config: Config) -> Plan:
    """The peak of a step with these settings."""
    return _peak(trace(config, config["data"]["batch_size"]))


def largest_batch(config: Config, size: int) -> int:
    """How many images a step of these settings can have within `size` bytes; 0: not even one."""
    return Need(config).largest_batch(size)


def advice(config: Config, size: int) -> str:
    """After a step did not fit a device of `size` bytes: what it needs, and which settings less."""
    accumulate = config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"]
    levers: list[tuple[dict[str, Any], str]] = [
        ({"trainer.precision": "bf16-mixed"}, "where the device has bfloat16"),
        ({"data.batch_size": 1, "trainer.accumulate_grad_batches": accumulate}, "the same step"),
        ({"model.checkpoint_stages": 2}, "the same numbers, slower"),
        ({"data.crop_size": 320}, "parts of images"),
        ({"model.freeze_stages": 2}, "edges and textures stay as loaded"),
        ({"model.head_width": 1024}, "conv6 and conv7 start at random"),
    ]
    need = plan(config).total
    lines = [
        f"a step of these settings needs about {need / GB:.1f} GB, and CUDA up to "
        f"{RESERVE / GB:.1f}, of the device's {size / GB:.1f} GB. Settings that need less:"
    ]
    for changes, remark in levers:
        if all(key.split(".")[1] in config[key.split(".")[0]] for key in changes):
            total = plan(changed(config, changes)).total
            if total < 0.98 * need:
                setting = " ".join(f"{key}={value}" for key, value in changes.items())
                fits = "" if total + RESERVE <= size else "; not enough alone"
                lines.append(f"  {setting}    {total / GB:.1f} GB ({remark}{fits})")
    return "\n".join(lines)


def changed(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with other values, by their keys `group.name`."""
    copy = deepcopy(dict(config))
    for key, value in changes.items():
        group, name = key.split(".")
        copy[group][name] = value
    return copy


def trace(config: Config, images: int) -> np.ndarray:
    """Bytes (moments, 5) during the operations of a step on `images`; columns as in a Plan."""
    trainer, kind = config["trainer"], precision(config)
    low = torch.float16 if kind == "16-mixed" else torch.bfloat16
    with torch.device("meta"):
        module = build(config)
    with FakeTensorMode():
        # On the CPU: autocast and fused optimizers refuse the meta device.
        dtype = torch.float64 if kind == "64-true" else torch.float32
        for part in module.modules():
            for name, old in [*part.named_parameters(recurse=False)]:
                new = torch.empty_strided(old.shape, old.stride(), dtype=dtype)
                part._parameters[name] = nn.Parameter(new, old.requires_grad)
            for name, constant in [*part.named_buffers(recurse=False)]:
                part._buffers[name] = torch.empty(constant.shape, dtype=dtype)
        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            if group.get("foreach") is None and group.get("fused") is None:
                group["foreach"] = True  # the default on a GPU
        for parameter in learned:  # of the step before: the optimizer's state and gradients
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()

        height, width = image_size(config)
        image = torch.empty(images, 3, height, width, dtype=torch.uint8)
        mask = torch.empty(images, height, width, dtype=torch.uint8)
        recorder = Recorder()
        recorder.track_external(module, optimizer, image, mask)
        with recorder:
            for number in range(min(2, trainer["accumulate_grad_batches"])):
                recorder.reset_mod_stats()  # else a second forward pass is an error
                with torch.autocast("cpu", low, enabled=kind.endswith("mixed")):
                    loss = module.training_step({"image": image, "mask": mask}, number)
                if number == 0:
                    optimizer.zero_grad()  # as late as this, in Lightning
                loss.backward()
            nn.utils.clip_grad_norm_(learned, trainer["gradient_clip_val"] or float("inf"))
            optimizer.step()
    moments = np.array(recorder.moments)
    if config["callbacks"].get("average_decay") is not None:
        moments[:, 0] += sum(p.nbytes for p in module.parameters())  # a second set of weights
    return moments


def _peak(moments: np.ndarray) -> Plan:
    return Plan(*map(int, moments[moments.sum(1).argmax()]))


def build(config: Config) -> "SegmentationModule":
    """The module as train.py makes it, but with random weights and no schedule."""
    from hydra.utils import instantiate

    optimizer = dict(config["optimizer"])
    if optimizer.get("fused") == "auto":
        optimizer["fused"] = precision(config) != "16-mixed"
    return instantiate(
        config["model"],
        weights=None,
        class_names=list(instantiate(config["data"], _convert_="all").classes),
        optimizer=instantiate(optimizer, _convert_="all"),
        _convert_="all",
    )


def precision(config: Config) -> str:
    """That of the trainer; on the GPU that we plan for, `auto` is bf16-mixed."""
    return config["trainer"]["precision"].replace("auto", "bf16-mixed")


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of a training batch: the crop, or the largest image."""
    data = config["data"]
    largest = data["dataset"].get("size", LARGEST_IMAGE) * max(data["scale"] or [1])
    height, width = np.broadcast_to(data["crop_size"] or round(largest), 2).tolist()
    return height, width


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of train.py, checked.

    Raises:
        ConfigError, or an error of Hydra's or OmegaConf's: an override is wrong.
    """
    import hydra
    from omegaconf import OmegaConf

    folder = Path(__file__).resolve().parents[1] / "conf"
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose("train", ["name=plan", *overrides])
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_training(config)
    if config["data"]["batch_size"] == "auto":
        raise ConfigError("data.batch_size=auto: the last columns have it; give a number here")
    return config


def main(arguments: Sequence[str]) -> None:
    """The command line: a table with a row for every combination of choices."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console
    from rich.table import Table

    with short_messages(HydraException, OmegaConfBaseException):
        choices = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [o.input_line or ""]
            for o in OverridesParser.create().parse_overrides(list(arguments))
        ]
        varied = [number for number, several in enumerate(choices) if len(several) > 1]
        table = Table(*(choices[number][0].partition("=")[0] for number in varied))
        for title in (*(f.name for f in fields(Plan)), "total", *(f"{card} GB" for card in CARDS)):
            table.add_column(title, justify="right", no_wrap=True)
        needs: dict[str, Need] = {}
        sizes: set[str] = set()
        for overrides in product(*choices):
            config = compose(overrides)
            images, others = config["data"]["batch_size"], changed(config, {"data.batch_size": 1})
            need = needs[repr(others)] = needs.get(repr(others)) or Need(others)
            row = need.plan(images)
            most = [need.largest_batch(card * GB - RESERVE) for card in CARDS]
            table.add_row(
                *(overrides[number].partition("=")[2] for number in varied),
                *(f"{size / GB:.2f}" for size in (*astuple(row), row.total)),
                *(f"{'yes' if images <= largest else 'no'}, {largest}" for largest in most),
            )
            sizes.add("x".join(map(str, image_size(config))))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 160
    console.print(table)
    print(f"Images of {', '.join(sorted(sizes))} pixels. {NOTES}")


if __name__ == "__main__":
    main(sys.argv[1:])
