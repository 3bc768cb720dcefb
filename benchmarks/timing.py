"""What the benchmarks share: timing candidates in turn, each in its own process; tables and bars.

    seconds, memory, notes = race({"ours": build_ours, "theirs": build_theirs}, "cpu", rounds=5)

A bar is what we claim; a table says whether this machine shows it, and if not, why.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("data")  # where conf/ looks for data too; holds VOCdevkit/VOC2012
sys.path.insert(0, str(ROOT))  # fcn, train and evaluate run from the checkout
Seconds = Mapping[str, Sequence[float]]  # of each candidate, for each round


@dataclass
class Table:
    """One benchmark's outcome: printed here, written to results.md by run.py."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str] = field(default_factory=list)
    bars: list[tuple[str, str, str]] = field(default_factory=list)  # what, value, verdict

    def bar(
        self, what: str, value: float | None, *, low: float = 0, high: float = 1e9, why: str
    ) -> None:
        """A goal that is met or missed.

        Args:
            value: None: not measured.
            why: what keeps a machine from meeting it, or from measuring it; shown if it does not.
        """
        if value is None:
            self.bars.append((what, "-", f"not measured: {why}"))
        elif low <= value <= high:
            self.bars.append((what, f"{value:.2f}", "met"))
        else:
            self.bars.append((what, f"{value:.2f}", f"missed: {why}"))

    def show(self) -> list["Table"]:
        print(self, flush=True)
        return [self]

    def __str__(self) -> str:
        head = ["| " + " | ".join(self.columns), "| ---" + " | ---:" * (len(self.columns) - 1)]
        rows = (f"{row} |" for row in (*head, *("| " + " | ".join(row) for row in self.rows)))
        bars = (f"{what}: {value}, **{verdict}**" for what, value, verdict in self.bars)
        notes = [f"- {line}" for line in (*self.notes, *bars)]
        return "\n".join((f"### {self.title}", "", *rows, "", *notes, ""))


def options(doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """`--device` and `--rounds`, and each of `more` with its default."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed; medians are printed")
    for name, default in more.items():
        count = {"nargs": len(default)} if isinstance(default, tuple) else {}
        kind = type(default[0] if count else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, **count)
    return parser


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call, the device's work included."""
    wait = torch.accelerator.synchronize if device != "cpu" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> Seconds:
    """Seconds that each run returns. The order is A B C A B C, so that disturbances hit all."""
    taken = [{name: run() for name, run in runs.items()} for _ in range(warmup + rounds)]
    return {name: [turn[name] for turn in taken[warmup:]] for name in runs}


def speedup(seconds: Seconds, name: str, over: str) -> float | None:
    """How many times as fast as another: the median over rounds, or None if one is missing."""
    if name not in seconds or over not in seconds:
        return None
    return median(b / a for a, b in zip(seconds[name], seconds[over], strict=True))


def shown(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


def race(
    entrants: Mapping[str, Callable[[], Callable]], device: str, rounds: int, warmup: int = 2
) -> tuple[Seconds, dict[str, int], list[str]]:
    """Time candidates in turn, each in its own process, with its own memory and settings.

    Args:
        entrants: picklable functions. Each imports what it needs and returns a function, which
            builds a network and returns the step to be timed.

    Returns:
        Seconds of each round; peak bytes above what was held before the network was built; and a
        line for each candidate that is left out, because it is not installed or out of memory.
    """
    context = multiprocessing.get_context("spawn")
    pipes, errors = {}, {}

    def ask(name: str, question: str | None) -> float:
        """The number that an entrant's process answers; 0 if it has failed, which is noted."""
        if name in errors:
            return 0.0
        try:
            if question:
                pipes[name].send(question)
            answer = pipes[name].recv()
        except (EOFError, OSError):
            answer = "its process ended; out of memory?"
        if isinstance(answer, str):
            errors[name] = answer
            return 0.0
        return answer

    for name, entrant in entrants.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, entrant, device), daemon=True).start()
        theirs.close()
        ask(name, None)  # until it is built
    seconds = in_turn({n: lambda n=n: ask(n, "run") for n in entrants}, rounds, warmup)
    memory = {name: int(ask(name, "memory")) for name in entrants}
    for pipe in pipes.values():
        pipe.close()  # ends its process
    there = [name for name in entrants if name not in errors]
    lines = [f"{name} is left out: {error}" for name, error in errors.items()]
    return {n: seconds[n] for n in there}, {n: memory[n] for n in there}, lines


def _serve(pipe: Any, entrant: Callable[[], Callable], device: str) -> None:
    try:
        build = entrant()
        before = _memory(device, "VmRSS:")
        run = build()
        pipe.send(0.0)
        with suppress(EOFError):
            while question := pipe.recv():
                held = question == "memory"
                pipe.send(_memory(device, "VmHWM:") - before if held else timed(run, device))
    except Exception as error:  # reported to the parent, which goes on without this one
        pipe.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _memory(device: str, key: str) -> int:
    """Bytes: the most allocated on a GPU; else resident, now (VmRSS) or at most (VmHWM)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():  # other systems than Linux count the peak alone
        from fcn.runs.process import peak_memory

        return peak_memory() or 0
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
