"""Moved to checkpoint.py."""
from fcn.checkpoint import *  # noqa: F403
from fcn.checkpoint import _check_whole, _load  # noqa: F401
