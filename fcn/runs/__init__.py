"""The run folder `runs/<name>/<date_time>/`: where things are, and what a run leaves there.

A contract with users and scripts: config.yaml, overrides.yaml, checkpoints/best.ckpt and last.ckpt,
metrics.csv, curves.png, panels/, summary.json, and a sweep.csv above the runs of a sweep.
"""

import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from fcn.checkpoint import best_checkpoint, last_checkpoint  # noqa: F401
from fcn.errors import ConfigError, WriteError, reason
from fcn.runs.process import peak_memory  # noqa: F401
from fcn.runs.versions import git_revision, versions  # noqa: F401



def output_folder(checkpoint: Path, name: str) -> Path:
    """The folder `name` in the run that a checkpoint is of, or beside one that lies elsewhere."""
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / name


def create_run_folder(folder: Path) -> Path:
    """Make the folder, or a numbered neighbour if a run has taken it: two may start in a second."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _create(folder)


def _create(folder: Path) -> Path:
    for number in range(1, 1000):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            candidate.mkdir(exist_ok=True)  # Hydra has made the one of a sweep's job
            if any(candidate.iterdir()):
                continue
            last_checkpoint(candidate).parent.mkdir()  # only one process can: the folder is its own
        except FileExistsError:
            continue
        return candidate
    raise ConfigError(f"no free name for a run folder near {folder}")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Train alone in a run folder. A lock ends with its process, however that ends.

    It is the process's own (`lockf`, not `flock`): loader processes, which may outlive a killed
    run for some seconds, do not hold it.

    Raises:
        ConfigError: another process trains there.
    """
    path = run / ".lock"
    with writing(path):
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ConfigError(
                f"{run} is being trained by {file.read()}; wait, or stop it"
            ) from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_locked(run: Path) -> bool:
    """Whether another process trains there."""
    try:
        with (run / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        pass
    return False


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Say which file cannot be written, why, and how much room there is.

    Args:
        size: bytes that the file needs, if that is known.

    Raises:
        WriteError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written: {reason(error)}"
        if not path.parent.is_dir():
            message += f"; there is no folder {path.parent}"
        else:
            need = f"it needs {size / 1e6:,.1f} MB, " if size else ""
            free = shutil.disk_usage(path.parent).free
            message += f"; {need}{free / 1e6:,.1f} MB are free there"
        raise WriteError(message) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A text file that is whole or not there, whenever the process is killed.

    Raises:
        WriteError: there is no room, no folder, or no permission.
    """
    with writing(path), _atomic_write(path) as file:
        yield file


@contextmanager
def _atomic_write(path: Path) -> Iterator[TextIO]:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # of file names that are no UTF-8, the odd bytes come out as \udcff and the like
        with open(descriptor, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON; NaN and Inf, which JSON does not have, become null."""
    with atomic_write(path) as file:
        json.dump(_finite(content), file, indent=2, allow_nan=False)
        file.write("\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_settings(run: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """config.yaml and overrides.yaml; of a resumed run too, whose end may have been moved."""
    overrides = [o for o in overrides if not o.startswith("resume=")]
    before = run / "overrides.yaml"
    if before.is_file():
        overrides = [*OmegaConf.load(before), *overrides]
    for name, content in (
        ("config.yaml", OmegaConf.merge(cfg, {"resume": None})),
        ("overrides.yaml", OmegaConf.create(overrides)),
    ):
        with atomic_write(run / name) as file:
            file.write(OmegaConf.to_yaml(content))
    (run / "error.txt").unlink(missing_ok=True)  # a crash that the run goes on from
