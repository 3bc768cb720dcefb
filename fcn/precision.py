"""Which precision a device is fast at, and how weights and memory are prepared for it.

best_precision("auto")      # "bf16-mixed", "16-mixed" or "32-true": trainer.precision=auto
"""

import ctypes
import sys

import torch
from torch import nn

# The data type in which autocast computes, by Lightning's name of the precision.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
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


def cast_weights(network: nn.Module, precision: str) -> None:
    """Cast a network's weights once, which autocast would otherwise do again for every image.

    The scores stay the same, and the weights take half the memory. This is not for training: small
    updates of 16-bit weights would be rounded away.

    Args:
        network: is changed in place.
        precision: Lightning's name; only "bf16-mixed" and "16-mixed" change anything.
    """
    dtype = AUTOCAST.get(precision)
    for layer in network.modules():
        if dtype is not None and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(dtype)


def keep_freed_memory() -> None:
    """Keep freed memory in the process instead of giving it back to the operating system.

    Each training step frees gigabytes of activations and gradients and then asks for as much again.
    The kernel clears every page that it hands out, which took a quarter of a step on 2 CPU cores.
    This is a setting of glibc's malloc, so it does nothing on other systems than Linux.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
