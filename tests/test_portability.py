"""What Windows and macOS lack is not needed. windows/sitecustomize.py stands in for Windows here.

All commands run there, one after another in one process.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fcn import cli
from fcn.checkpoint import best_checkpoint, read_checkpoint, write_safetensors
from fcn.evaluation.candidate import open_candidate
from fcn.inference.predictor import load_predictor
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import read_summary

WINDOWS = Path(__file__).parent / "windows"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in looks into /proc")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which all commands have run, and what they printed."""
    folder = tmp_path_factory.mktemp("windows")
    for part in ("photos", "sweep"):
        (folder / part).mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photos" / "ü.png")
    (folder / "photos" / "東京.txt").touch()  # is named, on a screen without such signs
    environment = {
        "PYTHONPATH": str(WINDOWS),
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONIOENCODING": "cp1252",  # as where output goes to a file, on Windows in the West
    }
    done = subprocess.run(
        [sys.executable, str(WINDOWS / "scripts.py")],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="cp1252",
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@linux
@pytest.mark.slow
@pytest.mark.xdist_group("windows")
def test_all_commands_without_posix(windows: tuple[Path, str]) -> None:
    folder, output = windows
    assert read_summary(folder / "run")["steps"] == 4
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.csv")] == list("1234")
    for result in (
        "run/evaluation/report.html",
        "run/predictions/ü.png",
        "again/ü_overlay.jpg",
        "tiny.onnx",
    ):
        assert (folder / result).is_file(), result
    for job in ("sweep/0", "stages/fcn32s", "stages/fcn16s", "stages/fcn8s"):
        assert read_summary(folder / job)["status"] == "finished", job
    assert r"\u6771\u4eac.txt" in output
    assert not list(folder.rglob("*.part"))
    wrong = [path for path in folder.rglob("*") if re.search(r'[:*?"<>|]', path.name)]
    assert wrong == []


@linux
@pytest.mark.slow
@pytest.mark.xdist_group("windows")
def test_files_that_another_program_has_open(windows: tuple[Path, str]) -> None:
    """Rows of metrics.csv go to a second file, from which they are read; sweep.csv is left."""
    folder, output = windows
    assert re.search(r"run/metrics\.csv is still open in another program: its rows are in", output)
    assert (folder / "run" / "metrics.new.csv").is_file()
    assert re.search(r"sweep\.csv cannot be written \(used by another process.*goes on", output)
    for action in ("written", "removed"):
        assert re.search(rf"panels.* cannot be {action} \(used by another.*goes on", output)


def mapped() -> str:
    return Path("/proc/self/maps").read_text(encoding="utf-8")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "evaluate.py": lambda path: open_candidate(path, accelerator="cpu"),
    "predict.py": lambda path: load_predictor(path, "cpu", None),
    "export.py": SegmentationModule.load_from_checkpoint,
}


@linux
@pytest.mark.parametrize("opener", OPENERS)
def test_no_checkpoint_stays_mapped(opener: str, tmp_path: Path, finished_run: Path) -> None:
    """A run that still trains could not write its last.ckpt anew, on Windows."""
    ckpt, safe = tmp_path / "best.ckpt", tmp_path / "best.safetensors"
    shutil.copy(best_checkpoint(finished_run), ckpt)  # other tests may have the run's mapped
    checkpoint = read_checkpoint(ckpt)
    state = {name: value.clone() for name, value in checkpoint.pop("state_dict").items()}
    write_safetensors(checkpoint, state, safe)
    del checkpoint  # which holds momentum on disk
    for path in (ckpt, safe):
        tensors = read_checkpoint(path)
        assert str(path) in mapped()  # so that the next line can find it
        del tensors
        opened = OPENERS[opener](path)
        assert str(path) not in mapped()
        assert opened is not None


def test_commands_that_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "train.py", "resume=it's mine"]
    assert shlex.split(cli.command_line(words)) == words
    monkeypatch.setattr(cli, "os", SimpleNamespace(name="nt"))
    assert cli.command_line(words) == 'python train.py "resume=it\'s mine"'
