"""Which precision and which memory layout a device is fast at, and how weights and memory fit it.

    device = main_device("auto")          # trainer.accelerator=auto
    precision = best_precision(device)    # trainer.precision=auto, for example "bf16-mixed"
    best_layout(device, precision)        # model.channels_last=auto: True or False

The choices were timed on CPUs (docs/memory.md); on a GPU, an H100, only bf16-mixed against 32-true.
For GPUs, these are the choices and their reasons:

- NVIDIA from Ampere on: bf16-mixed, channels last. Tensor cores; bfloat16 has the range of float32,
  so that the loss needs no scale.
- V100 and Turing (RTX 20xx, T4): 16-mixed, channels last. Tensor cores for float16, while bfloat16
  is emulated.
- GTX 16xx (TU116 and TU117, which are Turing without tensor cores): 32-true. In float16, cuDNN's
  convolutions give NaN there (pytorch #58123, #77955), and autocast is slower (apex #806).
- Pascal (GTX 10xx): 32-true. float16 arithmetic has 1/64 of the speed of float32, so that cuDNN
  converts all values to float32. 16-mixed saves activations' memory, but no time: docs/memory.md.
- Apple's GPUs: 32-true. No gain from 16 bits is known. Until torch 2.14, the backward pass of a
  convolution is many times slower on channels last (pytorch #193349).

Without tensor cores, channels last is slower: a GTX 1650 had 5 % of the speed in float16 (lc0
#849), and older cards half the speed in float32 (pytorch #44943). A # names an issue on GitHub.
"""

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import nn

from fcn.cards import has_tensor_cores

# The data type in which autocast computes, by Lightning's name of the precision.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
AMPERE = (8, 0)  # NVIDIA's number of the first generation with bfloat16
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def main_device(accelerator: str = "auto", devices: object = 1) -> torch.device:
    """The first device that Lightning would take.

    Args:
        accelerator, devices: as in conf/trainer. A list of devices names them by their numbers.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        first = devices[0] if isinstance(devices, Sequence) and devices else 0
        return torch.device("cuda", first if isinstance(first, int) else 0)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def best_precision(device: torch.device | str = "auto") -> str:
    """bf16-mixed where the hardware has bfloat16, 16-mixed on older tensor cores, else 32-true.

    On CPUs without bfloat16 instructions autocast is slower than float32.

    Args:
        device: a device, or the name of an accelerator as `main_device` takes it.
    """
    device = main_device(device) if isinstance(device, str) else device
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= AMPERE:
            return "bf16-mixed"
        return "16-mixed" if has_tensor_cores(device) else "32-true"
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    bfloat16 = able.get("avx512_bf16") or able.get("amx_bf16")
    return "bf16-mixed" if device.type == "cpu" and bfloat16 else "32-true"


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """The precisions that exist on a device: Apple's mps has no float64."""
    return tuple(p for p in PRECISIONS if device.type != "mps" or p != "64-true")


def best_layout(device: torch.device, precision: str, *, backward: bool = True) -> bool:
    """Whether convolutions are faster on activations (N, H, W, C).

    They are on tensor cores, which compute 16-bit products; from Ampere on also those of float32,
    as TF32. On CPUs they are too, but not the backward pass in float32 on a CPU that has AVX2 and
    no AVX-512: a step of experiment=camvid_fcn8s took 7.7 s there, and 6.2 s on (N, C, H, W); its
    forward pass alone 2.1 and 2.3 s (2 cores of an AMD EPYC, 2026-11-26).

    Args:
        device, precision: where and how the network computes.
        backward: whether the network also learns.
    """
    if device.type != "cuda":
        slow = precision not in AUTOCAST and torch.backends.cpu.get_cpu_capability() == "AVX2"
        return device.type == "cpu" and not (backward and slow)
    ampere = torch.cuda.get_device_capability(device) >= AMPERE
    return has_tensor_cores(device) and (
        precision in AUTOCAST or (ampere and precision == "32-true")
    )


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
