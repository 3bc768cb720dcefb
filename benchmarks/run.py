"""All benchmarks, one after another; writes results.md and results.json into this folder.

    python benchmarks/run.py --data-root data
    python benchmarks/run.py --only training input      # the rest stays as it was measured before

`data` holds photographs of PASCAL VOC2012, in VOCdevkit/VOC2012.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from timing import DATA, Table, options

from fcn.runs.versions import git_revision

SIZES = (("--size", "375", "500", "--batch", "1"), ("--size", "320", "320", "--batch", "3"))
RUNS = {"training": SIZES, "inference": SIZES, "floor": SIZES}
RUNS |= {"levers": ((),), "input": ((),), "waiting": ((),)}
RUNS |= {"loops": ((),), "start": ((),)}
WITH_DATA = ("input", "waiting", "loops")  # those that read photographs
TRIED = Path(__file__).parent / "tried.md"  # written by hand
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchfcn")
PACKAGES += ("segmentation-models-pytorch", "onnxruntime")


def main(argv: list[str] | None = None) -> None:
    """Run the chosen benchmarks, and write results.md."""
    parser = options(__doc__, output=Path(__file__).parent, data_root=DATA)
    choices = [*RUNS, "memory_plan"]
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    args = parser.parse_args(argv)
    common = ["--device", args.device, "--rounds", str(args.rounds)]
    data = ["--data-root", str(args.data_root)]
    file = args.output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name in args.only:
        began, load = time.time(), psutil.getloadavg()[0]
        tables, text = [], ""
        if name == "memory_plan":
            command = [sys.executable, Path(__file__).with_name("memory_plan.py")]
            text = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
            text = f"### Peak memory of a training step, cpu\n\n{text}"
        for sizes in RUNS.get(name, ()):
            own = data if name in WITH_DATA else []
            tables += import_module(name).main([*common, *sizes, *own])
            text = f"Medians of {args.rounds} interleaved rounds."
        results[name] = {
            "when": f"{date.today()}, {(time.time() - began) / 60:.0f} minutes, load {load:.1f} "
            f"before, revision {git_revision()}. {machine()}; {', '.join(versions())}",
            "tables": [asdict(table) for table in tables],
            "text": text,
        }
        # Written after each benchmark, because a later one may fail.
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (args.output / "results.md").write_text(report(results), encoding="utf-8")


def report(results: dict[str, Any]) -> str:
    """All that has been measured, the bars first."""
    bars, parts = [], []
    for name in [*RUNS, "memory_plan"]:
        if name in results:
            tables = [Table(**table) for table in results[name]["tables"]]
            bars += [f"| {t.title}: {' | '.join(bar)} |" for t in tables for bar in t.bars]
            texts = (results[name]["text"], "", *map(str, tables))
            parts += [f"## {name}", "", f"{results[name]['when']}.", "", *texts]
    head = [
        "# Benchmarks",
        "",
        "`python benchmarks/run.py`. A ratio is the median of the rounds' ratios. Each script says "
        "what it measures. A bar is what we claim. Where one is missed, the reason is beside it.",
        "",
        "| bar | measured | |",
        "| --- | ---: | --- |",
    ]
    return "\n".join([*head, *bars, "", *parts, TRIED.read_text(encoding="utf-8")])


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{[*names, platform.machine()][0]}, {torch.get_num_threads()} threads{gpu}"


def versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


if __name__ == "__main__":
    main()
