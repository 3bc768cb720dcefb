"""Rows of `python -m benchmarks.gpu` in processes of their own: pytest, and a killed run."""

import importlib.util
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_rows import BARE, NARROW, Bench, Skip, need, norm
from timing import ROOT

from fcn.checkpoint import last_checkpoint, read_checkpoint
from fcn.runs.metrics import read_metrics


def tests(bench: Bench) -> str:
    """The tests that need a GPU: pytest -m gpu."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed (pip install -r requirements/dev.txt)")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]
    command += ["-p", "no:cacheprovider"]
    log = bench.new_folder() / "log"
    code = _finish(bench, _start(command, log, GPU_TESTS_ON=bench.device))
    text = log.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", text, re.MULTILINE)
    *_, summary = ["nothing was printed", *re.findall(r"^=* ?(\d+ .* in .*?s).*$", text, re.M)]
    need(code == 0, f"{summary}: {', '.join(failed) or _last_line(log)}")
    if "passed" not in summary:
        raise Skip(summary)
    return summary


def resume(bench: Bench) -> str:
    """Three processes: a run, the same run killed, and that one resumed. The results are equal."""
    steps, apple = 30 if bench.stand_in else 60, bench.device == "mps"
    settings = ["experiment=quickstart", *BARE]
    settings += [f"trainer.deterministic={'warn' if apple else 'true'}"]
    settings += [f"trainer.accelerator={bench.device}", "trainer.log_every_n_steps=1"]
    settings += [f"trainer.max_steps={steps}"]
    settings += ["callbacks.last_checkpoint.every_n_steps=10", "trainer.enable_progress_bar=false"]
    if bench.stand_in:
        settings += [*NARROW, "data.batch_size=1", "data.dataset.size=64"]
    whole, killed = (bench.folder / name for name in ("whole", "killed"))
    _run(bench, *settings, f"hydra.run.dir={whole}")

    command = [sys.executable, str(ROOT / "train.py"), *settings, f"hydra.run.dir={killed}"]
    process = _start(command, log := bench.new_folder() / "log")
    try:
        while not last_checkpoint(killed).is_file() and process.poll() is None:
            if bench.left() < 0:
                raise Skip("the time was over before its first checkpoint")
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    ended = f"the run ended before it was killed: {_last_line(log)}"
    need(process.returncode != 0 and last_checkpoint(killed).is_file(), ended)
    reached = len(read_metrics(killed / "metrics.csv"))
    step = read_checkpoint(last_checkpoint(killed))["global_step"]

    _run(bench, f"resume={killed}")
    rows, expected = (read_metrics(run / "metrics.csv") for run in (killed, whole))
    need(
        [row["step"] for row in rows] == [row["step"] for row in expected],
        f"metrics.csv has {len(rows)} rows, and without the kill {len(expected)}",
    )
    before = f"killed after step {reached}, resumed from step {step}: "
    got, weights = (read_checkpoint(last_checkpoint(run)) for run in (killed, whole))
    pairs = [(got["state_dict"][name], value) for name, value in weights["state_dict"].items()]
    if all(torch.equal(a, b) for a, b in pairs):
        return f"{before}after {steps} steps the weights are equal, bit for bit"
    size = math.hypot(*(norm(b) for _, b in pairs))
    error = math.hypot(*(norm(a - b) for a, b in pairs)) / size
    text = f"{before}not bit for bit; the weights differ by {error:.1e}"
    need(apple and error < 0.05, text)  # not all of torch is deterministic there
    return text


def _run(bench: Bench, *settings: str) -> None:
    """train.py in a process of its own."""
    log = bench.new_folder() / "log"
    code = _finish(bench, _start([sys.executable, str(ROOT / "train.py"), *settings], log))
    need(code == 0, f"train.py ended with {code}: {_last_line(log)}")


def _start(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    with log.open("w", encoding="utf-8") as output:  # the process has its own copy of it
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
        )


def _finish(bench: Bench, process: subprocess.Popen) -> int:
    """The exit code of a process, which is killed when the time is over."""
    try:
        return process.wait(max(bench.left(), 1))
    except subprocess.TimeoutExpired:
        raise Skip("the time was over before it ended") from None
    finally:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    """The last line that says something: Hydra ends a traceback with a hint of its own."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return ["nothing was printed", *said][-1]
