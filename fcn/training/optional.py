"""Files that a run can do without, such as pictures.

with optional_file(run / "curves.png"):
    draw_curves(columns, run / "curves.png")
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcn.errors import WriteError, reason


@contextmanager
def optional_file(path: Path) -> Iterator[None]:
    """Warn instead of failing where a picture cannot be written, so that training goes on.

    Python shows the same warning only once, so a full disk is not reported at every validation.
    """
    try:
        yield
    except (OSError, WriteError) as error:
        why = reason(error.__cause__ or error)
        message = f"{path} cannot be written ({why}); training goes on without it"
        warnings.warn(message, stacklevel=3)
