"""python -m fcn.dashboard: what it sends to W&B, read back from a server that stands in for it."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fcn.dashboard import LOSS, SETTINGS, main
from fcn.runs.metrics import read_metrics

# The library of the views takes seconds to import.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dashboard")]

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
    """The library's one call of a server is answered in this process.

    It is imported here, since that takes a second in a worker that runs no test of this file.
    """
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal")
    found: Views = {}
    monkeypatch.setattr(internal, "execute_graphql", lambda _, *call: answer(found, *call))
    monkeypatch.setattr("wandb.Api", lambda: None)
    monkeypatch.setattr(
        "wandb_workspaces.workspaces.interface.get_app_url", lambda _: "https://example.org"
    )
    return found


def test_the_view(views: Views, finished_run: Path) -> None:
    """Every metric and every setting in it is one that a run logs under this name."""
    from wandb_workspaces.workspaces import Workspace

    main(["someone/fcn"])
    ((name, sent),) = views.items()
    assert (sent["entityName"], sent["projectName"]) == ("someone", "fcn")
    short = name.removeprefix("nw-").removesuffix("-v")
    view = Workspace.from_url(f"https://example.org/someone/fcn?nw={short}")
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


def test_one_line_of_error(
    views: Views, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("no key\nand more")

    def said(project: str) -> str:
        with pytest.raises(SystemExit):
            main([project])
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "fcn: write ENTITY/PROJECT, such as USER/fcn" in said("fcn")
    monkeypatch.setattr("wandb.Api", refuse)
    assert "the view in a/b: no key" in said("a/b")
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert "wandb_workspaces is not installed: pip install -r requirements/dashb" in said("a/b")
