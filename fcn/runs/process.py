"""The process that a run is in: whether it is the main one, its memory, and its warnings."""

import logging
import sys
import warnings
from contextlib import suppress

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only


def is_main_process() -> bool:
    """Whether this is the one process of a run that writes files, talks to W&B and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0


def quiet_lightning() -> None:
    """Hide Lightning's advertisements, and messages that repeat our own. Other warnings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # This warning is about how Lightning itself uses torch, and no user could change that.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # Lightning wants more loader processes. One or two are enough: an image takes milliseconds.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The folder of checkpoints of a resumed run is not empty, of course.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # In 16-mixed, GradScaler skips the first optimizer steps until its scale fits, while the
    # schedule goes on. In other precisions Lightning calls both, in the right order.
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before .optimizer.step.*")
    # fcn/training/trainer.py refuses this.
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU.*")


def memory_size(device: torch.device) -> int:
    """The bytes of a GPU's memory; for any other device, those of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def peak_memory() -> int | None:
    """The most bytes that a run had allocated on the GPU, or that this process held in RAM.

    The system counts the RAM of a process from its start, so that a later job of a sweep may have
    the peak of an earlier one. None where the system does not count it.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with suppress(ImportError):
        import resource  # Linux and macOS have this

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with suppress(ImportError):  # a figure of memory is no reason to stop
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows has this
    return None
