"""Run folders and JSON."""

import json
import math
from pathlib import Path

import pytest

from fcn.runs import create_run_folder, git_revision, write_json


def test_folders_of_two_runs_differ(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "fcn8s" / "now"
    assert create_run_folder(wanted) == wanted
    assert create_run_folder(wanted) == wanted.with_name("now_2")  # though the first is empty yet
    (tmp_path / "file").touch()
    assert create_run_folder(tmp_path / "file") == tmp_path / "file_2"


def test_folder_that_hydra_has_made(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    assert create_run_folder(tmp_path / "0") == tmp_path / "0"
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").touch()
    assert create_run_folder(tmp_path / "1") == tmp_path / "1_2"


def test_two_runs_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the folder empty before either has put anything there."""
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    folders = [create_run_folder(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run_2", "run_3"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 0)}], "d": None, "é": "ü"}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, 0]}], "d": None, "é": "ü"}
    assert text.endswith("\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_git_revision() -> None:
    revision = git_revision()
    if revision is None:
        pytest.skip("no git checkout")
    assert len(revision.removesuffix("-dirty")) == 40
