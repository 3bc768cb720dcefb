"""Old name, until its users have moved."""

from fcn.runs.summary import summarise  # noqa: F401
