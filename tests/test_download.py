"""Downloads, from a server in a thread on this machine, and unpacking; nothing leaves it."""

import hashlib
import io
import multiprocessing
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
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
        if path == "gone":
            self.send_error(404)
            return
        if path == "loop":
            self.send_response(302)
            self.send_header("Location", f"/loop?{len(self.server.log)}")
            self.end_headers()
            return
        body, start, kind = DATA, 0, "application/x-tar"
        if path == "html":
            body, kind = b"<html>moved</html>", "text/html; charset=utf-8"
        elif path == "wrong":
            body = DATA[::-1]
        elif wanted and path != "norange":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if path in ("half", "drip"):
            self.wfile.write(body[start : len(body) // 2])
            while path == "drip" and not self.server.stopped.wait(0.05):
                self.wfile.write(b"\0")
            self.server.stopped.wait(20)
            return
        self.wfile.write(body[start : start + 1000] if path == "cut" else body[start:])


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
    return tmp_path / "root" / "a.tar"  # its folder is made


def part(dest: Path) -> Path:
    dest.parent.mkdir(exist_ok=True)
    return dest.with_name("a.tar.part")


def test_fetch(server: Server, dest: Path) -> None:
    fetch([server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    assert not part(dest).exists()
    fetch([server.url("file")], md5=MD5, dest=dest)  # is there: no second request
    assert server.log == [("file", None)]


@pytest.mark.parametrize(("path", "size"), [("file", 1234), ("norange", 1234), ("file", len(DATA))])
def test_resume(server: Server, dest: Path, path: str, size: int) -> None:
    """The server may not know ranges, or answer with 416 that there is no more."""
    part(dest).write_bytes(DATA[:size])
    fetch([server.url(path)], md5=MD5, dest=dest)
    assert server.log == [(path, f"bytes={size}-")]
    assert dest.read_bytes() == DATA


@pytest.mark.parametrize("junk", [b"junk", b"junk" * len(DATA)], ids=["short", "too long"])
def test_resume_of_a_wrong_part(server: Server, dest: Path, junk: bytes) -> None:
    part(dest).write_bytes(junk)
    fetch([server.url("file")], md5=MD5, dest=dest)
    assert [wanted for _, wanted in server.log] == [f"bytes={len(junk)}-", None]
    assert dest.read_bytes() == DATA


def test_next_mirror(server: Server, dest: Path) -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        dead = closed.url("file")
    mirrors = [dead, *(server.url(p) for p in ("gone", "html", "wrong", "cut", "file"))]
    fetch(mirrors, md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    # The wrong bytes are thrown away, the cut ones are used.
    assert [w for _, w in server.log] == [None, None, None, None, "bytes=1000-"]


def test_all_mirrors_fail(server: Server, dest: Path) -> None:
    paths = {"gone": "HTTP Error 404", "html": "web page", "wrong": "wrong md5", "cut": "1,000 of"}
    with pytest.raises(DataError) as error:
        fetch([server.url(p) for p in paths], md5=MD5, dest=dest)
    message = str(error.value)
    for path, why in paths.items():
        assert re.search(rf"{re.escape(server.url(path))}\s+.*{why}", message)
    for text in (MD5, str(dest), "experiment=quickstart"):
        assert text in message
    assert not dest.exists()
    assert part(dest).read_bytes() == DATA[:1000]


def test_stalled_server(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    silent = Server(("127.0.0.1", 0), Handler)  # accepts, answers nothing
    with silent, pytest.raises(DataError, match="timed out"):
        fetch([silent.url("file")], md5=MD5, dest=dest)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("half", "timed out after"),
        ("drip", "sent only"),
        ("loop", "HTTP Error 302"),
        ("html", "web page"),
    ],
)
def test_next_mirror_after_a_bad_one(
    server: Server,
    dest: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    why: str,
) -> None:
    """One that goes silent half-way, sends a byte now and then, redirects for ever, or lies."""
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "SLOWEST", 10 * len(DATA))
    fetch([server.url(path), server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == DATA
    assert why in caplog.text
    assert {p.name for p in dest.parent.iterdir()} <= {"a.tar", ".a.tar.lock"}


def test_wrong_archive_in_place(server: Server, dest: Path) -> None:
    part(dest)
    dest.write_bytes(b"half of it")
    with pytest.raises(DataError, match=rf"{re.escape(str(dest))}.*expected {MD5}"):
        fetch([server.url("file")], md5=MD5, dest=dest)
    assert dest.read_bytes() == b"half of it"
    assert not server.log


def test_unwritable(server: Server, tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DataError, match="root"):
        fetch([server.url("file")], md5=MD5, dest=tmp_path / "root" / "a.tar")


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


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_unpack(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    archive = write(tmp_path / ("a.tar" if write is write_tar else "a.zip"))
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
    archive = write_tar(tmp_path / "a.tar")

    def extract_half(tar: tarfile.TarFile, folder: str, filter: Any) -> None:
        tar.extract(next(iter(KIT)), folder, filter=filter)
        raise kind("stop")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extract_half)
    with pytest.raises(DataError if kind is OSError else kind):
        unpack(archive, into=tmp_path, member_root="kit/tree")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.tar", ".a.tar.lock"}


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil.txt", tarfile.REGTYPE, ""),
        ("kit/tree/../../../evil.txt", tarfile.REGTYPE, ""),
        ("kit/link", tarfile.SYMTYPE, "/etc"),
        ("kit/link", tarfile.SYMTYPE, "../../evil.txt"),
        ("kit/device", tarfile.CHRTYPE, ""),
        ("kit/pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_hostile_tar(tmp_path: Path, name: str, kind: bytes, link: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    hostile = tarfile.TarInfo(name)
    hostile.type, hostile.linkname = kind, link
    archive = write_tar(root / "a.tar", hostile)
    with pytest.raises(DataError, match=rf"{re.escape(str(archive))}.*{re.escape(name)}"):
        unpack(archive, into=root, member_root="kit/tree")
    assert [p.name for p in root.iterdir() if not p.name.endswith(".lock")] == ["a.tar"]
    assert list(tmp_path.iterdir()) == [root]


def test_hostile_zip(tmp_path: Path) -> None:
    """Nothing gets outside of the folder that is wanted."""
    root = tmp_path / "root"
    root.mkdir()
    names = (str(tmp_path / "evil.txt"), "../evil.txt", "kit/tree/../../../evil.txt")
    unpack(write_zip(root / "a.zip", *names), into=root, member_root="kit/tree")
    assert list(tmp_path.iterdir()) == [root]
    found = {path.name for path in root.rglob("*") if path.is_file()}
    assert found - {".a.zip.lock"} <= {"a.zip", "a.txt", "c.txt", "evil.txt"}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other folder"])
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_broken_archive(tmp_path: Path, write: Callable[[Path], Path], damage: str) -> None:
    archive = write(tmp_path / ("a.tar" if write is write_tar else "a.zip"))
    data = bytearray(archive.read_bytes())
    if damage == "flipped":
        data[100 if write is write_tar else 5000] ^= 255  # of a tar, only the headers are checked
    archive.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    wanted, message = "kit/tree", ""
    if damage == "other folder":
        wanted, message = "other", "holds no folder other"
    with pytest.raises(DataError, match=f"{re.escape(str(archive))}.*{message}"):
        unpack(archive, into=tmp_path, member_root=wanted)
    assert not (tmp_path / "kit").exists()


def test_archive(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = write_tar(tmp_path / "source.tar").read_bytes()
    monkeypatch.setitem(globals(), "DATA", body)
    archive = Archive(
        data="Kit",
        file="kit.tar",
        size="1 MB",
        md5=hashlib.md5(body).hexdigest(),
        urls=(server.url("gone"), server.url("file")),
        tree="kit/tree",
    )
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"Kit needs data\.root: the folder that holds kit/"):
        archive.find(None, download=True)
    with pytest.raises(DataError, match=r"data\.download=true fetches it there \(1 MB\)"):
        archive.find(root, download=False)
    (root).mkdir()
    (root / "kit.tar.part").write_bytes(body[:1234])  # of a start that was killed
    assert archive.find(root, download=True) == root / "kit" / "tree"
    assert server.log[-1] == ("file", "bytes=1234-")
    requests = len(server.log)
    (root / "kit.tar").unlink()
    assert archive.find(root, download=True) == root / "kit" / "tree"  # a second start
    assert len(server.log) == requests


def _fetch_and_unpack(url: str, md5: str, root: Path) -> None:
    fetch([url], md5=md5, dest=root / "a.tar")
    unpack(root / "a.tar", into=root, member_root="kit/tree")


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")
def test_processes_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = write_tar(tmp_path / "source.tar").read_bytes()
    monkeypatch.setitem(globals(), "DATA", body)
    arguments = (server.url("file"), hashlib.md5(body).hexdigest(), tmp_path / "root")
    fork = multiprocessing.get_context("fork")
    work: Callable[..., None] = _fetch_and_unpack
    processes = [fork.Process(target=work, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.log) == 1
    assert (tmp_path / "root" / "kit" / "tree" / "a.txt").is_file()
    assert not list((tmp_path / "root").glob(".unpack-*"))
