"""What an evaluation reads: checkpoints, made ready to be scored, and the data of their runs.

    candidate = open_candidate(Path("best.ckpt"), accelerator="auto")
    datamodule, settings = chosen_data(cfg, candidate.path, candidate.checkpoint)
    check_classes([candidate], datamodule.classes)

evaluate.py calls these before anything is downloaded or computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from fcn import cli
from fcn.cards import check_card
from fcn.checkpoint import SETTINGS, data_settings, read_checkpoint, without_targets
from fcn.datamodule import SegmentationDataModule
from fcn.datasets import VOID
from fcn.errors import ConfigError, WeightsError, check_choice, check_text, refuse
from fcn.files import sha256
from fcn.module import SegmentationModule
from fcn.precision import PRECISIONS, best_layout, best_precision, cast_weights, precisions_of


@dataclass
class Candidate:
    """A checkpoint that is to be scored.

    Attributes:
        path: the file.
        sha256: of its content when it was opened. A run that still trains replaces its last.ckpt.
        checkpoint: the settings in it, without tensors. Tensors would keep the file mapped, and
            Windows would not let a run that still trains write its last.ckpt.
        module: the module that was built from it, with its network and classes.
        trainer: a Lightning Trainer for the wanted device and precision, which writes nothing.
    """

    path: Path
    sha256: str
    checkpoint: dict[str, Any]
    module: SegmentationModule
    trainer: pl.Trainer


def open_candidate(
    path: Path,
    *,
    accelerator: str,
    precision: str | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    exported: tuple[dict[str, Any], nn.Module] | None = None,
) -> Candidate:
    """Read a checkpoint and make it ready to be scored.

    Args:
        path: the checkpoint.
        accelerator: "auto", "cpu", "gpu", "mps" or another of Lightning's.
        precision: one of `fcn.precision.PRECISIONS`. None: the one that the run was trained in, or,
            where the device cannot compute in that, the one it is fast at.
        wrap: a function that puts something around the network, such as
            `fcn.inference.tta.TestTime`, which takes and returns what a network does. None leaves
            the network as it is.
        exported: for an ONNX file, what `fcn.inference.onnx_session.open_onnx` gives: what a
            checkpoint holds besides weights, and a network.

    Raises:
        WeightsError: the checkpoint is missing, broken or not ours.
        ConfigError: there is no such device, or it cannot compute in this precision.
        DeviceError: torch has no code for the device.
    """
    checkpoint, network = exported or (read_checkpoint(path), None)
    content = sha256(path)
    if network is not None:
        if accelerator not in ("auto", "cpu") or precision not in (None, "32-true"):
            raise ConfigError(
                f"ckpt={path}: an ONNX file runs with accelerator=cpu precision=32-true"
            )
        accelerator = "cpu"
    given, precision = precision, precision or checkpoint["precision"]
    trainer = _trainer(accelerator, precision)
    device = trainer.strategy.root_device
    check_card(device)
    # Lightning turns 16-mixed into bf16-mixed on a CPU.
    if trainer.precision != precision or precision not in precisions_of(device):
        if given is not None:
            other = {"32-true", str(trainer.precision)} & {*precisions_of(device)}
            wanted = f"{' or '.join(sorted(other))} on the device {device.type}"
            refuse("precision", precision, wanted)
        precision = best_precision(device)
        trainer = _trainer(accelerator, precision)
    if network is None:
        module = SegmentationModule.load_from_checkpoint(path, checkpoint=checkpoint)
        if precision == "64-true":  # it was built in float32, which has rounded the weights
            module.double().load_state_dict(checkpoint["state_dict"])
        module.network.set_layout(best_layout(device, precision, backward=False))
        cast_weights(module.network, precision)
    else:
        # The file takes the place of this network, which is therefore made as small as it can be.
        size: dict[str, Any] = {"backbone": "vgg11", "head_width": 1, "head_kernel": 1}
        module = SegmentationModule(**checkpoint["hyper_parameters"], **size)
        module.network = network  # type: ignore[assignment]
    if wrap is not None:
        module.network = wrap(module.network)  # type: ignore[assignment]  # called like an FCN
    settings = {name: checkpoint[name] for name in SETTINGS}
    return Candidate(path, content, settings, module, trainer)


def _trainer(accelerator: str, precision: str) -> pl.Trainer:
    """A Trainer that writes nothing. Only Lightning knows the device of each accelerator.

    Raises:
        ConfigError: there is no such accelerator, or no such precision.
    """
    check_text("accelerator", accelerator, wanted="auto, cpu, gpu, mps or another of Lightning's")
    check_choice("precision", precision, PRECISIONS)
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise ConfigError(f"accelerator={accelerator} precision={precision}: {error}") from error


def chosen_data(
    cfg: Any, path: Path, checkpoint: Mapping[str, Any]
) -> tuple[SegmentationDataModule, dict[str, Any]]:
    """The data of the run that made a checkpoint, or those of data=GROUP.

    Args:
        cfg: composed from conf/evaluate.yaml or conf/export.yaml. Without a group, `cfg.data` holds
            changes of the run's settings, such as {"root": "/data", "dataset": {"other": True}}.
        path, checkpoint: the file, and what is in it: among others, the data settings of its run.

    Returns:
        The data module and all of its settings.

    Raises:
        FCNError: the checkpoint has no data settings, or they cannot work.
    """
    changes = cli.plain(cfg.data)
    if "_target_" in changes:  # data=GROUP
        return cli.build(cfg, "data"), without_targets(changes)
    given = data_settings(checkpoint)
    if given is None:
        raise WeightsError(f"{path} has no data settings; choose the data with data=...")
    settings = _merged(given, changes)
    try:
        return SegmentationDataModule.from_settings(settings), settings
    except (TypeError, ValueError) as error:
        cli.raise_named("data", error)


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, which may be nested dicts.

    This does not use OmegaConf, which would evaluate a `${...}` that a hostile checkpoint may hold.
    """
    result = {**settings, **changes}
    for key, change in changes.items():
        old = settings.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            result[key] = _merged(old, change)
    return result


def check_classes(candidates: Sequence[Candidate], classes: Sequence[str]) -> None:
    """Refuse to compare checkpoints with each other, or with data, that have other classes.

    Args:
        candidates: one, or the A and B of a comparison.
        classes: those of the data.

    Raises:
        ConfigError: the names of the classes, or their order, are not the same everywhere, or a
            checkpoint's label of void pixels is not 255, which all data sets and padding have.
    """
    for candidate in candidates:
        if candidate.module.void != VOID:
            what = f"{candidate.path} has void={candidate.module.void}, but all data has {VOID}"
            raise ConfigError(f"{what}: it cannot be scored on this data")
    known = [candidate.module.class_names for candidate in candidates]
    first = "the checkpoint" if len(known) == 1 else "A"
    for other, names in (("B", known[-1]), ("the data", list(classes))):
        if len(names) != len(known[0]):
            numbers = f"{first} has {len(known[0])} classes, {other} {len(names)}"
            raise ConfigError(f"{numbers}: they must be the same classes")
        for label, (one, two) in enumerate(zip(known[0], names, strict=True)):
            if one != two:
                both = f"label {label} is {one!r} for {first}, but {two!r} for {other}"
                raise ConfigError(f"{both}: they must have the same classes in the same order")
