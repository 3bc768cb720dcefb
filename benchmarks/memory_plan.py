"""The memory plan of fcn.memory against the measured peak of real training steps, on the CPU.

    python benchmarks/memory_plan.py                       every case
    python benchmarks/memory_plan.py --few                 one case of each kind, some minutes
    python benchmarks/memory_plan.py model=fcn8s data.batch_size=2 trainer.precision=bf16-mixed

Each case is a process of its own: Lightning's Trainer takes three real steps, and the largest
resident memory of the process above that before the network was built is compared with the plan.
Linux alone counts this, and it needs glibc.

The plan is made for GPUs. On a CPU oneDNN makes copies of weights and activations for its
convolutions, which the plan leaves out on purpose. So the bars are 10 % in bf16-mixed and 20 % in
float32, where these copies are largest. glibc keeps freed blocks of up to 32 MB, which is not
memory that a step needs: here it is made to give back all blocks from 64 kB up.
"""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fcn.memory import GB, build, compose, plan
from fcn.training.settle import batch_image_size

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
BARS = {"32-true": 0.2, "bf16-mixed": 0.1}
SIZES = ((1, 224), (1, 320), (2, 320), (1, 512))  # images, pixels
EXTRA = (  # in the last one, activations are the largest part
    ["optimizer=adamw"],
    ["optimizer=sgd_in_backward"],
    ["model.freeze_stages=2"],
    ["model.checkpoint_stages=2"],
    ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1"],
    ["model=fcn4s", "model.deep_skips=true", "model.skip_kernel=3"],
    ["model.head_width=512", "model.head_kernel=3"],
)
TINY = ["data.crop_size=32", "data.batch_size=1", "model.head_width=8", "model.head_kernel=1"]


def measure(overrides: list[str]) -> int:
    """Peak bytes of three steps above what was resident before; only in a fresh process."""
    for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        if ctypes.CDLL(None).mallopt(name, 2**16) != 1:
            raise RuntimeError("glibc did not take this setting")
    take_steps([*overrides, *TINY])  # now the libraries have loaded what they load once
    gc.collect()  # Lightning's objects refer to each other
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM, the peak, back
    take_steps(overrides)
    return status("VmHWM") - before


def take_steps(overrides: list[str], device: str = "cpu") -> None:
    """Take three steps on images of noise, as train.py would."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    config = compose(overrides)
    images, (height, width) = config["data"]["batch_size"], batch_image_size(config["data"])
    batch = {
        "image": torch.randint(256, (images, 3, height, width), dtype=torch.uint8),
        "mask": torch.randint(20, (images, height, width), dtype=torch.uint8),
    }
    module = build(config).to_empty(device=device)
    module.network.reset_parameters()
    network = module.network
    network.mean.fill_(0.5), network.std.fill_(0.25)  # to_empty leaves any values in buffers
    trainer = pl.Trainer(
        max_steps=3,
        accelerator=device,
        devices=1,
        precision=config["trainer"]["precision"],
        gradient_clip_val=config["trainer"]["gradient_clip_val"],
        accumulate_grad_batches=config["trainer"]["accumulate_grad_batches"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    steps = 3 * trainer.accumulate_grad_batches
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))


def status(field: str) -> int:
    """Bytes in a line of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def all_cases() -> list[list[str]]:
    """Networks, sizes and precisions, then what else changes the memory of a step."""
    cases = []
    for precision in BARS:
        for stride in (32, 16, 8):
            for images, pixels in SIZES:
                if stride == 8 or (images, pixels) != (1, 224):
                    sizes = [f"data.batch_size={images}", f"data.crop_size={pixels}"]
                    cases.append([f"model=fcn{stride}s", f"trainer.precision={precision}", *sizes])
    for more in EXTRA:
        for precision in BARS:
            sizes = ["data.batch_size=2", "data.crop_size=320"]
            cases.append([f"trainer.precision={precision}", *sizes, *more])
    return cases


def few_cases() -> list[list[str]]:
    """One network at one size in both precisions, a larger image, and three of the changes."""
    sizes = (["data.batch_size=2", "data.crop_size=320"], ["data.batch_size=1"])
    cases = [[f"trainer.precision={p}", *size] for size in sizes for p in BARS]
    changes = (EXTRA[0], EXTRA[2], EXTRA[4])
    return cases + [["trainer.precision=bf16-mixed", *sizes[0], *change] for change in changes]


def main() -> int:
    """Print a row for each case; 1 if one misses its bar."""
    arguments = sys.argv[1:]
    cases = few_cases() if arguments == ["--few"] else [arguments] if arguments else all_cases()
    missed = 0
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
        config = compose(case)
        measured, predicted = int(child.stdout.split()[-1]), plan(config).total
        error = predicted / measured - 1
        missed += abs(error) > BARS.get(config["trainer"]["precision"], 0.1)
        row = f"{predicted / GB:.3f} | {measured / GB:.3f} | {error:+.1%}"
        print(f"| {' '.join(case)} | {row} |", flush=True)
    bars = ", ".join(f"{bar:.0%} in {precision}" for precision, bar in BARS.items())
    print(f"\n{missed} of {len(cases)} cases are outside the bars ({bars})")
    return int(missed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measure(sys.argv[2:]))
        raise SystemExit
    raise SystemExit(main())
