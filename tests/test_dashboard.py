"""python -m fcn.dashboard: what it sends to W&B, read back from a server that stands in for it."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from fcn.dashboard import LOSS, SETTINGS, dashboard, main
from fcn.runs.metrics import read_metrics

wandb = pytest.importorskip("wandb")
internal = pytest.importorskip("wandb_workspaces.workspaces.internal")

Views = dict[str, dict[str, Any]]  # what was sent, by the name that the library gave the view


def answer(views: Views, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """What W&B's GraphQL server answers: it stores a view, gives it back, or names the user."""
    if "upsertView" in query:
        views[variables["name"]] = variables
        return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}
    if "allViews" in query:
        node = {"id": "1", **views[variables["viewName"]]}
        return {"project": {"allViews": {"edges": [{"node": node}]}}}
    return {"viewer": {"id": "1", "username": "someone", "entity": "someone"}}


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> Views:
    """The library's one call of a server is answered in this process."""
    found: Views = {}
    monkeypatch.setattr(internal, "execute_graphql", lambda _, *call: answer(found, *call))
    monkeypatch.setattr("wandb.Api", lambda: None)
    monkeypatch.setattr(
        "wandb_workspaces.workspaces.interface.get_app_url", lambda _: "https://example.org"
    )
    return found


def load(name: str) -> Any:
    """The view again, as the library reads it from the server."""
    from wandb_workspaces.workspaces import Workspace

    short = name.removeprefix("nw-").removesuffix("-v")
    return Workspace.from_url(f"https://example.org/someone/fcn?nw={short}")


def test_the_view(views: Views, finished_run: Path) -> None:
    """Every metric and every setting in it is one that a run logs under this name."""
    main(["someone/fcn"])
    ((name, sent),) = views.items()
    assert (sent["entityName"], sent["projectName"]) == ("someone", "fcn")
    view = load(name)
    panels = {panel.title: panel for section in view.sections for panel in section.panels}
    lines = [panel for panel in panels.values() if type(panel).__name__ == "LinePlot"]
    assert {line.x.name for line in lines} == {"trainer/global_step"}
    drawn = {metric.name for line in lines for metric in line.y}
    drawn |= set(re.findall(r"\$\{(.+?)\}", " ".join(LOSS)))
    logged = set(read_metrics(finished_run / "metrics.csv")[-1])
    assert drawn <= logged
    assert drawn >= {"train/loss", "train/loss_mean", "train/loss_std", "val/loss", "val/miou"}
    (jagged,) = (line for line in lines if line.custom_expressions)
    assert "${train/loss_mean} + ${train/loss_std}" in jagged.custom_expressions
    assert "${train/loss_smooth}" in jagged.custom_expressions
    assert not jagged.y
    assert panels["IoU of each class"].metric_regex == "^val/iou/.*"
    assert panels["Validation"].media_keys == ["val/panels"]
    config = yaml.safe_load((finished_run / "config.yaml").read_text(encoding="utf-8"))
    *settings, score = panels["Settings and mean IoU"].columns
    assert score.metric.name == "val/miou.max"
    assert [column.metric.name for column in settings] == list(SETTINGS)
    for group, key in (name.split(".") for name in SETTINGS):
        assert key in config[group]
    assert view.runset_settings.pinned_columns == ["run:displayName", "summary:val/miou.max"]


@pytest.fixture
def server() -> Iterator[tuple[str, Views]]:
    """Its address, and the views that it was sent."""
    found: Views = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content = b"{}"
            if self.path == "/graphql":
                asked = json.loads(body)
                data = answer(found, asked["query"], asked.get("variables") or {})
                content = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", found
        running.shutdown()


def without_ids(value: Any) -> Any:
    """A view without the random names of its panels."""
    if isinstance(value, dict):
        return {key: without_ids(v) for key, v in value.items() if key != "__id__"}
    return list(map(without_ids, value)) if isinstance(value, list) else value


@pytest.mark.slow
def test_what_a_server_gets(
    server: tuple[str, Views], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, found = server
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # what another test has read of the environment
    main(["someone/fcn"])
    ((name, sent),) = found.items()
    short = name.removeprefix("nw-").removesuffix("-v")
    assert f"View saved: {address}/someone/fcn?nw={short}" in capsys.readouterr().err
    expected = (
        dashboard("someone", "fcn")
        ._to_model()
        .spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    assert without_ids(json.loads(sent["spec"])) == without_ids(json.loads(expected))


def test_one_line_of_error(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("no key\nand more")

    def absent() -> None:
        monkeypatch.setitem(sys.modules, "wandb_workspaces", None)

    cases: list[tuple[str, Callable[[], None], str]] = [
        ("fcn", lambda: None, "fcn: write ENTITY/PROJECT, such as USER/fcn"),
        (
            "a/b",
            lambda: monkeypatch.setattr("wandb.Api", refuse),
            "the view in a/b: no key",
        ),
        ("a/b", absent, "wandb_workspaces is not installed: pip install -r requirements/dashb"),
    ]
    for project, prepare, message in cases:
        prepare()
        with pytest.raises(SystemExit):
            main([project])
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 1
