"""What train.py does around one training: choose its folder, resume a run, report how it ended.

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    launch(cfg, train)
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fcn.cli import command_line, forced_arguments, literal, short_messages
from fcn.errors import DataError, Stopped, TrainingError

# torch and Lightning are imported where they are needed: `train.py --help` must answer at once.
Train = Callable[[DictConfig, Path, list[str]], dict[str, Any]]


def launch(cfg: DictConfig, train: Train) -> float | None:
    """Train once, as Hydra has composed the settings: a single run, or one job of a sweep.

    Args:
        cfg: the settings. `resume` may be a run folder, or "auto".
        train: called with the settings, the run folder and the settings on the command line. It
            returns what summary.json holds.

    Returns:
        The highest val/miou of the run, which a sweeper such as Optuna's maximises.

    Raises:
        SystemExit: with code 128 plus the signal's number if a signal has stopped the run; with
            code 1 after the message if there was an error that the user can fix.
    """
    hydra = HydraConfig.get()
    overrides = [o for o in hydra.overrides.task if not o.startswith("resume=")]
    overrides = [o.removeprefix("++") if o in forced_arguments else o for o in overrides]
    if hydra.mode == RunMode.MULTIRUN:
        folder = Path(hydra.sweep.dir) / hydra.sweep.subdir
    elif hydra.run.dir != ".":
        folder = Path(hydra.run.dir)
    else:
        folder = Path("runs") / str(cfg.name) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        if hydra.mode == RunMode.MULTIRUN:
            return _launch_job(cfg, train, folder, overrides)
        with short_messages():  # Hydra would add a line to an error that leaves this function.
            return _launch(cfg, train, folder, overrides, named=hydra.run.dir != ".")
    finally:
        with suppress(OSError):
            folder.rmdir()  # Hydra creates it too early. It is removed only if it is still empty.


def _launch_job(cfg: DictConfig, train: Train, folder: Path, overrides: list[str]) -> float | None:
    """Do one job of a sweep. W&B's logger gets a group and a name that show it as a part of it."""
    from fcn.runs.sweep import run_job

    for entry in (cfg.get("logger") or {}).values():
        if isinstance(entry, DictConfig) and "group" in entry:  # W&B's
            entry.group = entry.group or f"sweep_{folder.parent.name}"
            # Without a name, W&B itself names each run.
            entry.name = entry.name and f"{entry.name}_{HydraConfig.get().job.num}"

    def job(earlier: Path | None) -> float | None:
        if earlier is not None:
            cfg.resume = literal(str(earlier))
        return _launch(cfg, train, folder, overrides if earlier is None else [], named=True)

    return run_job(folder, overrides, job)


def _launch(
    cfg: DictConfig, train: Train, folder: Path, overrides: list[str], *, named: bool
) -> float | None:
    """Train in a new folder, or go on with the run that `cfg.resume` asks for.

    Returns the best score of the run.

    Args:
        folder: for a new run.
        named: whether the user has chosen the folder.
    """
    from fcn.datasets.download import HINT
    from fcn.runs.folder import read_overrides
    from fcn.runs.process import is_main_process
    from fcn.runs.resume import best_score, find_run, read_summary, resumed_config, status

    if cfg.resume == "auto":
        cfg.resume = None
        last = find_run(folder, overrides, named=named, main=is_main_process())
        if last is not None and status(last) == "finished":
            print(f"{last} is finished: nothing to do. Without resume=auto, a new run starts")
            return best_score(read_summary(last))
        if last is not None:
            cfg.resume, overrides = literal(str(last)), []
    run = Path(cfg.resume) if cfg.resume else folder
    if cfg.resume:
        cfg = resumed_config(run, overrides)
    try:
        return best_score(train(cfg, run, overrides))
    except (Stopped, TrainingError) as error:
        if not is_main_process():
            # This happens in all processes of a distributed run. If one of the others exited with
            # an error first, the main process would be killed before it has printed its message.
            sys.exit(0)
        if isinstance(error, Stopped):
            sys.exit(error.exit_code)
        raise
    except DataError as error:
        if HINT not in str(error):  # A message with this hint is about data that is not there.
            if cfg.resume:
                overrides = [o for part in read_overrides(run) for o in part] + overrides
            data = command_line([o for o in overrides if o.startswith(("data", "experiment"))])
            hint = f"To see all that is wrong: python -m fcn.datasets.check {data}"
            error.args = (f"{error}\n{hint}",)
        raise
