"""A whole training step, and its peak memory: ours against other people's.

    python benchmarks/training.py --size 375 500 --batch 1

Contestants (peers.py) take turns, a step a round, a process each, with their authors' loss and
optimizer. Memory is what the process held at most above what it held before the network was built:
RAM on a CPU, allocated memory on a GPU.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from peers import GROUPS, OURS, PEER, SMP, make, ours_here, random_batch, require
from timing import Seconds, Table, options, race, shown, speedup

from fcn.precision import best_layout, cast_weights

# Exports that benchmarks/inference.py times with the networks of a backbone, and whether in int8.
FLOAT, INT8 = "ours vgg16 onnxruntime", "ours vgg16 onnxruntime int8"
EXPORTS = {"ours vgg19 onnxruntime": ("vgg19", False), FLOAT: ("vgg16", False)}
EXPORTS[INT8] = ("vgg16", True)

# Why a machine may not show what we claim.
NO_PEER = "the one to compare with is not installed, or failed"
NO_VNNI = "this CPU has no VNNI, the instructions for products of bytes"
LARGE_HEAD = (
    "an FCN of full width has a convolution of 7×7 with 4,096 channels, which FPN and Unet have not"
)
SAME_FORMAT = "both compute in float32 here, and a VGG's convolutions are most of the step of both"


def entrant(name: str, device: str, size: tuple[int, ...], train: bool) -> Callable[[], Callable]:
    """An entrant of `race`: imports now, and builds the network when asked."""
    require(name)

    def build() -> Callable:
        contestant = make(name, device)
        contestant.network.train(train)
        if not train and name in OURS:
            precision = OURS[name][1]  # as evaluate.py and predict.py do
            layout = best_layout(torch.device(device), precision, backward=False)
            contestant.network.set_layout(layout)
            cast_weights(contestant.network, precision)
        inputs = contestant.prepare(*random_batch(*size))
        return partial(contestant.step, *inputs) if train else partial(contestant.logits, inputs[0])

    return build


def compete(args: Namespace, backbone: str, *, train: bool, **others: Callable) -> list[Table]:
    """Ours on a backbone, its peers, and `others`, at one size."""
    size, ours = (args.batch, *args.size), ours_here(args.device, backbone)
    # fp16, on a GPU without bfloat16, is in no group. What has to emulate bfloat16 takes minutes.
    names = [n for n in GROUPS[backbone] if n == ours or "bf16" not in n]
    names = list(dict.fromkeys((*names, ours)))
    entrants = {name: partial(entrant, name, args.device, size, train) for name in names} | others
    seconds, memory, notes = race(entrants, args.device, args.rounds)
    rows = []
    for name, taken in seconds.items():
        ratio = f"{speedup(seconds, name, PEER):.2f}" if PEER in seconds else "-"
        share = f"{memory[name] / memory[PEER]:.2f}" if PEER in seconds else "-"
        rate = f"{args.batch / median(taken):.2f}"
        rows.append((name, shown(taken), rate, ratio, f"{memory[name] / 2**20:.0f}", share))
    kind = "Training step" if train else "Inference"
    table = Table(
        f"{kind}, {backbone}, {args.size[0]}×{args.size[1]}, batch {args.batch}, {args.device}",
        ("", "seconds (range)", "images/s", "× torchfcn", "peak MB", "of torchfcn's"),
        rows,
        notes,
    )
    claim(table, seconds, ours)
    if train:
        held = memory[ours] / memory[PEER] if {ours, PEER} <= memory.keys() else None
        table.bar(f"{ours}: at most torchfcn's peak memory", held, high=1, why=NO_PEER)
    if INT8 in others:
        cpu = Path("/proc/cpuinfo")
        vnni = cpu.is_file() and "vnni" in cpu.read_text(encoding="utf-8")
        for times, over in ((8, PEER), (2.5, FLOAT)):
            speed = speedup(seconds, INT8, over)
            what = f"{INT8}: at least {times} times {over}"
            table.bar(what, speed, low=times, why=NO_PEER if vnni else NO_VNNI)
    return table.show()


def claim(table: Table, seconds: Seconds, ours: str) -> None:
    """How many times as fast as each peer ours is.

    In 16 bits we claim four times the speed of torchfcn's network, which computes in float32, and
    in float32 twice its speed: torchfcn pads an image by 100 pixels on each side.
    """
    half = OURS[ours][1] != "32-true"
    times = 4 if half else 2
    speed = speedup(seconds, ours, PEER)
    why = NO_PEER if half else SAME_FORMAT
    table.bar(f"{ours}: at least {times} times the speed of {PEER}", speed, low=times, why=why)
    for name in [name for name in SMP if name in seconds]:
        speed = speedup(seconds, ours, name)
        table.bar(f"{ours}: at least the speed of {name}", speed, low=1, why=LARGE_HEAD)


def main(argv: list[str] | None = None) -> list[Table]:
    args = options(__doc__, size=(375, 500), batch=1).parse_args(argv)
    return [table for backbone in GROUPS for table in compete(args, backbone, train=True)]


if __name__ == "__main__":
    main()
