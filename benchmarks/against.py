"""Whether this checkout is as fast as another one of the project, such as an earlier commit.

    git worktree add ../before COMMIT
    python benchmarks/against.py --other ../before

A training step, a forward pass and evaluate.py are timed for both checkouts in alternating pairs,
each in a fresh process with two threads, so that whatever disturbs the machine disturbs both. The
network is a VGG-19 FCN-8s of full width with random weights, in bfloat16 if the CPU has it. The
number to look at is the median of the ratios, one for each pair: above 1, this checkout is faster.
It needs a quiet machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parents[1]
JOBS = ("training step", "forward pass", "evaluation")
BAR = 0.95
BACKBONE = {"backbone": "vgg19"}  # and a head of full width


def main(argv: list[str] | None = None) -> list:
    """Time both checkouts in turn, and print the ratios."""
    from timing import Table, options

    parser = options(__doc__, pairs=10, size=320, steps=3, images=12)
    parser.add_argument("--other", type=Path, required=True, help="the other checkout")
    args = parser.parse_args(argv)
    checkouts = {"this": HERE, "other": args.other.resolve()}
    seconds: dict[str, dict[str, list[float]]] = {
        job: {name: [] for name in checkouts} for job in JOBS
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {name: Path(folder) / f"{name}.ckpt" for name in checkouts}
        for name, checkout in checkouts.items():
            child(checkout, "checkpoint", str(checkpoints[name]))
        for pair in range(args.pairs):
            order = list(checkouts) if pair % 2 == 0 else list(checkouts)[::-1]
            for name in order:
                steps = child(checkouts[name], "steps", str(args.size), str(args.steps))
                seconds[JOBS[0]][name].append(steps["train"])
                seconds[JOBS[1]][name].append(steps["forward"])
            for name in order:
                rate = evaluation(checkouts[name], checkpoints[name], args.size, args.images)
                seconds[JOBS[2]][name].append(1 / rate)
            print(f"pair {pair + 1} of {args.pairs}", file=sys.stderr, flush=True)
    rows, ratios = [], {}
    for job, taken in seconds.items():
        each = [b / a for a, b in zip(taken["this"], taken["other"], strict=True)]
        ratios[job] = median(each)
        times = [f"{median(taken[name]):.3f}" for name in checkouts]
        rows.append((job, *times, f"{ratios[job]:.3f} ({min(each):.3f}-{max(each):.3f})"))
    table = Table(
        f"This checkout against {args.other}, {args.size}×{args.size}, {args.pairs} pairs, cpu",
        ("", "seconds, this", "seconds, other", "other / this (range)"),
        rows,
    )
    for job, ratio in ratios.items():
        what = f"{job}: at least {BAR} times as fast as the other checkout"
        table.bar(what, ratio, low=BAR, why="this checkout is slower, or the machine was disturbed")
    return table.show()


def environment() -> dict[str, str]:
    """Two threads; and glibc's malloc keeps freed memory, as it does in train.py."""
    malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    return os.environ | malloc | {"OMP_NUM_THREADS": "2"}


def child(checkout: Path, job: str, *arguments: str) -> dict[str, float]:
    """Run one job of this file in a checkout's own code; what it measured."""
    command = [sys.executable, __file__, "--child", job, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def evaluation(checkout: Path, checkpoint: Path, size: int, images: int) -> float:
    """Images per second of evaluate.py on generated pictures, as it counts them itself."""
    output = checkpoint.with_suffix("")
    command = [sys.executable, "evaluate.py", f"ckpt={checkpoint}", f"output={output}"]
    command += ["data=shapes", f"data.dataset.size={size}", f"data.dataset.val_length={images}"]
    command += ["data.num_workers=0", "report.images=0", "accelerator=cpu"]
    done = subprocess.run(command, cwd=checkout, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: evaluate.py failed:\n{done.stderr}")
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))["images_per_second"]


# What follows runs in the other checkout too, so it uses only what both have.


def module() -> Any:
    """A full-width FCN-8s for the classes of data=shapes."""
    import torch

    from fcn.datasets.shapes import Shapes
    from fcn.module import SegmentationModule

    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
    return SegmentationModule(
        class_names=list(Shapes.classes),
        palette=[list(colour) for colour in Shapes.palette],
        optimizer=sgd,
        stride=8,
        **BACKBONE,
        channels_last=True,
    )


def save_checkpoint(path: Path) -> dict[str, float]:
    """A checkpoint without training, that evaluate.py opens."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path.cwd() / "conf"), version_base="1.3"):
        cfg = compose("train", ["name=against", "data=shapes", "logger=none"])
    made, precision = module(), "bf16-mixed" if has_bfloat16() else "32-true"
    checkpoint = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams)}
    checkpoint |= {"config": OmegaConf.to_container(cfg, resolve=True), "global_step": 0}
    checkpoint |= {"precision": precision, "pytorch-lightning_version": "2.6.0"}
    made.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return {}


def has_bfloat16() -> bool:
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def time_steps(size: int, steps: int) -> dict[str, float]:
    """Median seconds of a training step and of a forward pass on one image."""
    import torch

    made = module()
    optimizer = made.configure_optimizers()
    batch = {
        "image": torch.randint(256, (1, 3, size, size), dtype=torch.uint8),
        "mask": torch.randint(4, (1, size, size), dtype=torch.uint8),
    }
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=has_bfloat16())

    def train() -> None:
        with autocast():
            loss = made.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def forward() -> None:
        with autocast():
            made(batch["image"])

    found = {}
    for name, job in (("train", train), ("forward", forward)):
        made.train(name == "train")
        taken = []
        for _ in range(1 + steps):
            began = time.perf_counter()
            job()
            taken.append(time.perf_counter() - began)
        found[name] = median(taken[1:])  # the first one is slower
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.path[0] = str(Path.cwd())  # the checkout's code in place of this folder
        job, *given = sys.argv[2:]
        save = job == "checkpoint"
        print(json.dumps(save_checkpoint(Path(given[0])) if save else time_steps(*map(int, given))))
    else:
        main()
