"""The folder of a sweep: its jobs, its table and its figure.

    python train.py -m model=fcn32s,fcn16s,fcn8s optimizer.lr=1e-3,1e-4

The same command again continues the sweep. A sweep is recognised by its command line and settings,
and a job by its overrides. Jobs that have finished are skipped; those that were killed or stopped
or have crashed are resumed. A crash of one job does not stop the others.
"""

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from fcn.cli import USER_ERRORS, literal, quoted, short_message
from fcn.errors import FCNError, Stopped
from fcn.files import optional_file, write_csv, write_text, writing
from fcn.runs.folder import (
    RunLockedError,
    create_run_folder,
    create_sweep_folder,
    lock_run,
    name_parts,
    newest_first,
    read_changes,
    started_with,
    write_overrides,
)
from fcn.runs.resume import best_score, read_summary, status
from fcn.runs.versions import git_revision

PROJECT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


class ContinueSweep(Callback):
    """Hydra's callback in conf/train.yaml: a sweep that is started again goes on in its folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Choose the folder before Hydra starts the first job."""
        # Launchers such as submitit's start jobs in other processes, which must find this code.
        paths = [str(PROJECT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        given = any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)
        if given or several_processes():
            return
        sweep = find_sweep(config)
        as_written: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        named_by_time = "${now:" in as_written["dir"]
        if sweep is not None:
            print(f"This sweep goes on in {sweep}; hydra.sweep.dir=DIR starts it anew", flush=True)
        elif named_by_time:  # two sweeps may start in the same second
            sweep = create_sweep_folder(Path(config.hydra.sweep.dir))
        else:
            return
        with read_write(config.hydra):
            config.hydra.sweep.dir = literal(str(sweep))
            # A launcher composes the settings of each job again, from the overrides.
            config.hydra.overrides.hydra.append(quoted(f"hydra.sweep.dir={sweep}"))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print how many jobs have finished or crashed. The exit code is 1 if one has crashed."""
        from fcn.runs.process import is_main_process

        if not is_main_process():
            return
        states = [row["status"] for row in write_results(Path(config.hydra.sweep.dir))]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"{config.hydra.sweep.dir}/sweep.csv: {counts}", flush=True)
        if "crashed" in states:
            sys.exit(1)


def several_processes() -> bool:
    """Whether torchrun or srun has started this command in several processes.

    Each of these processes goes through all jobs of the sweep, a little earlier or later than the
    others. They would find different files on disk, and so must not decide by them what to do.
    """
    return any(int(os.environ.get(n) or 1) > 1 for n in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def find_sweep(config: DictConfig) -> Path | None:
    """The newest sweep with the same overrides and settings, in the folder that holds all sweeps.

    Args:
        config: all settings of the new sweep, Hydra's own included.

    Returns:
        Its folder; None if there is no such sweep.
    """
    root = Path(config.hydra.sweep.dir).parent
    for sweep in newest_first(root):
        # Hydra may have been killed while it wrote this file, or another program has written it.
        with suppress(Exception):
            if _identity(OmegaConf.load(sweep / "multirun.yaml")) == _identity(config):
                return sweep
    return None


def _identity(config: Any) -> tuple[Any, ...]:
    """What identifies a sweep: its overrides, and all settings except Hydra's own."""
    settings = OmegaConf.to_container(config, resolve=False)
    assert isinstance(settings, dict)
    return settings.pop("hydra")["overrides"]["task"], settings


def find_job(sweep: Path, overrides: list[str]) -> Path | None:
    """The folder of the run with these overrides, or None.

    It is always None where several processes run one job, since they could choose differently.
    """
    if several_processes():
        return None
    return next((run for run in _runs(sweep) if started_with(run, overrides)), None)


def finished_before(run: Path) -> bool:
    """Whether a run has finished. If so, print that, and whether other code has trained it."""
    if status(run) != "finished":
        return False
    revision = read_summary(run).get("git_revision")
    by = "" if revision == git_revision() else f" by other code (git revision {revision})"
    print(f"{run}: finished before{by}, so it is skipped", flush=True)
    return True


def resumable(run: Path) -> bool:
    """Whether a run has a checkpoint to be resumed from. If it has none, its folder is removed.

    Raises:
        RunLockedError: there is no checkpoint yet, but another process trains there.
    """
    if any(run.glob("checkpoints/*.ckpt")):
        return True
    with lock_run(run):
        pass
    with writing(run):
        shutil.rmtree(run)
    return False


def run_job(
    folder: Path, overrides: list[str], train: Callable[[Path | None], float | None]
) -> float | None:
    """Do one job of a sweep, unless it has finished before, and update sweep.csv.

    If the job crashes, error.txt in its folder gets the reason, and the next job can start. Ctrl-C
    and SIGTERM end the sweep.

    Args:
        folder: the run folder that the job gets if it is new, in the folder of the sweep.
        overrides: the job's settings on the command line.
        train: resumes the run in the given folder, or starts a new run if it is given None, and
            returns its best score.

    Returns:
        The best score of the run; None if it has crashed or is trained by another process.
    """
    from fcn.runs.process import is_main_process

    sweep = folder.parent
    earlier = find_job(sweep, overrides)
    if earlier is not None and finished_before(earlier):
        return best_score(read_summary(earlier))
    try:
        return train(earlier if earlier is not None and resumable(earlier) else None)
    except RunLockedError as error:
        print(f"{error}. Here, this job is skipped", flush=True)
    except (Exception, SystemExit) as error:
        if isinstance(error.__context__, Stopped | KeyboardInterrupt):
            raise
        if is_main_process():
            _record_crash(find_job(sweep, overrides) or folder, overrides, error)
    finally:
        if is_main_process():
            write_results(sweep)
    return None


def _record_crash(run: Path, overrides: list[str], error: BaseException) -> None:
    """Write error.txt: the reason in one line, and a traceback if the user cannot fix it."""
    if isinstance(error, (FCNError, *USER_ERRORS)):
        message, trace = short_message(error), ""
    else:
        message = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
    print(f"{trace}error: {message}", file=sys.stderr, flush=True)
    if not started_with(run, overrides):  # The job has no folder yet, or its number is taken.
        run = create_run_folder(run)
        write_overrides(run, overrides)
    write_text(run / "error.txt", f"{' '.join(message.split())}\n\n{trace}".strip() + "\n")


def write_results(sweep: Path) -> list[Row]:
    """Write sweep.csv, with a row for each run in the folder, and sweep.png.

    Each job writes them again when it ends, so that they exist whatever launcher starts the jobs.

    Returns:
        The rows of sweep.csv.
    """
    from fcn.figures.comparison import draw_sweep

    runs = _runs(sweep)
    rows = [_row(run) for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [[row.get(column, "") for column in columns] for row in rows]
    with optional_file(sweep / "sweep.csv"):  # it may be open in a spreadsheet
        write_csv(sweep / "sweep.csv", [columns, *table])

    settings = [read_changes(run) for run in runs]
    swept = [key for key in columns if len({s[key] for s in settings if key in s}) > 1]
    with optional_file(sweep / "sweep.png"):
        draw_sweep(rows, swept, sweep / "sweep.png")
    return rows


def _row(run: Path) -> Row:
    """One row of sweep.csv: settings of the command line, then the numbers of summary.json."""
    row: Row = {"run": run.name, "status": status(run)} | read_changes(run)
    for name, value in read_summary(run).items():
        if isinstance(value, int | float) and not name.startswith("val/iou/"):
            row[name] = value
    if row["status"] == "crashed":
        row["error"] = (run / "error.txt").read_text(encoding="utf-8").partition("\n")[0]
    return row


def _runs(sweep: Path) -> list[Path]:
    """The runs in a folder, in the order of their numbers."""
    runs = [path.parent for path in sweep.glob("*/overrides.yaml")]
    return sorted(runs, key=name_parts)
