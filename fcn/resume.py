"""Old names, until their users have moved."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fcn.checkpoint import newest_checkpoint
from fcn.runs.folder import OLD_PARTS
from fcn.runs.folder import remove_parts as remove_leftovers  # noqa: F401
from fcn.runs.process import is_main_process
from fcn.runs.resume import find_run, is_finished  # noqa: F401

LEFTOVERS = [*OLD_PARTS, "**/.*.part"]


def whole_checkpoint(run: Path, weights: Mapping[str, Tensor]) -> Path:
    newest, wrong = newest_checkpoint(run, weights)
    if wrong and is_main_process():
        step = checkpoint_step(newest)
        print(f"warning: {'; '.join(wrong)}\ngoing on from {newest}, step {step}", flush=True)
    return newest


def checkpoint_step(checkpoint: Path | None) -> int:
    """The optimizer step at which a checkpoint was made."""
    if checkpoint is None:
        return 0
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
