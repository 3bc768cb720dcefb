"""Evaluation of a checkpoint: scores per image and near boundaries, tables, and the report.

evaluate.py puts the parts together.
"""

# For fcn/prediction.py, until that is gone.
from pathlib import Path
from typing import Any

from fcn.checkpoint import read_checkpoint
from fcn.module import SegmentationModule


def open_checkpoint(path: Path) -> tuple[SegmentationModule, dict[str, Any]]:
    return SegmentationModule.load_from_checkpoint(path), read_checkpoint(path)
