"""What this machine is fast at, and what Lightning need not say about it."""

import logging
import warnings

import torch


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
