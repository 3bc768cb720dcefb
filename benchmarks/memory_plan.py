"""Predicted against measured peak memory of a training step, on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/memory_plan.py

Each case is a process of its own: Lightning's Trainer takes three real steps, and the largest
resident memory (VmHWM, Linux) over that before the network was built is compared with fcn.memory's
prediction. Bar: within 10 %. glibc keeps freed blocks of up to 32 MB for itself, which is
fragmentation and not need: blocks of 64 kB and more are made to go back at once.
"""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fcn.memory import GB, build, compose, image_size, plan

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
BAR = 0.1
SIZES = ((1, 224), (1, 320), (2, 320), (1, 512))  # images, pixels
TINY = ["data.crop_size=32", "data.batch_size=1", "model.head_width=8", "model.head_kernel=1"]


def measure(overrides: list[str]) -> int:
    """Peak bytes of three steps over what was resident before; only in a fresh process."""
    for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(name, 2**16) == 1
    take_steps([*overrides, *TINY])  # libraries load what they load once
    gc.collect()  # Lightning's objects know each other
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    take_steps(overrides)
    return status("VmHWM") - before


def take_steps(overrides: list[str]) -> None:
    """Three steps on images of noise, as train.py would take them."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    config = compose(overrides)
    images, (height, width) = config["data"]["batch_size"], image_size(config)
    batch = {
        "image": torch.randint(256, (images, 3, height, width), dtype=torch.uint8),
        "mask": torch.randint(20, (images, height, width), dtype=torch.uint8),
    }
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        precision=config["trainer"]["precision"],
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        accumulate_grad_batches=config["trainer"]["accumulate_grad_batches"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    steps = 3 * trainer.accumulate_grad_batches
    trainer.fit(build(config), DataLoader([batch] * steps, batch_size=None))


def status(field: str) -> int:
    """Bytes in a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def main() -> int:
    """Print a row for each case; 1 if one is outside the bar."""
    cases = [
        [f"model=fcn{stride}s", f"trainer.precision={precision}", *sizes]
        for precision in ("32-true", "bf16-mixed")
        for stride in (32, 16, 8)
        for images, pixels in SIZES
        for sizes in [[f"data.batch_size={images}", f"data.crop_size={pixels}"]]
        if stride == 8 or (images, pixels) != (1, 224)
    ]
    extra = [  # the last: activations are most of it
        ["optimizer=adamw"],
        ["model.freeze_stages=2"],
        ["model.checkpoint_stages=2"],
        ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1"],
        ["model.head_width=512", "model.head_kernel=3"],
    ]
    cases += [
        [f"trainer.precision={p}", "data.batch_size=2", "data.crop_size=320", *more]
        for more in extra
        for p in ("32-true", "bf16-mixed")
    ]
    if sys.argv[1:]:
        cases = [sys.argv[1:]]
    worst = 0.0
    print("| settings | predicted, GB | measured, GB | error |\n| --- | --- | --- | --- |")
    for case in cases:
        child = subprocess.run(
            [sys.executable, __file__, "--measure", *case],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Lightning's advice
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        measured, predicted = int(child.stdout.split()[-1]), plan(compose(case)).total
        error = predicted / measured - 1
        worst = max(worst, abs(error))
        row = f"{predicted / GB:.3f} | {measured / GB:.3f} | {error:+.1%}"
        print(f"| {' '.join(case)} | {row} |", flush=True)
    print(f"\nlargest error {worst:.1%}, bar {BAR:.0%}, {'met' if worst <= BAR else 'NOT MET'}")
    return int(worst > BAR)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measure(sys.argv[2:]))
        raise SystemExit
    raise SystemExit(main())
