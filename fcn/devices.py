"""Moved: precision.py, runs/process.py."""

from fcn.precision import best_precision, keep_freed_memory  # noqa: F401
from fcn.runs.process import is_main_process, memory_size, quiet_lightning  # noqa: F401

prepare_cpu = keep_freed_memory
