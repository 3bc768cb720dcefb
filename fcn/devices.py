"""Moved: precision.py, runs/process.py."""
from fcn.precision import best_precision  # noqa: F401
from fcn.runs.process import is_main_process, memory_size, quiet_lightning  # noqa: F401
