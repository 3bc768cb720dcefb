"""All benchmarks, one after another; writes results.md and results.json beside this file.

python benchmarks/run.py
python benchmarks/run.py --only training input
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from timing import Table, options

SIZES = (("--size", "375", "500", "--batch", "1"), ("--size", "320", "320", "--batch", "3"))
RUNS = {"training": SIZES, "inference": SIZES, "floor": SIZES}
RUNS |= {"input": ((),), "evaluation": ((),), "start": ((),)}
TRIED = Path(__file__).parent / "tried.md"  # written by hand
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchfcn")
PACKAGES += ("segmentation-models-pytorch", "onnxruntime")


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, output=Path(__file__).parent)
    choices = [*RUNS, "memory_plan"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    args = parser.parse_args(argv)
    common = ["--device", args.device, "--rounds", str(args.rounds)]
    began, load = time.time(), os.getloadavg()[0]
    tables: list[Table] = []
    plan = ""
    for name in args.only:
        if name == "memory_plan":
            command = [sys.executable, Path(__file__).with_name("memory_plan.py")]
            plan = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
            plan = f"### Peak memory of a training step, cpu\n\n{plan}"
        for sizes in RUNS.get(name, ()):
            tables += import_module(name).main([*common, *sizes])
        text = (
            f"# Benchmarks\n\n`python benchmarks/run.py`, {date.today()}, "
            f"{(time.time() - began) / 60:.0f} minutes. {machine()}, load {load:.1f} before. "
            f"{', '.join(versions())}. Medians of {args.rounds} interleaved rounds; a ratio is the "
            "median of the rounds' ratios. The scripts say what they measure.\n\n"
            "| bar | measured | |\n| --- | ---: | --- |\n"
        )
        text += "".join(f"| {t.title}: {' | '.join(bar)} |\n" for t in tables for bar in t.bars)
        text += "\n" + "\n".join([*map(str, tables), plan, TRIED.read_text()])
        (args.output / "results.md").write_text(text)  # at once: a later one may fail
        plain = json.dumps([asdict(table) for table in tables], indent=1)
        (args.output / "results.json").write_text(plain + "\n")


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads{gpu}"


def versions() -> list[str]:
    from fcn.runs import git_revision

    found = [f"revision {git_revision()}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


if __name__ == "__main__":
    main()
