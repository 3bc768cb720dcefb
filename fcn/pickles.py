"""What is checked in a .ckpt or .pth, written or to be read, and why it could not be read.

    zipped = check_pickles(Path("last.ckpt"))     # raises an error if the file is no good
    check_written(Path("last.ckpt"))              # after it was written: it can be read again
    print(brief(error))                           # what is wrong, in a few words

torch's reader for weights only runs no code, but it compares no checksums, and it makes a bytearray
of any size that a pickle names.
"""

import pickle
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from pickletools import genops
from typing import IO
from zipfile import ZipFile, is_zipfile

import torch

from fcn.errors import WriteError, reason


def check_pickles(path: Path) -> bool:
    """Refuse a file that is damaged, or that asks for more memory than it has bytes.

    Returns:
        Whether it is a ZIP, which torch writes from version 1.6 on.

    Raises:
        OSError, ValueError, TypeError and others: the message says what is wrong with the file.
    """
    if is_zipfile(path):
        stat = path.stat()
        _check_zip(path, stat.st_mtime_ns, stat.st_size)
        return True
    with path.open("rb") as file:  # from a torch before 1.6, such as the authors' nets
        for _ in range(5):  # there are five pickles before the tensors
            _check_pickle(file)
    return False


@lru_cache
def _check_zip(path: Path, time: int, size: int) -> None:
    """Compare every byte of a file with the checksums that it holds.

    torch.save writes a CRC-32 of each tensor, but torch.load does not look at it.

    Args:
        path: the file.
        time, size: of the file. They are not used here, but a file that has changed is read again.

    Raises:
        ValueError: a bit has changed, or a part is missing or compressed.
        TypeError: as for `_check_pickle`.
    """
    with ZipFile(path) as file:
        parts = file.infolist()
        if any(part.file_size > part.compress_size for part in parts):
            raise ValueError(
                "it is compressed, as torch.save never does it; save it with torch.save"
            )
        damaged = file.testzip()
        if damaged:
            raise ValueError(f"it is damaged, {damaged} in it is not what was written")
        _check_parts(file)


def _check_parts(file: ZipFile) -> None:
    """Apply `_check_pickle` to each pickle in a file that torch.save wrote."""
    for part in file.infolist():
        if part.filename.lower().endswith(".pkl"):  # torch takes capitals for the same name
            with file.open(part) as content:
                _check_pickle(content)


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse the one call that torch allows and that fills any amount of memory.

    Raises:
        TypeError: the pickle makes a bytearray.
    """
    with suppress(ValueError):  # torch's reader refuses what genops cannot read
        for code, value, _ in genops(file):
            if code.name == "GLOBAL" and str(value).endswith(" bytearray"):
                raise TypeError("it holds a bytearray, for which a few bytes may ask for gigabytes")


def check_written(path: Path) -> None:
    """Refuse a checkpoint that was just written and could not be read again.

    Only plain values and tensors can be read, and a user's callback may have put anything into it.
    The tensors' own bytes are not read here, so that this takes milliseconds.

    Raises:
        WriteError: the message says what is in it, and what to do.
    """
    try:
        with ZipFile(path) as file:
            _check_parts(file)
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, TypeError) as error:
        raise WriteError(
            f"a checkpoint could not be read again, and is not kept: {brief(error)}. Such a value "
            "may come from state_dict() of a callback of your own, which may only return numbers, "
            "texts, lists, dicts and tensors: write float(x) for a NumPy value"
        ) from error


def brief(error: BaseException) -> str:
    """Why a file could not be read, in a few words.

    torch's own message about an unsafe file is long, and advises to load it all the same.
    """
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            return "not written by torch.save, or damaged"
        return f"it holds {code[1]}, no plain value, and to load that could run code"
    if isinstance(error, OSError):
        return reason(error)
    if isinstance(error, LookupError):  # what torch's reader raises for a file of text, and others
        return "not written by torch.save, or damaged"
    text = str(error).strip().partition("\n")[0].partition(". ")[0]
    return text if " " in text else f"damaged ({type(error).__name__})"
