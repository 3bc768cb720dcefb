"""W&B that cannot be reached, refuses or dies: training goes on, the CSV is whole, one warning."""

import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from conftest import train_tiny

from fcn.csv_logger import read_metrics
from fcn.module import SegmentationModule
from fcn.wandb_run import finish_wandb, start_wandb


class Server(ThreadingHTTPServer):
    """As much of W&B's as it takes to begin a run; or `code`, whatever it is asked."""

    code = 200
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are none of ours."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            variables = json.loads(body).get("variables") or {}
            project = {"id": "p", "name": "fcn", "entity": {"id": "e", "name": "me"}}
            run = {"id": "r", "name": variables.get("name"), "displayName": "x", "project": project}
            run |= {"config": "{}", "description": "", "sweepName": None, "historyLineCount": 0}
            upload = f"http://127.0.0.1:{self.server.server_port}/upload"
            files = [{"name": name, "uploadUrl": upload} for name in variables.get("files", ())]
            answer["data"] = {
                "viewer": {"id": "u", "username": "me", "entity": "me", "teams": {"edges": []}},
                "serverInfo": {
                    "cliVersionInfo": {},
                    "latestLocalVersionInfo": None,
                    "features": [],
                },
                "model": {"bucket": None},
                "upsertBucket": {"bucket": run, "inserted": True},
                "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files},
            }
        if self.server.code != 200:
            answer = {"errors": [{"message": "no"}]}
        content = json.dumps(answer).encode()
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The one that W&B talks to in this test, with a key."""
    wandb.teardown()  # it reads its environment once
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_FINISH_TIMEOUT": "2",
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield server
    close(server)
    wandb.teardown()


def close(server: Server) -> None:
    server.shutdown()
    server.server_close()


def train_and_warn(run: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_tiny(run, "logger=wandb", "trainer.log_every_n_steps=1")
    about = [str(w.message) for w in caught if "W&B" in str(w.message)]
    assert len(about) == 1, about
    assert f"wandb sync {run}/wandb/" in about[0]
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == ["1", "2", "3", "4"]
    assert (run / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["unreachable", "wrong key"])
def test_at_the_start(
    tmp_path: Path, server: Server, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "unreachable":
        close(server)
    server.code = 401
    run = tmp_path / "run"
    train_and_warn(run)
    (offline,) = (run / "wandb").glob("offline-run-*")  # so that nothing is lost
    assert b"train/loss_smooth" in next(offline.glob("*.wandb")).read_bytes()
    assert "anonymous" not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "quota"])
def test_in_the_middle(
    tmp_path: Path,
    server: Server,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = SegmentationModule.on_validation_epoch_start

    def fail(self: SegmentationModule) -> None:
        start(self)
        if fault == "quota":
            server.code = 403
        elif self.trainer.global_step == 2:
            close(server)

    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_start", fail)
    run = tmp_path / "run"
    train_and_warn(run)  # the tables at the end need the server; until then, W&B tries again
    (log,) = (run / "wandb").glob("run-*/*.wandb")
    assert b"train/loss_smooth" in log.read_bytes()


def test_a_service_that_dies(tmp_path: Path) -> None:
    """W&B's own process has died: each call raises, of which one warning is left."""

    def die(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=die, finish=die)
    logger: Any = SimpleNamespace(experiment=run, _wandb_init={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")
        start_wandb(lambda **_: logger, tmp_path, {})
    trainer: Any = SimpleNamespace(loggers=[logger], default_root_dir=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in range(3):
            run.log({"train/loss": value})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fcn.wandb_run.WandbLogger", SimpleNamespace)
            finish_wandb(trainer, 0)
    assert [str(w.message).split(";")[0] for w in caught] == ["W&B failed (Connection lost)"]
