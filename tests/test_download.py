"""Downloads, from a server in a thread on this machine, and unpacking; nothing leaves it."""

import hashlib
import io
import multiprocessing
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from fcn.datasets import download
from fcn.datasets.download import Archive, fetch, unpack
from fcn.errors import DataError

DATA = bytes(range(256)) * 2000
MD5 = hashlib.md5(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves DATA in the ways servers do; `log` has each request's path and Range header."""

    log: list[tuple[str, str | None]]
    stopped: Event

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        path, wanted = self.path.strip("/").partition("?")[0], self.headers.get("Range")
        self.server.log.append((path, wanted))
        body = {"html": b"<html>moved</html>", "wrong": DATA[::-1], "gone": b"", "loop": b""}
        content, start = body.get(path, DATA), 0
        if wanted and path in ("file", "cut", "half", "drip"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        status = {"gone": 404, "loop": 302}.get(path, 206 if start else 200)
        self.send_response(416 if start and start >= len(content) else status)
        self.send_header("Location", f"/loop?{len(self.server.log)}")
        self.send_header("Content-Type", "text/html" if path == "html" else "application/x-tar")
        self.send_header("Content-Length", str(max(len(content) - start, 0)))
        self.end_headers()
        half, stop = path in ("half", "drip"), {"cut": start + 1000}.get(path)
        self.wfile.write(content[start : len(content) // 2 if half else stop])
        while path == "drip" and not self.server.stopped.wait(0.05):
            self.wfile.write(b"\0")
        self.server.stopped.wait(20 if half else 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.log, server.stopped = [], Event()
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.stopped.set()
        server.shutdown()


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


def test_fetch(server: Server, dest: Path) -> None:
    fetch([server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    assert not dest.with_name("a.tar.part").exists()
    fetch([server.url("file")], md5=MD5, dest=dest)  # is there: no second request
    assert server.log == [("file", None)]
    dest.write_bytes(b"half of it")
    with pytest.raises(DataError, match=rf"{re.escape(str(dest))}.*expected {MD5}"):
        fetch([server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == b"half of it"
    assert len(server.log) == 1
    with pytest.raises(DataError, match=r"a\.tar.b\.tar: cannot write here"):
        fetch([server.url("file")], md5=MD5, dest=dest / "b.tar")


@pytest.mark.parametrize(
    ("path", "content", "ranges"),
    [
        ("file", DATA[:1234], ["bytes=1234-"]),
        ("norange", DATA[:1234], ["bytes=1234-"]),  # this server does not know ranges
        ("file", DATA, [f"bytes={len(DATA)}-"]),  # it answers with 416 that there is no more
        ("file", b"junk", ["bytes=4-", None]),
        ("file", b"junk" * len(DATA), [f"bytes={4 * len(DATA)}-", None]),
    ],
    ids=["part", "no ranges", "whole", "wrong", "too long"],
)
def test_resume(
    server: Server, dest: Path, path: str, content: bytes, ranges: list[str | None]
) -> None:
    dest.with_name("a.tar.part").write_bytes(content)
    fetch([server.url(path)], md5=MD5, dest=dest)
    assert [wanted for _, wanted in server.log] == ranges
    assert dest.read_bytes() == DATA


def test_next_mirror(server: Server, dest: Path) -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        dead = closed.url("file")
    reasons = {"gone": "HTTP Error 404", "loop": "HTTP Error 302", "html": "web page"}
    reasons |= {"wrong": "wrong md5", "cut": "1,000 of"}
    mirrors = {dead: "refused"} | {server.url(path): why for path, why in reasons.items()}
    with pytest.raises(DataError) as error:
        fetch(list(mirrors), md5=MD5, dest=dest)
    message = str(error.value)
    for url, why in mirrors.items():
        assert re.search(rf"{re.escape(url)}\s+.*{why}", message)
    for text in (MD5, str(dest), "experiment=quickstart"):
        assert text in message
    assert not dest.exists()
    # The wrong bytes are thrown away, the cut ones are used.
    assert dest.with_name("a.tar.part").read_bytes() == DATA[:1000]
    fetch([server.url("gone"), server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    assert server.log[-1] == ("file", "bytes=1000-")


def test_next_mirror_after_a_bad_one(
    server: Server, dest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that answers nothing, goes silent half-way, or sends a byte now and then."""
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "SLOWEST", 10 * len(DATA))
    with Server(("127.0.0.1", 0), Handler) as silent:  # accepts, but no thread of it answers
        mirrors = [silent.url("file"), *(server.url(path) for path in ("half", "drip", "file"))]
        fetch(mirrors, md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    for url, why in zip(mirrors, ("timed out", "timed out after", "sent only"), strict=False):
        assert re.search(rf"{url}: .*{why}", caplog.text)
    assert {p.name for p in dest.parent.iterdir()} <= {"a.tar", ".a.tar.lock"}


KIT = {"kit/tree/a.txt": DATA, "kit/tree/b/c.txt": DATA}


def write_tar(path: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in KIT.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return path


def write_zip(path: Path, *extra: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {**KIT, **dict.fromkeys(extra, b"evil")}.items():
            file.writestr(name, content)
    return path


@pytest.fixture(params=["a.tar", "a.zip"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write = write_tar if request.param == "a.tar" else write_zip
    return write(tmp_path / request.param)


def test_unpack(tmp_path: Path, archive: Path) -> None:
    (tmp_path / "kit" / "other").mkdir(parents=True)  # what is there stays
    (tmp_path / f".unpack-{archive.name}-killed" / "kit").mkdir(parents=True)
    target = unpack(archive, into=tmp_path, member_root="kit/tree")
    assert target == tmp_path / "kit" / "tree"
    assert (target / "b" / "c.txt").read_bytes() == DATA
    assert (tmp_path / "kit" / "other").is_dir()
    assert not list(tmp_path.glob(".unpack-*"))
    archive.unlink()
    unpack(archive, into=tmp_path, member_root="kit/tree")  # is there: not needed


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_unpack_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def extract_half(tar: tarfile.TarFile, folder: str, filter: Any) -> None:
        tar.extract(next(iter(KIT)), folder, filter=filter)
        raise kind("stop")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extract_half)
    with pytest.raises(DataError if kind is OSError else kind):
        unpack(write_tar(tmp_path / "a.tar"), into=tmp_path, member_root="kit/tree")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.tar", ".a.tar.lock"}


def test_hostile_tar(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, kind, link in (
        ("../evil.txt", tarfile.REGTYPE, ""),
        ("kit/tree/../../../evil.txt", tarfile.REGTYPE, ""),
        ("kit/link", tarfile.SYMTYPE, "/etc"),
        ("kit/link", tarfile.SYMTYPE, "../../evil.txt"),
        ("kit/device", tarfile.CHRTYPE, ""),
        ("kit/pipe", tarfile.FIFOTYPE, ""),
    ):
        hostile = tarfile.TarInfo(name)
        hostile.type, hostile.linkname = kind, link
        archive = write_tar(root / "a.tar", hostile)
        with pytest.raises(DataError, match=rf"{re.escape(str(archive))}.*{re.escape(name)}"):
            unpack(archive, into=root, member_root="kit/tree")
        assert {path.name for path in root.iterdir()} <= {"a.tar", ".a.tar.lock"}
        assert list(tmp_path.iterdir()) == [root]


def test_hostile_zip(tmp_path: Path) -> None:
    """Nothing gets outside of the folder that is wanted."""
    root = tmp_path / "root"
    root.mkdir()
    names = (str(tmp_path / "evil.txt"), "../evil.txt", "kit/tree/../../../evil.txt")
    unpack(write_zip(root / "a.zip", *names), into=root, member_root="kit/tree")
    assert list(tmp_path.iterdir()) == [root]
    assert {path.name for path in root.iterdir()} <= {"a.zip", ".a.zip.lock", "kit"}


def test_broken_archive(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(archive)) + r": holds no folder other"):
        unpack(archive, into=tmp_path, member_root="other")
    data = archive.read_bytes()
    flipped = bytearray(data)
    flipped[100 if archive.suffix == ".tar" else 5000] ^= 255  # of a tar, only heads are checked
    for damaged in (data[: len(data) // 2], flipped):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(archive)) + r": cannot unpack this"):
            unpack(archive, into=tmp_path, member_root="kit/tree")
    assert not (tmp_path / "kit").exists()


@pytest.fixture
def kit(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """An archive that the server has."""
    body = write_tar(tmp_path / "source.tar").read_bytes()
    monkeypatch.setitem(globals(), "DATA", body)
    md5, urls = hashlib.md5(body).hexdigest(), (server.url("gone"), server.url("file"))
    return Archive(data="Kit", file="kit.tar", size="1 MB", md5=md5, urls=urls, tree="kit/tree")


def test_archive(kit: Archive, server: Server, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"Kit needs data\.root: the folder that holds kit/"):
        kit.find(None, download=True)
    with pytest.raises(DataError, match=r"data\.download=true fetches it there \(1 MB\)"):
        kit.find(root, download=False)
    with pytest.raises(DataError, match=r"not found: no folder .*no_user"):
        kit.find("~no_user", download=False)
    root.mkdir()
    (root / "kit.tar.part").write_bytes(DATA[:1234])  # of a start that was killed
    assert kit.find(root, download=True) == root / "kit" / "tree"
    assert server.log[-1] == ("file", "bytes=1234-")
    requests = len(server.log)
    (root / "kit.tar").unlink()
    assert kit.find(root, download=True) == root / "kit" / "tree"  # a second start
    assert len(server.log) == requests


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")
def test_processes_at_once(kit: Archive, server: Server, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    arguments = (tmp_path / "root", True)
    processes = [fork.Process(target=kit.find, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path for path, _ in server.log] == ["gone", "file"]
    assert (tmp_path / "root" / "kit" / "tree" / "a.txt").is_file()
    assert not list((tmp_path / "root").glob(".unpack-*"))
