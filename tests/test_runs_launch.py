"""What train.py does around a training: which folder, what it goes on with, how it ends."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fcn import cli
from fcn.cli import CONF
from fcn.datasets.download import HINT
from fcn.errors import DataError, Stopped, TrainingError
from fcn.files import write_json
from fcn.runs import process
from fcn.runs.folder import write_settings
from fcn.runs.launch import launch


def call(main: Callable[[], None], *arguments: str) -> int:
    """A script's main function with a command line; the exit code."""
    handlers, level = logging.root.handlers[:], logging.root.level
    # A script that is imported does not find conf/ by itself.
    config = [] if main.__module__ == __name__ else [f"--config-path={CONF}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x.py", *config, *arguments])
        try:
            cli.run(main)
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
            HydraConfig.instance().cfg = None
    return 0


class Recorder:
    """Stands for `train`: notes its arguments, and ends as it is told.

    Args:
        conf: the folder of train.yaml.
    """

    def __init__(self, conf: Path = CONF) -> None:
        self.conf, self.error = str(conf), None
        self.calls: list[tuple[DictConfig, Path, list[str]]] = []

    def __call__(self, cfg: DictConfig, run: Path, overrides: list[str]) -> dict[str, Any]:
        self.calls.append((cfg, run, overrides))
        if self.error:
            raise self.error
        return {"best/val/miou": 0.25}

    def start(self, *arguments: str) -> int:
        """`python train.py` with this one in place of the training; its exit code."""
        composed = hydra.main(version_base="1.3", config_path=self.conf, config_name="train")
        return call(composed(lambda cfg: launch(cfg, self)), *arguments)


SETTINGS: dict[str, Any] = {"name": "x", "seed": 0, "resume": None, "data": {"limit": None}}
# As in conf/train.yaml:
SETTINGS["hydra"] = {"run": {"dir": "."}, "output_subdir": None}
SETTINGS["defaults"] = ["_self_", {"override hydra/job_logging": "stdout"}]


@pytest.fixture
def train(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Recorder:
    """It starts in `tmp_path`. Of all settings it has a few, which are composed at once."""
    monkeypatch.chdir(tmp_path)
    conf = tmp_path_factory.mktemp("conf")
    (conf / "train.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    return Recorder(conf)


def test_folder_of_a_new_run(tmp_path: Path, train: Recorder) -> None:
    assert train.start("seed=3", "resume=auto") == 0
    assert train.start("hydra.run.dir=mine") == 0
    (cfg, run, overrides), (_, mine, _) = train.calls
    assert re.fullmatch(r"runs/x/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.as_posix())
    assert (cfg.resume, overrides) == (None, ["seed=3"])
    assert mine == Path("mine")
    assert list(tmp_path.iterdir()) == []  # Hydra's empty folder is gone


@pytest.mark.slow
def test_going_on_with_a_run(
    tmp_path: Path, train: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    write_settings(run, OmegaConf.create({"seed": 3, "steps": 4, "resume": None}), ["seed=3"])
    write_json(run / "summary.json", {"status": "stopped"})
    same = ("seed=3", "resume=auto", "hydra.run.dir=a")
    assert train.start("resume=a", "+steps=9") == 0
    assert train.start(*same) == 0
    settings = {"seed": 3, "steps": 4, "resume": "a"}
    changed = (settings | {"steps": 9}, Path("a"), ["+steps=9"])
    assert train.calls == [changed, (settings, Path("a"), [])]

    # The first command also finds a run that was extended by hand.
    write_settings(run, train.calls[0][0], ["+steps=9"])
    assert train.start(*same) == 0
    assert train.calls[2] == (settings | {"steps": 9}, Path("a"), [])

    write_json(run / "summary.json", {"status": "finished"})
    assert train.start(*same) == 0
    assert "a is finished: nothing to do" in capsys.readouterr().out
    assert train.start("resume=runs/none") == 1
    message = "error: resume=runs/none: no run folder (it has no config.yaml)\n"
    assert capsys.readouterr().err == message
    assert len(train.calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_broken_data_of_a_resumed_run(
    tmp_path: Path, train: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command in the error checks the data of that run."""
    (tmp_path / "a").mkdir()
    settings = {"data": {"limit": 3, "num_workers": 1}, "resume": None}
    write_settings(tmp_path / "a", OmegaConf.create(settings), ["data.limit=3", "+seed=1"])
    train.error = DataError("a.png: broken")
    assert train.start("resume=a", "data.num_workers=0") == 1
    check = "python -m fcn.datasets.check data.limit=3 data.num_workers=0\n"
    assert capsys.readouterr().err.endswith(check)


CHECK = "To see all that is wrong: python -m fcn.datasets.check data.limit=3"


@pytest.mark.slow
def test_ends(
    tmp_path: Path, train: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """An error has no line of Hydra's own, and leaves no folder."""
    given = ("seed=1", "data.limit=3", "hydra.run.dir=X")
    stopped, diverged = Stopped(Signals.SIGTERM, 4), TrainingError("the loss is nan")
    for error, main, code, message in (
        (stopped, True, 143, ""),
        (diverged, True, 1, "error: the loss is nan\n"),
        # Another process must not end with an error: torchrun would kill the main one, which saves.
        (stopped, False, 0, ""),
        (diverged, False, 0, ""),
        (DataError("a.png: broken"), True, 1, f"error: a.png: broken\n{CHECK}\n"),
        (DataError(f"no data. {HINT}"), True, 1, f"error: no data. {HINT}\n"),
    ):
        train.error = error
        monkeypatch.setattr(process, "is_main_process", lambda main=main: main)
        assert train.start(*given) == code
        assert capsys.readouterr().err == message
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_jobs_of_a_sweep_are_a_group_for_their_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = Recorder()
    given = ["name=x", "logger=wandb", "hydra.sweep.dir=mine", "logger.wandb.group=null,ours"]
    unnamed = "+logger.unnamed={group:null,name:null}"  # W&B itself then names each run
    assert train.start("-m", *given, unnamed, "resume=auto") == 0
    found = [(cfg.logger.wandb.group, cfg.logger.wandb.name) for cfg, _, _ in train.calls]
    assert found == [("sweep_mine", "x_0"), ("ours", "x_1")]
    assert [cfg.logger.unnamed.name for cfg, _, _ in train.calls] == [None, None]
    assert [run for _, run, _ in train.calls] == [Path("mine/0"), Path("mine/1")]
