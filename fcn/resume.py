"""Going on with a run: which run, and which of its checkpoints."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from fcn.checkpoints import read_checkpoint
from fcn.devices import is_main_process
from fcn.errors import ConfigError, WeightsError
from fcn.runs import is_locked, last_checkpoint

# What a kill leaves of files that are written under another name first
LEFTOVERS = [".*.csv.*", ".*.yaml.*", ".*.json.*", ".*.png", "checkpoints/.*.part"]
LEFTOVERS += ["panels/.*.png", "panels/.*.gif", "panels/frames/.*.png"]


def find_run(new: Path, overrides: list[str], *, named: bool, main: bool) -> Path | None:
    """What `resume=auto` means: the newest run with this command line that has not ended.

    A run that is being trained, and one that has no checkpoint yet, is none to go on with.

    Args:
        new: the folder that a new run would have.
        named: somebody has chosen this name, so that the run must have it (or it and a number),
            not just be near.
        overrides: the command line.
        main: whether this is the process that holds the run's lock. Others go where it is.

    Returns:
        A finished run if there is no other; None if a new one is to be started.
    """
    wanted, finished = [o for o in overrides if not o.startswith("resume=")], None
    name = re.escape(new.name) + r"(_\d+)?" if named else ".*"
    for run in sorted(new.parent.glob("*"), reverse=True):  # the newest first
        given = run / "overrides.yaml"
        if not re.fullmatch(name, run.name) or not given.is_file():
            continue
        if list(OmegaConf.load(given)) != wanted:
            continue
        if is_finished(run):
            finished = finished or run
        elif any(run.glob("checkpoints/*.ckpt")) and not (main and is_locked(run)):
            return run
    return finished


def is_finished(run: Path) -> bool:
    """Whether a run has come to the end that its settings gave it."""
    summary = run / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["status"] == "finished"


def whole_checkpoint(run: Path, weights: Mapping[str, Tensor]) -> Path:
    """The newest checkpoint of a run that can be relied on.

    A file that a kill, a disk or a hand has damaged is named and passed over.

    Args:
        run: the run folder.
        weights: what the network needs, by name; their shapes count.

    Raises:
        ConfigError: there is none.
    """
    steps: dict[Path, int] = {}
    wrong: list[str] = []
    for path in sorted(run.glob("checkpoints/*.ckpt")):
        try:
            steps[path] = _step(path, weights)
        except WeightsError as error:
            wrong.append(str(error).removeprefix("ckpt="))
    # of the same step, last.ckpt: it may have to make up for a validation
    newest = max(steps, key=lambda path: (steps[path], path == last_checkpoint(run)), default=None)
    if newest is None:
        raise ConfigError(f"resume={run}: " + ("; ".join(wrong) or "there is no checkpoint in it"))
    if wrong and is_main_process():
        print(
            f"warning: {'; '.join(wrong)}\ngoing on from {newest}, step {steps[newest]}", flush=True
        )
    return newest


def _step(path: Path, weights: Mapping[str, Tensor]) -> int:
    """The optimizer step of a checkpoint that is whole and fits.

    Raises:
        WeightsError: it is not.
    """
    checkpoint = read_checkpoint(path)
    missing = {"optimizer_states", "callbacks", "loops"} - set(checkpoint)
    if missing:
        raise WeightsError(
            f"{path} is no checkpoint to go on from: no {', '.join(sorted(missing))}"
        )
    if _shapes(checkpoint["state_dict"]) != _shapes(weights):
        raise WeightsError(f"{path} holds another network than this run's")
    return checkpoint["global_step"]


def remove_leftovers(run: Path) -> None:
    """What a killed process had not finished writing."""
    for pattern in LEFTOVERS:
        for path in run.glob(pattern):
            path.unlink()


def checkpoint_step(checkpoint: Path | None) -> int:
    """The optimizer step at which a checkpoint was made."""
    if checkpoint is None:
        return 0
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}
