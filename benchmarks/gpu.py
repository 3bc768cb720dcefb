"""What works, and how fast, on the GPU at hand: one table, in five minutes, on generated data.

    python -m benchmarks.gpu                    # CUDA or Apple's MPS; without either, a stand-in
    python -m benchmarks.gpu --minutes 15       # all rows, on a slow card too
    python -m benchmarks.gpu --only recipe memory

It downloads nothing. It writes runs/gpu/gpu.md (--output FOLDER: FOLDER/gpu.md), after every row,
so that the table of the rows so far is there if the process should end. The rows:

- agree: logits, loss and gradients of a VGG-19 FCN-8s are those of the CPU in float32.
- recipe: train.py takes steps with each recipe of conf/experiment, in each precision.
- sync: Python does not wait for the GPU within a training step, outside of GradScaler.
- tests: `pytest -m gpu`.
- resume: a run that was killed and resumed ends as one that was not.
- memory: the peak of a step against the plan of `python -m fcn.memory`; without cuDNN's search for
  the fastest algorithm (trainer.benchmark), which takes what memory there is while it searches.
- speed: images per second, beside torchfcn and smp's FPN, one network after another: on a card
  that becomes slower when it is warm, the later ones suffer. What is not installed is skipped:
  pip install --no-deps -r benchmarks/requirements.txt
- convolutions: their share of the device's time in a step.
- setting: images per second with one setting changed.

A row is "ok", "FAILED", "out of memory", or "skipped", with the reason; also if it would not fit
into the minutes. The exit code is 1 if a row has failed. On a CPU, networks are narrow and images
small: that shows that the rows work, and nothing about a GPU.
"""

import argparse
import gc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import psutil
import torch

# The benchmarks are scripts that import each other from this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_processes
import gpu_rows
import gpu_speed
import peers
from gpu_rows import RECIPES, STRICT, Bench, Skip, Wrong, global_settings_kept, precisions
from run import machine, versions

from fcn.cards import check_card
from fcn.errors import DeviceError
from fcn.runs.versions import git_revision
from fcn.training.fit import ran_out_of_memory

NO_GPU = """**No GPU was used.** This is the stand-in on a CPU, with narrow networks and small
images. It shows that the command works from end to end, and nothing about the speed, the memory or
the correctness of any GPU. Other programs may have used the CPU at the same time.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    seconds: about how long it takes on a slow card; it is skipped if fewer are left.
    run: returns the result in words.
    """

    name: str
    seconds: float
    run: Callable[[Bench], str]


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str  # ok, FAILED, out of memory or skipped
    text: str
    seconds: float = 0


def rows_for(device: str) -> list[Row]:
    """All rows. Where the time is short, the first ones are one of each kind."""
    best, *others = precisions(device)
    agree = {
        p: Row(f"agree, {p}", 10, partial(gpu_rows.agree, precision=p))
        for p in (STRICT, best, *others)
    }
    sync = [Row(f"sync, {p}", 10, partial(gpu_rows.waits, precision=p)) for p in (best, *others)]
    resume, tests = Row("resume", 50, gpu_processes.resume), Row("tests", 40, gpu_processes.tests)
    memory = []
    for settings in (
        ("data.batch_size=1", "data.crop_size=500"),
        ("data.batch_size=3", "data.crop_size=320"),
        ("data.batch_size=2", "data.crop_size=320", "optimizer=adamw"),
        ("data.batch_size=1", "data.crop_size=500", "model.checkpoint_stages=2"),
    ):
        run = partial(_with_settings, gpu_speed.memory, settings)
        memory.append(Row(f"memory, {' '.join(settings)}", 8, run))
    ours = gpu_speed.ours(device)
    names = (peers.PEER, *dict.fromkeys((ours, "ours vgg19 float32")), "smp FPN vgg19")
    speed = [Row(f"speed, {name}", 12, partial(gpu_speed.speed, name=name)) for name in names]
    convolutions = Row("convolutions", 12, gpu_speed.convolutions)
    rows = [agree[STRICT], agree[best], sync[0], memory[0]]
    rows += [convolutions] if device == "cpu" else [*speed, convolutions]
    rows += [Row(f"recipe {r}, {best}", 10, _recipe(r, best)) for r in RECIPES]
    rows += [resume, tests, *memory[1:], *(agree[p] for p in others), *sync[1:]]
    changes = [f"model.channels_last={flag}" for flag in ("true", "false")]
    changes += [f"trainer.benchmark={flag}" for flag in ("true", "false")]
    for change in ("", *changes):
        run = partial(_with_settings, gpu_speed.lever, [change] if change else [])
        rows.append(Row(f"setting, {change or 'none'}", 8, run))
    rows += [Row(f"recipe {r}, {p}", 10, _recipe(r, p)) for p in others for r in RECIPES]
    compiled = partial(_with_settings, gpu_speed.lever, ["trainer.compile=true"])
    rows.append(Row("setting, trainer.compile=true", 60, compiled))
    return rows + (
        speed if device == "cpu" else []
    )  # whole networks, which a CPU needs minutes for


def _recipe(recipe: str, precision: str) -> Callable[[Bench], str]:
    return partial(gpu_rows.steps, recipe=recipe, precision=precision)


def _with_settings(run: Callable[..., str], settings: Sequence[str], bench: Bench) -> str:
    return run(bench, *settings)


def run_row(row: Row, bench: Bench) -> Result:
    """One row, whatever comes of it."""
    left = bench.left()
    if left < row.seconds:
        reason = f"it takes about {row.seconds:.0f} s, and {max(left, 0):.0f} s were left"
        return Result(row.name, "skipped", reason)
    started = time.monotonic()
    with global_settings_kept():
        try:
            outcome, text = "ok", row.run(bench)
        except Skip as reason:
            outcome, text = "skipped", str(reason)
        except Wrong as reason:
            outcome, text = "FAILED", str(reason)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            text = f"{type(error).__name__}: {first}"
            full = ran_out_of_memory(error) or "ran out of memory" in first
            outcome = "out of memory" if full else "FAILED"
    # The exception is gone now, and with it the tensors of the frames that it has come through.
    free_memory(bench)
    return Result(row.name, outcome, text, time.monotonic() - started)


def free_memory(bench: Bench) -> None:
    """Give back what the last row held, on disk too, so that rows do not depend on each other."""
    if "torch._dynamo" in sys.modules:  # it takes seconds to import
        torch.compiler.reset()
    gc.collect()  # Lightning's objects refer to each other
    with suppress(RuntimeError):  # `answers` notes a device that computes no more
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        elif bench.device == "mps":
            torch.mps.empty_cache()
    for folder in bench.folder.iterdir():
        shutil.rmtree(folder, ignore_errors=True)


def answers(bench: Bench) -> bool:
    """Whether the device still computes: after some errors of CUDA, a process cannot use it."""
    try:
        return torch.ones(2, device=bench.device).sum().item() == 2
    except RuntimeError:
        return False


def run_rows(rows: Sequence[Row], bench: Bench, show: Callable[[list[Result]], None]) -> None:
    """Each row in turn; `show` gets all results so far after each."""
    results: list[Result] = []
    for number, row in enumerate(rows):
        print(f"{row.name} ...", end=" ", flush=True)
        results.append(run_row(row, bench))
        print(f"{results[-1].outcome}: {results[-1].text}", flush=True)
        failed = results[-1].outcome in ("FAILED", "out of memory")
        if failed and not answers(bench):
            reason = f"{bench.device} does not answer any more since {row.name}"
            results += [Result(other.name, "skipped", reason) for other in rows[number + 1 :]]
            print(reason)
        show(results)
        if len(results) == len(rows):
            break


def report(results: Sequence[Result], device: str, where: Sequence[str], how: str) -> str:
    """The text of gpu.md.

    Args:
        where: what `about` says.
        how: the command, the day and the duration.
    """
    counts = Counter(result.outcome for result in results)
    order = ("ok", "FAILED", "out of memory", "skipped")
    tally = ", ".join(f"{counts[outcome]} {outcome}" for outcome in order if counts[outcome])
    lines = ["# What works, and how fast, on one device", ""]
    lines += [NO_GPU] if device == "cpu" else []
    lines += [f"{how}: {tally}.", "", *(f"- {line}" for line in where)]
    lines += ["", "| row | outcome | result | seconds |", "| --- | --- | --- | ---: |"]
    for result in results:
        text = result.text.replace("|", "\\|").replace("\n", " ")
        taken = f"{result.seconds:.1f}" if result.seconds else ""
        lines.append(f"| {result.name} | {result.outcome} | {text} | {taken} |")
    return "\n".join([*lines, "", "The head of benchmarks/gpu.py says what each row is.", ""])


def about(device: str) -> list[str]:
    """The device, its driver, and the versions of all that takes part."""
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        name = f"{card.name}, {card.total_memory / 2**30:.1f} GB, compute capability "
        name += f"{card.major}.{card.minor}; driver {driver()}; CUDA {torch.version.cuda}, cuDNN "
        name += f"{torch.backends.cudnn.version()}"
    else:
        name = {"mps": f"Apple's MPS, macOS {platform.mac_ver()[0]}", "cpu": "CPU"}[device]
    load = f"load {psutil.getloadavg()[0]:.1f}"
    host = f"{machine()}; {os.cpu_count()} cores, {load}; {platform.platform()}"
    code = f"revision {git_revision()}"
    return [f"device: {name}", f"host: {host}", f"{', '.join(versions())}; {code}"]


def driver() -> str:
    """The version of NVIDIA's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def find_device(wanted: str) -> str:
    """The device that is meant.

    Raises:
        ValueError: it is not there.
        DeviceError: torch has no code for it, so that every row would fail.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if wanted == "auto":
        wanted = next(name for name, here in there.items() if here)
    if not there[wanted]:
        raise ValueError(f"--device {wanted}: torch {torch.__version__} finds no such device here")
    check_card(torch.device(wanted))
    return wanted


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] | None = None) -> int:
    """Run the rows, and write gpu.md; 1 if one has failed, 130 after Ctrl-C."""
    started = time.monotonic()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", None, __doc__, formatter_class=form
    )
    parser.add_argument("--minutes", type=float, default=5, help="rows that do not fit are skipped")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows that begin with this")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.md")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    try:
        device = find_device(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, DeviceError, OSError) as error:
        parser.error(str(error))
    rows = rows_for(device) if rows is None else rows
    rows = [row for row in rows if row.name.startswith(tuple(args.only or [""]))]
    if not rows:
        parser.error(f"--only {' '.join(args.only)}: no row begins with this")
    if device == "cpu":
        print(NO_GPU)
    command, kept = " ".join(["python -m benchmarks.gpu", *arguments]), list[Result]()
    where = about(device)

    def show(results: list[Result]) -> None:
        kept[:] = results
        minutes = (time.monotonic() - started) / 60
        how = f"`{command}`, {date.today()}, {minutes:.1f} minutes"
        text = report(results, device, where, how)
        (args.output / "gpu.md").write_text(text, encoding="utf-8")

    interrupted = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            run_rows(rows, Bench(device, Path(folder), started + 60 * args.minutes), show)
        except KeyboardInterrupt:
            interrupted = True
    if kept:
        print(f"\n{args.output / 'gpu.md'} has the table{' so far' * interrupted}")
    return 130 if interrupted else int(any(result.outcome == "FAILED" for result in kept))


if __name__ == "__main__":
    raise SystemExit(main())
