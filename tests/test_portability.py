"""What Windows and macOS lack is not needed. windows/sitecustomize.py stands in for Windows here.

All commands run there, one after another in one process.
"""

import json
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
import yaml
from conftest import PROJECT, TINY
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


def run_all(folder: Path, *commands: list[str]) -> str:
    """What the commands print."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(WINDOWS),
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONIOENCODING": "cp1252",  # as where output goes to a file, on Windows in the West
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(WINDOWS / "scripts.py"), json.dumps(commands)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="cp1252",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which all commands have run, and what they printed."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photos" / "ü.png")
    (folder / "photos" / "東京.txt").touch()  # is named, on a screen without such signs
    settings = [
        o for o in TINY if o.partition("=")[0] not in ("name", "model", "trainer.max_steps")
    ]
    settings += ["trainer.log_every_n_steps=1"]
    train = ["train.py", *settings, "model=fcn32s", "callbacks.curves=null"]
    last = "ckpt=run/checkpoints/last.ckpt"
    short = [*settings, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    short += ["callbacks.curves=null", "callbacks.panels=null"]
    (folder / "sweeps" / "1").mkdir(parents=True)
    (folder / "sweeps" / "1" / "sweep.csv").touch()
    output = run_all(
        folder,
        # The loaders of training and of validation are processes of their own, and are spawned.
        [*train, "hydra.run.dir=run", "trainer.max_steps=4", "data.num_workers=1"],
        ["evaluate.py", last, "data.num_workers=0", "report.images=1"],
        ["predict.py", last, "input=photos", "device=cpu"],
        ["export.py", last, "format=safetensors", "output=tiny"],
        ["export.py", last, "output=tiny.onnx"],
        ["predict.py", "ckpt=tiny/model.safetensors", "input=photos", "device=cpu", "output=again"],
        # last.ckpt is replaced after all these programs have read it; metrics.csv is open.
        ["open", "run/metrics.csv", "run/panels/step_0000004.png", "sweeps/1/sweep.csv"],
        ["train.py", "resume=run", "data.num_workers=0", "trainer.max_steps=6"],
        ["train.py", "-m", *short, "model=fcn32s,fcn16s", "hydra.sweep.dir=sweeps/1"],
        ["-m", "fcn.stages", *short, "hydra.run.dir=stages"],
    )
    return folder, output


@linux
@pytest.mark.slow
@pytest.mark.xdist_group("windows")
def test_all_commands_without_posix(windows: tuple[Path, str]) -> None:
    folder, output = windows
    assert read_summary(folder / "run")["steps"] == 6
    assert [row["step"] for row in read_metrics(folder / "run" / "metrics.csv")] == list("123456")
    assert (folder / "run" / "evaluation" / "report.html").is_file()
    for result in ("run/predictions/ü.png", "again/ü_overlay.jpg", "tiny.onnx"):
        assert (folder / result).is_file(), result
    for job in ("sweeps/1/0", "sweeps/1/1", "stages/fcn32s", "stages/fcn16s", "stages/fcn8s"):
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


def mapped() -> str:
    return Path("/proc/self/maps").read_text(encoding="utf-8")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "evaluate.py": lambda path: open_candidate(path, accelerator="cpu"),
    "predict.py": lambda path: load_predictor(path, "cpu", None),
    "export.py": SegmentationModule.load_from_checkpoint,
}


@linux
@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_no_checkpoint_stays_mapped(
    opener: str, kind: str, tmp_path: Path, finished_run: Path
) -> None:
    """A run that still trains could not write its last.ckpt anew, on Windows."""
    path = tmp_path / "best.ckpt"  # a file of its own: other tests may have the run's mapped
    shutil.copy(best_checkpoint(finished_run), path)
    if kind == "safetensors":
        checkpoint = read_checkpoint(path)
        path = tmp_path / "best.safetensors"
        state = {name: value.clone() for name, value in checkpoint.pop("state_dict").items()}
        write_safetensors(checkpoint, state, path)
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


def test_ci_runs_the_commands_of_readme() -> None:
    workflow = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    jobs = workflow["jobs"]
    runs = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    for command in (*runs["fast"], *runs["all"]):
        assert command in readme
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "windows", "macos"]
    assert len(matrix["python"]) == 2
    assert '-m "not slow"' in runs["fast"][-1]
    assert "python -m pytest" in (PROJECT / runs["all"][-1].split()[-1]).read_text(encoding="utf-8")
