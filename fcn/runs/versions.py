"""The versions of the code and of the packages that made a result.

They are written into checkpoints, summary.json and an evaluation's metrics.json.
"""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "wandb")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on.

    A package that is not installed is left out: a run without W&B should not end at its first
    checkpoint for want of W&B's version.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
