"""Checkpoints of ours: a run's .ckpt, or the .safetensors that export.py made of one.

They may come from anybody, so nothing in them is run: tensors and plain values are read, settings
that name code are refused, and no more memory is taken than the file has bytes.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fcn.errors import ConfigError, WeightsError, reason
from fcn.runs import best_checkpoint
from fcn.weights import brief

if TYPE_CHECKING:
    from fcn.module import SegmentationModule

VOC_DATA = {"defaults": ["voc2012", "_self_"], "root": "data"}  # conf/data/voc2012.yaml
SETTINGS = ("hyper_parameters", "config", "precision", "global_step")


def find_checkpoint(path: str | Path) -> Path:
    """The best checkpoint of a run folder; any other path is a checkpoint's own."""
    return best_checkpoint(Path(path)) if Path(path).is_dir() else Path(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, or what it would be of a published net (fcn/published.py); tensors of
    a .ckpt stay on disk until they are used.

    Raises:
        WeightsError: there is none at `path`, it is broken, not ours, or could run code.
    """
    if not path.is_file():
        raise WeightsError(f"ckpt={path}: no such file")
    from fcn.published import as_checkpoint, is_published  # which builds networks

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("fcn", "{}"))
            checkpoint = {**about, "state_dict": load_file(path)}
        else:
            zipped = is_zipfile(path)  # files of torch before 1.6, as the published ones, are not
            if zipped:
                stat = path.stat()
                _check_whole(path, stat.st_mtime_ns, stat.st_size)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # bytes of any kind raise errors of any kind
        raise WeightsError(f"ckpt={path} cannot be read: {brief(error)}") from error
    if is_published(checkpoint):
        return as_checkpoint(path, checkpoint)
    names = {"state_dict", *SETTINGS}
    missing = names - set(checkpoint) if isinstance(checkpoint, dict) else names
    if missing:
        raise WeightsError(
            f"ckpt={path} is no checkpoint of this codebase: it has no {', '.join(sorted(missing))}"
        )
    return checkpoint


@lru_cache
def _check_whole(path: Path, time: int, size: int) -> None:
    """Compare every byte of a file, at this time and size, with the checksums that it holds.

    torch.save writes a ZIP, with a CRC-32 of each tensor, but torch.load does not look.

    Raises:
        ValueError: a bit has changed, or a part is missing.
    """
    with ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"it is damaged, {damaged} in it is not what was written")


def check_sizes(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a few bytes that ask for a network of any size.

    Raises:
        WeightsError: weights and settings are not of one FCN.
    """
    state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    tables = isinstance(state, Mapping) and isinstance(settings, Mapping)
    if not tables or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"ckpt={path} is no checkpoint of this codebase")
    claimed = sum(math.prod(t.shape) * t.element_size() for t in state.values())
    conv6, score = (state.get(f"network.{name}.weight") for name in ("conv6", "score"))
    if conv6 is None or score is None or conv6.ndim != 4 or score.ndim != 4:
        raise WeightsError(f"ckpt={path} holds no weights of an FCN")
    held = {"head_width": conv6.shape[0], "head_kernel": conv6.shape[2]}
    held["num_classes"] = score.shape[0]
    wrong = [f"{k}={settings[k]}" for k, size in held.items() if settings.get(k, size) != size]
    if wrong or claimed > path.stat().st_size:
        what = ", ".join(wrong) or f"of {claimed:,} bytes in a smaller file"
        raise WeightsError(f"ckpt={path}: the weights are not what it says: {what}")


def write_safetensors(
    checkpoint: Mapping[str, Any], module: "SegmentationModule", path: Path
) -> None:
    """Weights and settings of a checkpoint and its module, for other people: no code can be in it.

    Raises:
        ConfigError: `path` cannot be written.
    """
    part = path.with_name(f".{path.name}.safetensors")
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    about = {name: checkpoint[name] for name in SETTINGS}
    about["hyper_parameters"] = {**about["hyper_parameters"], "weights": None}
    about["fresh_layers"] = module.network.fresh_layers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, part, {"fcn": json.dumps(about)})
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"output={path}: {reason(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def checkpoint_data(path: Path) -> dict[str, Any]:
    """The data settings of the run that made a checkpoint.

    Raises:
        WeightsError: as `read_checkpoint`; also if the settings name code that is not ours, since
            Hydra would call it.
    """
    config = read_checkpoint(path)["config"]
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        raise WeightsError(f"ckpt={path} has no data settings; choose the data with data=...")
    _check_harmless(path, data)
    return data


def _check_harmless(path: Path, value: Any) -> None:
    """Refuse what Hydra or OmegaConf would call while they turn settings into a data module."""
    if isinstance(value, dict):
        for key, inner in value.items():
            call = key == "_target_" and not _is_ours(inner)
            if call or (key == "defaults" and inner != VOC_DATA["defaults"]):  # of Hydra's groups
                raise WeightsError(
                    f"ckpt={path} wants to call {inner}; choose the data with data=..."
                )
            _check_harmless(path, key)
            _check_harmless(path, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_harmless(path, inner)
    elif isinstance(value, str) and "${" in value:  # a run's settings are resolved when saved
        raise WeightsError(f"ckpt={path} wants to run {value}; choose the data with data=...")


def _is_ours(target: Any) -> bool:
    """Whether this names our data module, or a class that a file of fcn/datasets/ defines."""
    module, _, name = str(target).rpartition(".")
    if str(target) == "fcn.datamodule.SegmentationDataModule":
        return True
    if not re.fullmatch(r"fcn\.datasets\.\w+", module) or find_spec(module) is None:
        return False
    found = getattr(import_module(module), name, None)
    return isinstance(found, type) and found.__module__ == module
