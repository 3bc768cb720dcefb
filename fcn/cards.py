"""What the graphics card at hand can do: whether torch has code for it, and its tensor cores.

    check_card(device)           # train.py, evaluate.py and predict.py call it before they compute
    has_tensor_cores(device)     # fcn/precision.py goes by it

A torch has code for some generations of NVIDIA's cards only. On another card everything seems well
until the first operation, which fails with "no kernel image is available for execution".
"""

import logging
import re
import shutil
from collections.abc import Sequence

import torch

from fcn.errors import DeviceError

Capability = tuple[int, int]  # NVIDIA's number of a generation, "compute capability": (7, 5)

log = logging.getLogger(__name__)

WHEELS = "https://download.pytorch.org/whl"
# From CUDA 13 on, NVIDIA's compiler knows no cards before Turing. PyPI's torch is built with it.
OLDEST_OF_PYPI: Capability = (7, 5)
OLD_CARDS = (
    "Cards before Turing (GTX 9xx and 10xx, Titan V, P100, V100) need PyTorch's wheels for CUDA "
    f"12.6. torch 2.14 is the last that has them:\n  pip install --force-reinstall torch "
    f"torchvision --index-url {WHEELS}/cu126"
)
OLDEST_OF_ALL: Capability = (5, 0)  # of the wheels for CUDA 12.6
TOO_OLD = "No torch of today has code for cards before Maxwell (GTX 9xx)."
# --force-reinstall, because pip regards a wheel for CUDA 12.6 of the same version as up to date.
NEW_CARDS = (
    "PyPI's newest torch has code for the newest cards (on Windows, the one that "
    "https://pytorch.org/get-started/locally/ names for CUDA):\n"
    "  pip install --upgrade --force-reinstall torch torchvision"
)
# Turing without tensor cores: TU116 and TU117, of the same capability 7.5 as all other Turing.
NO_TENSOR_CORES = re.compile(r"GTX 16\d\d|\bT\d{3,4}\b|\bMX[45]50\b|CMP 30HX")


def has_code_for(capability: Capability, arch_list: Sequence[str]) -> bool:
    """Whether a torch can compute on a card.

    Args:
        capability: of the card.
        arch_list: what torch was compiled for, as `torch.cuda.get_arch_list()` has it. "sm_86" is
            code for cards of capability 8.6 up to, but not including, 9.0. "compute_90" is compiled
            by the driver for any card from 9.0 up. Code that ends with "a" is for exactly this
            capability, and with "f" for its family, which is all of the same first number here.
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", str(arch_list)):
        code = (int(major), int(minor))
        if suffix == "a":
            fits = code == capability
        elif kind == "compute" and not suffix:
            fits = code <= capability
        else:
            fits = code[0] == capability[0] and code[1] <= capability[1]
        if fits:
            return True
    return False


def check_card(device: torch.device) -> None:
    """Refuse an NVIDIA card that the installed torch has no code for.

    Raises:
        DeviceError: the message names the card and the command that installs a torch with code.
    """
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's cards have other numbers
        return
    known, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    if known and not has_code_for(capability, known):
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        advice = OLD_CARDS if capability < OLDEST_OF_PYPI else NEW_CARDS
        raise DeviceError(
            f"{device}: the installed torch {torch.__version__} has no code for this card, a {name}"
            f" (compute capability {major}.{minor}); it has {' '.join(known)}. "
            f"{TOO_OLD if capability < OLDEST_OF_ALL else advice}"
            "\nAnother device can be chosen: trainer.accelerator=cpu for train.py, accelerator=cpu "
            "for evaluate.py, device=cpu for predict.py"
        )


def has_tensor_cores(device: torch.device) -> bool:
    """Whether an NVIDIA card computes products of 16-bit matrices many times faster than others."""
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    return capability >= (7, 0) and not NO_TENSOR_CORES.search(name)


def warn_about_unused_card() -> None:
    """Warn where there is an NVIDIA driver, but no card that torch can use, and say why."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return
    if torch.version.cuda is None:
        why = f"the installed torch {torch.__version__} is a build without CUDA; on Windows, PyPI "
        why += "has no other. https://pytorch.org/get-started/locally/ has the command for one "
        why += f"with CUDA. {OLD_CARDS}"
    else:
        why = f"the driver may be too old for the CUDA {torch.version.cuda} of the installed torch "
        why += f"{torch.__version__} (nvidia-smi shows the newest CUDA that it knows), or the "
        why += "variable CUDA_VISIBLE_DEVICES hides the card"
    log.warning(
        "torch finds no GPU although nvidia-smi is installed, so this run would take days on the "
        "CPU: %s. trainer.accelerator=cpu, if that is what you want, avoids this warning",
        why,
    )
