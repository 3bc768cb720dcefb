"""The run folder: creation, resume, sweeps, summary, and what a run needs to know about itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Old names, until their users have moved.
from fcn.checkpoint import best_checkpoint, last_checkpoint  # noqa: F401
from fcn.files import atomic_write as _atomic_write
from fcn.files import write_json, writing  # noqa: F401
from fcn.runs.folder import create_run_folder, output_folder, write_settings  # noqa: F401
from fcn.runs.folder import is_training as is_locked  # noqa: F401
from fcn.runs.folder import lock_run as locked  # noqa: F401
from fcn.runs.process import peak_memory  # noqa: F401
from fcn.runs.versions import git_revision, versions  # noqa: F401


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    with (
        _atomic_write(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        yield file
