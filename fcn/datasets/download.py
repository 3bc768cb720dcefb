"""Download and unpack data sets' archives, so that no failure leaves half of one behind.

    fetch(urls, md5=md5, dest=root / "a.tar")                         # resumes, tries every mirror
    unpack(root / "a.tar", into=root, member_root="VOCdevkit/VOC2012")  # everything or nothing
    Archive(...).find(root, download=True)  # both, unless the folder exists already

Several processes may call any of these at once. One of them does the work; the others wait, and
then find it done.
"""

import logging
import os
import shutil
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from fcn.errors import DataError, reason
from fcn.files import expanded, is_locked, lock, retry

HINT = "`experiment=quickstart` needs no download."
TIMEOUT = 30.0  # seconds to wait for a connection, and for the next bytes
SLOWEST = 1000  # bytes per second, on average; a mirror that is slower is given up
CHUNK = 2**20  # most bytes to read at once

log = logging.getLogger(__name__)


class _MirrorError(Exception):
    """A mirror failed. The next one is tried."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A data set's published archive, and the folder in it that is needed."""

    data: str  # the data set's name, for messages
    file: str  # the archive's name on disk; a .zip, or any kind of tar
    size: str  # of the download, for messages
    md5: str
    urls: tuple[str, ...]
    tree: str  # the path of the folder in the archive

    def find(self, root: str | Path | None, download: bool) -> Path:
        """The folder `root / tree`, which is downloaded if it is missing and `download` is true.

        Raises:
            DataError: the folder is missing, or it cannot be downloaded.
        """
        if root is None:
            top = self.tree.partition("/")[0]
            raise DataError(f"{self.data} needs data.root: the folder that holds {top}/")
        root = expanded(root)
        folder = root / self.tree
        if folder.is_dir():
            return folder
        if not download:
            raise DataError(
                f"{self.data} not found: no folder {folder.absolute()}\n"
                f"  data.download=true fetches it there ({self.size}), or unpack the official "
                f"archive {self.file} in {root.absolute()},\n"
                f"  or set data.root to the folder that holds {self.tree}/. {HINT}"
            )
        # Both of these lock and then look again, so that two runs on one root share one download.
        fetch(self.urls, md5=self.md5, dest=root / self.file)
        return unpack(root / self.file, into=root, member_root=self.tree)


def fetch(urls: Sequence[str], md5: str, dest: Path) -> None:
    """Download the file with this MD5 sum to `dest`, from the first mirror that has it.

    Bytes are collected in `<dest>.part`. A later call continues that file, from any mirror. Only a
    file with the right MD5 sum is ever given the name `dest`. A file that is at `dest` already is
    used if its MD5 sum is right, so that an archive can be put there by hand.

    Raises:
        DataError: every mirror failed; the message gives the reason of each, and another way to
            get the file. Or `dest` holds something else, or the disk is full or read-only.
    """
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest):
            if not dest.exists():
                _try_mirrors(urls, md5, dest)
            elif (found := calculate_md5(dest)) != md5:
                raise DataError(
                    f"{dest.absolute()} has md5 {found}, expected {md5}: it is incomplete or "
                    "something else. Delete it, or put the right file in its place."
                )
    except OSError as e:
        raise DataError(f"{dest.absolute()}: cannot write here: {reason(e)}") from e


def _try_mirrors(urls: Sequence[str], md5: str, dest: Path) -> None:
    """Download the file `dest` from one mirror after the other, until its MD5 sum is right.

    Raises:
        DataError: every mirror failed.
        OSError: the disk is full or read-only.
    """
    part = dest.with_suffix(dest.suffix + ".part")
    failures: list[str] = []
    mirrors = list(urls)
    while mirrors:
        url = mirrors.pop(0)
        resumed = part.exists()
        try:
            _download(url, part)
            found = calculate_md5(part)
            if found == md5:
                retry(lambda: os.replace(part, dest))
                return
            part.unlink()  # it is unknown which bytes are wrong
            if resumed:  # perhaps those of an earlier call: try this mirror again from the start
                mirrors.insert(0, url)
            raise _MirrorError(f"wrong md5 {found}")
        except _MirrorError as e:
            log.warning("%s: %s", url, e)
            failures.append(f"  {url}\n    {e}\n")
    raise DataError(
        f"Could not download {dest.name}:\n{''.join(failures)}"
        f"The same command resumes. Or get the file elsewhere (md5 {md5}) and put it at\n"
        f"  {dest.absolute()}\n{HINT}"
    )


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`.

    Raises:
        _MirrorError: the mirror failed.
        OSError: the disk is full or read-only.
    """
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fcn"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as e:
        if start and getattr(e, "code", None) == 416:  # "Range Not Satisfiable"
            return  # `part` is complete, or too long: its MD5 sum will show which
        raise _MirrorError(reason(e)) from e
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _MirrorError("sent a web page, not the file")
        # A mirror that cannot resume answers 200 and sends the whole file.
        _append(response, part, start if response.status == 206 else 0)


def _append(response: HTTPResponse, part: Path, start: int) -> None:
    """Write what a mirror sends to `part`, which holds the first `start` bytes already."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None)
    size, begun = start, time.monotonic()
    with part.open("ab" if start else "wb") as file, bar:
        while True:
            waited = time.monotonic() - begun
            if waited > TIMEOUT and size - start < SLOWEST * waited:
                raise _MirrorError(f"sent only {size - start:,} bytes in {waited:.0f} s")
            try:
                chunk = response.read1(CHUNK)
            except (OSError, HTTPException) as e:
                raise _MirrorError(f"{reason(e)} after {size:,} bytes") from e
            if not chunk:
                break
            file.write(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    if total is not None and size < total:
        raise _MirrorError(f"connection closed after {size:,} of {total:,} bytes")


def unpack(archive: Path, into: Path, member_root: str) -> Path:
    """Extract the folder `member_root` of a tar or .zip to `into / member_root`.

    The files go to a hidden folder in `into` first, which is renamed at the end. A killed run
    therefore never leaves an incomplete folder under the final name, and the next call removes the
    hidden one. A folder that exists already is left as it is.

    Returns:
        `into / member_root`.

    Raises:
        DataError: the archive is damaged, lacks `member_root`, or holds a device, or a link or a
            path that leads outside.
    """
    target = into / member_root
    prefix = f".unpack-{archive.name}-"
    try:
        with locked(archive):
            if target.is_dir():
                return target
            for leftover in into.glob(f"{prefix}*"):
                shutil.rmtree(leftover)
            with tempfile.TemporaryDirectory(prefix=prefix, dir=into) as temporary:
                log.info("unpacking %s", archive)
                # Neither writes a file outside of the folder: a .zip's paths are shortened, and the
                # filter of a tar refuses them.
                if archive.suffix == ".zip":
                    with zipfile.ZipFile(archive) as file:
                        file.extractall(temporary)
                else:
                    with tarfile.open(archive) as tar:
                        tar.extractall(temporary, filter="data")
                if not Path(temporary, member_root).is_dir():
                    raise DataError(f"{archive}: holds no folder {member_root}")
                target.parent.mkdir(parents=True, exist_ok=True)
                retry(lambda: os.rename(Path(temporary, member_root), target))
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as e:
        raise DataError(f"{archive.absolute()}: cannot unpack this: {reason(e)}") from e
    return target


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock `.<file>.lock` in the file's folder, for as long as this process lives."""
    path = file.with_name(f".{file.name}.lock")
    if is_locked(path):
        log.info("waiting for another process that works on %s", file)
    with lock(path, timeout=-1):
        yield
