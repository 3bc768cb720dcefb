"""What this machine is fast at, and what Lightning need not say about it."""

import ctypes
import logging
import os
import sys
import warnings

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def best_precision(accelerator: str = "auto") -> str:
    """bf16-mixed where the hardware has bfloat16, else 16-mixed on a GPU and 32-true elsewhere.

    On CPUs without bfloat16 instructions autocast is slower than float32.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        )
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"
    return "32-true"


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements and what our own lines say; warnings stay."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Lightning's own use of torch, nothing a user could change
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    # one or two workers are enough here: an image is read and cropped in milliseconds
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # of course it does, when a run is resumed
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def memory_size(device: torch.device) -> int:
    """Bytes of a GPU's own memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def prepare_cpu() -> None:
    """Keep freed memory in the process: to fetch it anew from the system at each step costs time.

    A step frees gigabytes of activations and gradients and asks for them again, and the kernel
    clears every page that it hands out: a quarter of a step on 2 cores. For glibc's malloc (Linux).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def is_main_process() -> bool:
    """Whether this is the one process of a run that writes files, talks to W&B and prints."""
    return getattr(rank_zero_only, "rank", 0) == 0
