"""The table of graphics cards in README.md: calculated, not measured.

    python -m benchmarks.cards

For each card it tells what to install, the precision that trainer.precision=auto chooses, the
largest batch of 500x500 pixels by the plan of `python -m fcn.memory`, and hours of training. The
hours are the arithmetic of a training step, counted by torch's FlopCounterMode, divided by an
assumed speed: half of what the card's data sheet promises, or 40 % of it from 100 TFLOP/s on, as
in docs/scaling.md. Images are taken as 384x512, the usual photograph of VOC2012 after padding.
Validation, loading, and everything that is not a convolution come on top.
"""

from typing import NamedTuple
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from fcn.cards import has_code_for
from fcn.memory import GB, RESERVE, Need, build, compose
from fcn.precision import best_precision

# torch.cuda.get_arch_list() of PyPI's torch 2.14.
PYPI = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
IMAGE = (384, 512)
SBD = 8498  # training images
EPOCHS = {"paper_fcn32s": 175, "paper_fcn16s": 58, "paper_fcn8s": 58}


class Card(NamedTuple):
    """What a data sheet says."""

    name: str
    capability: tuple[int, int] | None  # None: Apple's
    memory: float  # GB that a process may use
    tflops: float  # dense, with sums in float32: on tensor cores for 16 bits, else in float32


CARDS = (
    Card("GTX 1060 6 GB", (6, 1), 6, 4.4),
    Card("GTX 1070 8 GB", (6, 1), 8, 6.5),
    Card("GTX 1080 Ti 11 GB", (6, 1), 11, 11.3),
    Card("GTX 1660 6 GB", (7, 5), 6, 5.0),
    Card("RTX 2060 6 GB", (7, 5), 6, 25.8),
    Card("T4 16 GB (Colab, Kaggle)", (7, 5), 15, 65),  # 16 GB less those for error correction
    Card("V100 16 GB", (7, 0), 16, 112),
    Card("RTX 3060 12 GB", (8, 6), 12, 25.5),
    Card("RTX 3090 24 GB", (8, 6), 24, 71),
    Card("RTX 4060 8 GB", (8, 9), 8, 30.2),
    Card("RTX 4090 24 GB", (8, 9), 24, 165),
    Card("Apple M1 16 GB", None, 10.7, 2.6),  # Metal recommends two thirds of the memory
)


def choice(card: Card) -> tuple[str, str]:
    """What to install, and the precision, as train.py would choose it on that card."""
    if card.capability is None:
        with mock.patch("torch.backends.mps.is_available", return_value=True):
            return "PyPI", best_precision("mps")
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=card.capability),
        mock.patch("torch.cuda.get_device_name", return_value=card.name),
    ):
        wheel = "PyPI" if has_code_for(card.capability, PYPI) else "cu126"
        return wheel, best_precision(torch.device("cuda"))


def flops(*settings: str) -> int:
    """Floating-point operations of a training step on one image: forward and backward pass."""
    module = build(compose(settings)).to("meta")
    image = torch.zeros(1, 3, *IMAGE, dtype=torch.uint8, device="meta")
    mask = torch.zeros(1, *IMAGE, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        module.training_step({"image": image, "mask": mask}, 0).backward()
    return counter.get_total_flops()


def main() -> None:
    """Print the table in Markdown."""
    needs = {p: Need(compose([f"trainer.precision={p}"])) for p in ("32-true", "bf16-mixed")}
    cfg = compose([])
    default = cfg.trainer.max_steps * cfg.data.batch_size * flops()
    paper = sum(n * SBD * flops(f"experiment={name}") for name, n in EPOCHS.items())
    print(
        f"<!-- {flops() / 1e12:.2f} TFLOP for an image; {default:.3g} in all, paper {paper:.3g} -->"
    )
    print("| card | torch from | precision | largest batch | default, hours | paper, hours |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for card in CARDS:
        wheel, precision = choice(card)
        need = needs["32-true" if precision == "32-true" else "bf16-mixed"]
        images = need.largest_batch(int(card.memory * GB) - RESERVE)
        speed = card.tflops * 1e12 * (0.4 if card.tflops >= 100 else 0.5)
        hours = [f"{total / speed / 3600:.2g}" for total in (default, paper)]
        hours = [str(round(float(text))) if float(text) >= 10 else text for text in hours]
        print("|", " | ".join([card.name, wheel, precision, str(images), *hours]), "|", flush=True)


if __name__ == "__main__":
    main()
