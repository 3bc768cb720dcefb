"""The run folder `runs/<name>/<date_time>/`: a new one, the lock on it, and the settings in it.

    with new_run(Path("runs/fcn8s/2026-01-31_12-00-00")) as run:  # which is locked now
        write_settings(run, cfg, overrides)

What a finished run leaves there is a contract with users and scripts: config.yaml, overrides.yaml,
checkpoints/best.ckpt and last.ckpt, metrics.csv, curves.png, panels/, summary.json and the logger's
own folder. A sweep has one folder for its runs, with a sweep.csv and a sweep.png.
"""

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fcn import files
from fcn.cli import RENAMED, quoted
from fcn.errors import ConfigError

LOCK = ".lock"
HOLDER = ".lock_holder"  # which process holds the lock; Windows does not let others read LOCK


class RunLockedError(ConfigError):
    """Another process trains in this run folder."""


def output_folder(checkpoint: Path, name: str) -> Path:
    """The folder `name` in the run of a checkpoint, or next to a checkpoint that is in no run."""
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / name


def create_run_folder(folder: Path) -> Path:
    """Create an empty run folder for this process alone.

    Args:
        folder: the wanted path. If a run has it already, a number is added (`folder_2`, ...),
            because two runs of one name may start in the same second.

    Raises:
        WriteError: it cannot be created.
    """

    def create(candidate: Path) -> None:
        candidate.mkdir(exist_ok=True)  # for a job of a sweep, Hydra has created it
        if any(candidate.iterdir()):
            raise FileExistsError(candidate)
        # Only one process can create this. So the folder belongs to the one that does.
        (candidate / "checkpoints").mkdir()

    return _first_free(folder, create)


def create_sweep_folder(folder: Path) -> Path:
    """Create the folder of a sweep, with a number added if another sweep has just taken the name.

    Raises:
        WriteError: it cannot be created.
    """
    return _first_free(folder, Path.mkdir)


def _first_free(folder: Path, create: Callable[[Path], None]) -> Path:
    """Create the folder itself, or with _2, _3 and so on added where `create` finds it taken.

    Raises:
        WriteError: it cannot be created.
    """
    candidate = folder
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in count(2):
            with suppress(FileExistsError):
                create(candidate)
                break
            candidate = folder.with_name(f"{folder.name}_{number}")
    return candidate


def name_parts(path: Path) -> list[str | int]:
    """A file's name as text, number, text and so on, such as ["run_", 10, ""].

    As a key for sorting, it brings 2 before 10, and 0_2 between 0 and 1.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def newest_first(root: Path) -> list[Path]:
    """What is in a folder of runs, whose names are times: the last one first."""
    return sorted(root.glob("*"), key=name_parts, reverse=True)


@contextmanager
def new_run(folder: Path) -> Iterator[Path]:
    """Create a run folder and lock it. It is removed again if training has not begun in it.

    Args:
        folder: as for `create_run_folder`.

    Yields:
        The folder that was created.
    """
    run = create_run_folder(folder)
    try:
        with lock_run(run):
            yield run
    finally:
        if not (run / "config.yaml").exists():  # which is written just before training begins
            shutil.rmtree(run, ignore_errors=True)


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, so that no other process trains there at the same time.

    The lock ends with the process, however that ends. Whoever gets the lock removes the files that
    a killed process had not finished writing.

    Raises:
        RunLockedError: another process still trains there after `files.PATIENCE` seconds.
        WriteError: the folder cannot be written.
    """
    holder = run / HOLDER
    with ExitStack() as stack:
        try:
            stack.enter_context(files.lock(run / LOCK, timeout=files.PATIENCE))
        except files.LockedError as error:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise RunLockedError(f"{run} is being trained by {who}; wait, or stop it") from error
        with files.writing(holder):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        files.remove_parts(run)
        try:
            yield
        finally:
            with suppress(OSError):  # it may be read just now; the next process replaces it
                holder.unlink()


def is_training(run: Path) -> bool:
    """Whether another process trains in a run folder.

    This waits for up to `files.PATIENCE` seconds: for some seconds after a run was killed, its
    loader processes still hold the lock.
    """
    return files.is_locked(run / LOCK, timeout=files.PATIENCE)


def write_settings(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Write config.yaml and overrides.yaml.

    A resumed run writes them again, since some of its settings may have changed, such as the number
    of steps. What was changed follows the first command line, after a line "resume=RUN".

    Args:
        run: the run folder.
        cfg: all settings, resolved.
        overrides: the settings on the command line.

    Raises:
        WriteError: a file cannot be written.
    """
    settings = OmegaConf.merge(cfg, {"resume": None})
    files.write_text(run / "config.yaml", OmegaConf.to_yaml(settings))
    given = [override for override in overrides if not override.startswith("resume=")]
    if not (run / "overrides.yaml").is_file():
        write_overrides(run, given)
    elif given:
        first, later = read_overrides(run)
        again = {setting_name(override) for override in given}
        later = [override for override in later if setting_name(override) not in again]
        write_overrides(run, [*first, f"resume={run}", *later, *given])
    for name in ("error.txt", "summary.json"):  # how an earlier start has ended
        with files.writing(run / name):
            (run / name).unlink(missing_ok=True)


def write_overrides(run: Path, overrides: Sequence[str]) -> None:
    """Write overrides.yaml: what was given on the command line, as it was written there."""
    files.write_text(run / "overrides.yaml", OmegaConf.to_yaml(list(overrides)))


def read_overrides(run: Path) -> tuple[list[str], list[str]]:
    """What was given on the command line when a run was started, and when it was resumed.

    Settings are returned as they would be written today: an earlier version may have had another
    name for one. Both lists are empty for a folder without overrides.yaml.
    """
    path = run / "overrides.yaml"
    if not path.is_file():
        return [], []
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    overrides = [_as_today(str(override)) for override in content or ()]
    first = list(takewhile(lambda override: not override.startswith("resume="), overrides))
    return first, overrides[len(first) + 1 :]


def read_changes(run: Path) -> dict[str, str]:
    """Each setting that was given on the command lines of a run, with its last value as text."""
    overrides = [override for part in read_overrides(run) for override in part]
    return {setting_name(o): o.partition("=")[2] for o in overrides if "=" in o}


def started_with(run: Path, overrides: Sequence[str]) -> bool:
    """Whether a run was first started with these overrides. `resume=...` among them is ignored.

    What was changed when the run was resumed makes no difference.
    """
    wanted = [_as_today(o) for o in overrides if not o.startswith("resume=")]
    return (run / "overrides.yaml").is_file() and read_overrides(run)[0] == wanted


def setting_name(override: str) -> str:
    """The name of the setting that an override changes, adds or removes."""
    return override.partition("=")[0].lstrip("+~")


def _as_today(override: str) -> str:
    """An override such as "data.batch_size=2", with today's name of its setting and its quotes."""
    key, equals, value = override.partition("=")
    return quoted(f"{RENAMED.get(key, key)}{equals}{value}")
