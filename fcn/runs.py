"""The run folder `runs/<name>/<date_time>/`: where things are, and what a run leaves there.

A contract with users and scripts: config.yaml, overrides.yaml, checkpoints/best.ckpt and last.ckpt,
metrics.csv, curves.png, panels/, summary.json, and a sweep.csv above the runs of a sweep.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig, OmegaConf

from fcn.errors import ConfigError

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "wandb")


def last_checkpoint(run: Path) -> Path:
    """The checkpoint that a run is resumed from."""
    return run / "checkpoints" / "last.ckpt"


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the highest validation mean IoU."""
    return run / "checkpoints" / "best.ckpt"


def output_folder(checkpoint: Path, name: str) -> Path:
    """The folder `name` in the run that a checkpoint is of, or beside one that lies elsewhere."""
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / name


def create_run_folder(folder: Path) -> Path:
    """Make the folder, or a numbered neighbour if a run has taken it: two may start in a second."""
    folder.parent.mkdir(parents=True, exist_ok=True)
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
def atomic_write(path: Path) -> Iterator[TextIO]:
    """A text file that is whole or not there, whenever the process is killed."""
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


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or that this process held in RAM."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_settings(run: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """config.yaml and overrides.yaml; of a resumed run too, whose end may have been moved."""
    before = run / "overrides.yaml"
    if before.is_file():
        overrides = [*OmegaConf.load(before), *(o for o in overrides if o[:7] != "resume=")]
    for name, content in (
        ("config.yaml", OmegaConf.merge(cfg, {"resume": None})),
        ("overrides.yaml", OmegaConf.create(overrides)),
    ):
        with atomic_write(run / name) as file:
            file.write(OmegaConf.to_yaml(content))
    (run / "error.txt").unlink(missing_ok=True)  # a crash that the run goes on from
