"""Fetching and unpacking of data sets' archives, so that no failure leaves half of one behind.

    fetch(urls, md5=md5, dest=root / "a.tar")                         # resumes, tries every mirror
    unpack(root / "a.tar", into=root, member_root="VOCdevkit/VOC2012")  # all of it or nothing
    Archive(...).find(root, download=True)  # both, unless the folder is there already

Either may be called by several processes at once: one works, the others wait and find it done.
"""

import logging
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError

from filelock import FileLock, Timeout
from torchvision.datasets.utils import calculate_md5, check_integrity
from tqdm import tqdm

from fcn.errors import DataError, reason

HINT = "`experiment=quickstart` needs no download."
TIMEOUT = 30.0  # seconds to connect, and for the next bytes to arrive
SLOWEST = 1000  # bytes a second, over all of a download: less is a mirror that stalls

log = logging.getLogger(__name__)


class _MirrorError(Exception):
    """This mirror failed; the next one may not."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A data set's published archive, and the folder in it that is wanted."""

    data: str  # the data set's name, for messages
    file: str  # what the archive is called on disk; .zip, or any kind of tar
    size: str  # to download, for messages
    md5: str
    urls: tuple[str, ...]
    tree: str  # the folder, as the archive names it

    def find(self, root: str | Path | None, download: bool) -> Path:
        """`root / tree`, fetched if it is missing and `download`; else that raises DataError."""
        if root is None:
            top = self.tree.partition("/")[0]
            raise DataError(f"{self.data} needs data.root: the folder that holds {top}/")
        root = Path(root).expanduser()
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
        # Both lock and look again, so two runs on one root share one download.
        fetch(self.urls, md5=self.md5, dest=root / self.file)
        return unpack(root / self.file, into=root, member_root=self.tree)


def fetch(urls: Sequence[str], md5: str, dest: Path) -> None:
    """Puts the file with this md5 at `dest`, from the first of the mirrors that has it.

    Bytes gather in `<dest>.part`, which a later call takes up where it ended, from any mirror;
    only what has the right md5 ever gets the name `dest`. A file that is there already is used if
    its md5 is right, which is how an archive is placed by hand.

    Raises DataError, after every mirror failed, with each one's reason and the way around; at once
    if `dest` holds something else, or if the disk is full or read-only.
    """
    part = dest.with_suffix(dest.suffix + ".part")
    failures: list[str] = []
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with locked(dest):
            if dest.exists():
                if (found := calculate_md5(dest)) != md5:
                    raise DataError(
                        f"{dest.absolute()} has md5 {found}, expected {md5}: it is incomplete or "
                        "something else. Delete it, or put the right file in its place."
                    )
                return
            mirrors = deque(urls)
            while mirrors:
                url = mirrors.popleft()
                resumed = part.exists()
                try:
                    _download(url, part)
                    if check_integrity(part, md5):
                        os.replace(part, dest)
                        return
                    found = calculate_md5(part)
                    part.unlink()  # nobody can tell which bytes are wrong
                    if resumed:  # perhaps those of an earlier call: this mirror may start afresh
                        mirrors.appendleft(url)
                    raise _MirrorError(f"wrong md5 {found}")
                except _MirrorError as e:
                    log.warning("%s: %s", url, e)
                    failures.append(f"  {url}\n    {e}")
    except OSError as e:
        raise DataError(f"{dest.absolute()}: cannot write here: {e.strerror or e}") from e
    raise DataError(
        f"Could not download {dest.name}:\n" + "\n".join(failures) + "\n"
        f"Trying again resumes. Or get the file elsewhere (md5 {md5}) and put it at\n"
        f"  {dest.absolute()}\n{HINT}"
    )


def _download(url: str, part: Path) -> None:
    """Appends the rest of `url` to `part`. Raises _MirrorError; OSError only for the local disk."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fcn"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT
        )
    except HTTPError as e:
        if e.code == 416 and start:  # nothing after `start`: all there, or too much; md5 tells
            return
        raise _MirrorError(f"HTTP {e.code} {e.reason}") from e
    except (OSError, HTTPException, ValueError) as e:
        raise _MirrorError(reason(e)) from e
    with response:
        if response.headers.get_content_type() == "text/html":
            raise _MirrorError("sent a web page, not the file")
        if start and response.status != 206:  # no Range here: the whole file comes again
            start = 0
        elif start:
            span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start:
                raise _MirrorError("answered a Range request with another range")
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            begun, first = time.monotonic(), start
            while True:
                waited = time.monotonic() - begun
                if waited > TIMEOUT and start - first < SLOWEST * waited:
                    raise _MirrorError(f"sent only {start - first:,} bytes in {waited:.0f} s")
                try:
                    chunk = response.read1(1 << 20)
                except (OSError, HTTPException) as e:
                    raise _MirrorError(f"{reason(e)} after {bar.n:,} bytes") from e
                if not chunk:
                    break
                file.write(chunk)
                start += len(chunk)
                bar.update(len(chunk))
    if total is not None and start < total:
        raise _MirrorError(f"connection closed after {start:,} of {total:,} bytes")


def unpack(archive: Path, into: Path, member_root: str) -> Path:
    """Extracts the folder `member_root` of a tar or .zip to `into / member_root`, which it returns.

    Extraction goes to a hidden folder beside it and ends with one rename, so a killed run never
    leaves half a tree that looks whole; the next call removes what it left. A tree that is there
    already is left alone.

    Raises DataError for an archive that is broken, lacks `member_root`, or holds anything other
    than plain files and folders below its own root (links, devices, absolute paths, '..').
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
                (_unzip if archive.suffix == ".zip" else _untar)(archive, temporary)
                if not Path(temporary, member_root).is_dir():
                    raise DataError(f"{archive}: holds no folder {member_root}")
                target.parent.mkdir(parents=True, exist_ok=True)
                Path(temporary, member_root).rename(target)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as e:
        raise DataError(f"{archive.absolute()}: cannot unpack this: {reason(e)}") from e
    return target


def _untar(archive: Path, folder: str) -> None:
    with tarfile.open(archive) as tar:
        members = tqdm(tar, f"unpacking {archive.name}", unit=" files", disable=None)
        tar.extractall(folder, members=members, filter=_plain)


def _unzip(archive: Path, folder: str) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in tqdm(
            file.infolist(), f"unpacking {archive.name}", unit=" files", disable=None
        ):
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if not made on Unix
            _check_member(member.filename, plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
            file.extract(member, folder)


def _plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's `data` filter, which also drops odd modes and owners, without its leniency: that
    one strips a leading '/' and lets links pass that point inside."""
    _check_member(member.name, plain=member.isreg() or member.isdir())
    return tarfile.data_filter(member, folder)


def _check_member(name: str, *, plain: bool) -> None:
    path = PurePosixPath(name)
    if not plain or path.is_absolute() or ".." in path.parts:
        raise DataError(f"archive refused: '{name}' is a link, a device or a path outside")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds `.<file>.lock` beside the file; the system frees it when the process dies."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that works on %s", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
