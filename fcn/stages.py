"""Train FCN-32s, then FCN-16s from its best checkpoint, then FCN-8s from that of FCN-16s.

This is how Long, Shelhamer, Darrell (CVPR 2015, section 4.2) train these networks. The paper has
no FCN-4s. It comes last if the name of the recipe ends with fcn4s.

    python -m fcn.stages experiment=paper               # recipes paper_fcn32s, paper_fcn16s, ...
    python -m fcn.stages experiment=quickstart seed=1   # one recipe, with model=fcn32s, fcn16s, ...
    python -m fcn.stages experiment=camvid_fcn4s        # FCN-32s, 16s, 8s and 4s
    python -m fcn.stages data.root=/data optimizer.lr=1e-3

The settings are those of train.py. Each stage gets all of them, except model.weights, which only
the first stage gets. Runs go to runs/stages/<date_time>/fcn32s, fcn16s and fcn8s, or to these names
below `hydra.run.dir=DIR`. After a kill or Ctrl-C the same command goes on: stages that have
finished are skipped, and the one that has not is resumed.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fcn.checkpoint import best_checkpoint
from fcn.cli import CONF, command_line, path_in, quoted, read_settings, short_messages
from fcn.errors import ConfigError
from fcn.files import expanded
from fcn.runs.folder import newest_first, setting_name
from fcn.runs.sweep import find_job, finished_before, resumable, several_processes

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
STAGES = ("fcn32s", "fcn16s", "fcn8s")
OWN = ("model", "model.stride", "resume")  # settings that differ from stage to stage


def settings_of(stage: str, given: Sequence[str], weights: Path | None) -> list[str]:
    """The arguments of train.py for one stage: its recipe or model, weights and other settings.

    Args:
        stage: the name of the stage's model, such as "fcn16s".
        given: settings for all stages.
        weights: the best checkpoint of the stage before; None for the first.

    Raises:
        ConfigError: an argument is not a setting, or is one that differs from stage to stage.
    """
    for argument in given:
        if argument.startswith("-") or argument.partition("=")[0] in OWN:
            raise ConfigError(f"{argument}: this cannot be given for all stages")
    recipes = [o.removeprefix("experiment=") for o in given if o.startswith("experiment=")]
    recipe = recipes[0] if recipes else None
    if recipe and (CONF / "experiment" / f"{recipe}_{stage}.yaml").is_file():
        settings = [f"experiment={recipe}_{stage}"]
        given = [o for o in given if not o.startswith("experiment=")]
    else:
        settings = [f"model={stage}", f"name={recipe}_{stage}" if recipe else f"name={stage}"]
    if weights is not None:
        given = [o for o in given if not o.startswith("model.weights=")]
        settings.append(f"model.weights={weights}")
    return [quoted(setting) for setting in (*settings, *given)]


def train_stages(given: Sequence[str]) -> int:
    """Train the stages that have not finished.

    Returns:
        The exit code of the last stage that was trained: not 0 if it has failed or was stopped.

    Raises:
        ConfigError: a setting is not possible here, or this is one of several processes.
    """
    if several_processes():
        raise ConfigError(
            "WORLD_SIZE or SLURM_STEP_NUM_TASKS is above 1: start fcn.stages once, and not through "
            "torchrun or srun; with trainer=ddp it starts the processes itself. If the cluster sets"
            " them for every job, unset them first"
        )
    folders = [o.partition("=")[2] for o in given if o.startswith("hydra.run.dir=")]
    given = [o for o in given if not o.startswith("hydra.run.dir=")]
    if folders and "${" in folders[-1]:
        raise ConfigError(f"hydra.run.dir={folders[-1]}: the stages need a folder without ${{...}}")
    chosen = path_in(f"hydra.run.dir={folders[-1]}") if folders else None
    folder = expanded(chosen) if chosen else find_folder(settings_of(STAGES[0], given, None))
    weights = None
    to_4s = any(o.startswith("experiment=") and o.endswith("fcn4s") for o in given)
    for stage in (*STAGES, "fcn4s") if to_4s else STAGES:
        settings = settings_of(stage, given, weights)
        run = find_stage(folder, settings)
        if run is None or not finished_before(run):
            if run is not None and resumable(run):
                arguments = [quoted(f"resume={run}")]
            else:
                arguments = [*settings, quoted(f"hydra.run.dir={run or folder / stage}")]
            print(f"stage {stage}: python train.py {command_line(arguments)}", flush=True)
            code = run_train(arguments)
            if code != 0:
                print(f"stage {stage} has not finished. The same command goes on with it")
                return code
            run = find_stage(folder, settings)
            assert run is not None  # train.py has just finished it
        weights = best_checkpoint(run)
    return 0


def find_stage(folder: Path, settings: Sequence[str]) -> Path | None:
    """The run of a stage that was started with these settings, or None.

    Hydra's own settings, such as hydra.verbose=true, are ignored: overrides.yaml lacks them.
    """
    hydra = ("hydra.", "hydra/")
    return find_job(folder, [o for o in settings if not setting_name(o).startswith(hydra)])


def find_folder(first: list[str]) -> Path:
    """The folder in which the same command has trained before, or else a new one.

    Args:
        first: the settings of the first stage.
    """
    root = Path("runs") / "stages"
    before = (folder for folder in newest_first(root) if find_stage(folder, first))
    return next(before, root / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def run_train(arguments: list[str]) -> int:
    """Run train.py in a process of its own, which may start others (trainer=ddp).

    Returns:
        Its exit code. If a signal has killed it, 128 plus the signal's number, as in a shell.
    """
    started: list[subprocess.Popen] = []
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        for process in started:
            process.terminate()

    # Ctrl-C in a terminal, and Ctrl-Break in that of Windows, reach train.py by themselves, which
    # then saves its state. A SIGTERM reaches this process alone. Windows has no such signal: there,
    # a program that wants to stop this one sends CTRL_BREAK_EVENT, which train.py gets as well.
    on_signal: dict[str, Callable[..., None]] = {
        "SIGINT": lambda *_: None,
        "SIGBREAK": lambda *_: None,
        "SIGTERM": stop,
    }
    handlers = {
        getattr(signal, name): signal.signal(getattr(signal, name), handler)
        for name, handler in on_signal.items()
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread()
    }
    try:
        started.append(subprocess.Popen([sys.executable, str(TRAIN), *arguments]))
        if stopped:  # by a signal that came before the process was in the list
            started[0].terminate()
        code = started[0].wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def main() -> None:
    """Train the stages with the settings on the command line."""
    with short_messages():
        sys.exit(train_stages(read_settings(None, "fcn.stages", __doc__)))


if __name__ == "__main__":
    main()
