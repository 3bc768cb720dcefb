"""Moved to checkpoint.py."""

from fcn.checkpoint import *  # noqa: F403
from fcn.checkpoint import _check_checksums, _load  # noqa: F401
