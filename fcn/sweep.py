"""The folder of a sweep: which jobs have finished there, its table and its figure.

A sweep is known again by its command and settings, a job in it by its overrides. So a sweep that
was killed, or of which a job crashed, goes on when it is started again, and two processes that
start it share its jobs out between them.
"""

import csv
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from fcn.config import short_message
from fcn.errors import FCNError, Stopped
from fcn.runs import (
    atomic_write,
    create_run_folder,
    git_revision,
    is_locked,
    last_checkpoint,
)

Row = dict[str, Any]
PATIENCE = 10.0  # seconds; what a killed process leaves, such as loaders, may hold a lock for 5


def several_processes() -> bool:
    """Whether torchrun or srun has started this command in several processes.

    Each then goes through the whole sweep, a little ahead of the others or behind: what is on disk
    tells them nothing that they would agree on.
    """
    return any(int(os.environ.get(n) or 1) > 1 for n in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def find_sweep(config: DictConfig) -> Path | None:
    """The newest sweep with the same overrides and settings, beside the folder that it would get.

    Args:
        config: Hydra's own, of the whole sweep.
    """
    root = Path(config.hydra.sweep.dir).parent
    for folder in sorted(root.glob("*/multirun.yaml"), reverse=True):
        try:
            before = OmegaConf.load(folder)
            same = _identity(before) == _identity(config)
        except Exception:  # killed while Hydra wrote it, or another program's
            continue
        if same:
            return folder.parent
    return None


def _identity(config: Any) -> tuple[Any, ...]:
    settings = OmegaConf.to_container(config, resolve=False)
    assert isinstance(settings, dict)
    return settings.pop("hydra")["overrides"]["task"], settings


def find_job(sweep: Path, overrides: list[str]) -> Path | None:
    """The folder of the run with these overrides."""
    if several_processes():
        return None
    return next((run for run in _runs(sweep) if _overrides(run) == overrides), None)


def status(run: Path) -> str:
    """finished, stopped by a signal, crashed, or unfinished: it is running, or was killed."""
    return "crashed" if (run / "error.txt").is_file() else _summary(run).get("status", "unfinished")


def finished_before(run: Path) -> bool:
    """Whether nothing is left to do; says so, since code may have changed meanwhile."""
    if status(run) != "finished":
        return False
    revision = _summary(run).get("git_revision")
    by = "" if revision == git_revision() else f" by other code (git revision {revision})"
    print(f"{run}: finished before{by}, so it is skipped", flush=True)
    return True


def resumable(run: Path) -> bool:
    """Whether there is a checkpoint to go on from; if not, what the run has left is removed.

    Of a run that another process trains, nothing is removed: going on with it says who that is.
    """
    if last_checkpoint(run).is_file() or is_locked(run):
        return True
    shutil.rmtree(run)
    return False


def run_job(
    sweep: Path,
    folder: Path,
    overrides: list[str],
    train: Callable[[Path | None], None],
    mendable: tuple[type[Exception], ...],
) -> None:
    """Train if that is not done yet, in one process only, and write down what became of it.

    A crash stops no other job; Ctrl-C and SIGTERM end the whole sweep.

    Args:
        folder: of the job's error, if it has no run folder yet.
        train: runs the job: goes on with a run, or begins one.
        mendable: errors, beside `FCNError`, that are told without a traceback.
    """
    from fcn.devices import is_main_process

    if several_processes():
        lock: AbstractContextManager[Any] = nullcontext()
    else:
        name = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:12]
        lock = FileLock(sweep / f".{name}.lock", timeout=PATIENCE)
    try:
        with lock:
            earlier = find_job(sweep, overrides)
            if earlier is not None and finished_before(earlier):
                return
            if earlier is not None and not resumable(earlier):
                earlier = None
            try:
                train(earlier)
            except (Exception, SystemExit) as error:
                if isinstance(error.__context__, Stopped | KeyboardInterrupt):
                    raise
                if is_main_process():
                    _record_crash(find_job(sweep, overrides) or folder, overrides, error, mendable)
            finally:
                if is_main_process():
                    write_results(sweep)
    except Timeout:
        print(f"{folder} is running in another process, so it is skipped here", flush=True)


def _record_crash(
    run: Path,
    overrides: list[str],
    error: BaseException,
    mendable: tuple[type[Exception], ...],
) -> None:
    """error.txt: the reason in one line, then the traceback of what no user could have mended."""
    if isinstance(error, Exception) and isinstance(error, (FCNError, *mendable)):
        message, trace = short_message(error), ""
    else:
        message = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
    print(f"{trace}error: {message}", file=sys.stderr, flush=True)
    if _overrides(run) != overrides:
        run = create_run_folder(run)
        with atomic_write(run / "overrides.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(overrides)))
    with atomic_write(run / "error.txt") as file:
        file.write(f"{' '.join(message.split())}\n\n{trace}".strip() + "\n")


def write_results(sweep: Path) -> list[Row]:
    """sweep.csv, a row for each run in the folder, and sweep.png, from what the runs have written.

    Each job writes them anew when it ends, so they are there however the jobs were launched.

    Returns:
        The rows.
    """
    from fcn.visualize import draw_sweep

    rows = []
    swept: dict[str, set[str]] = {}
    for run in _runs(sweep):
        summary, overrides = _summary(run), _overrides(run) or []
        row: Row = {"run": run.name, "status": status(run)}
        row |= dict(text.split("=", 1) for text in overrides if "=" in text)
        for key in row.keys() - {"run", "status"}:
            swept.setdefault(key, set()).add(row[key])
        plain = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        row |= {k: v for k, v in plain.items() if not k.startswith("val/iou/")}
        if row["status"] == "crashed":
            row["error"] = (run / "error.txt").read_text().partition("\n")[0]
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_write(sweep / "sweep.csv") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    keys = [key for key in columns if len(swept.get(key, ())) > 1]
    draw_sweep(rows, keys, sweep / "sweep.png")
    return rows


def _runs(sweep: Path) -> list[Path]:
    runs = [path.parent for path in sweep.glob("*/overrides.yaml")]
    return sorted(runs, key=lambda run: (len(run.name), run.name))


def _overrides(run: Path) -> list[str] | None:
    if not (run / "overrides.yaml").is_file():
        return None
    overrides = OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"), resolve=False)
    return [str(text) for text in overrides or ()]


def _summary(run: Path) -> Row:
    if not (run / "summary.json").is_file():
        return {}
    return json.loads((run / "summary.json").read_text())
