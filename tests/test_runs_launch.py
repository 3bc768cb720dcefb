"""What train.py does around a training: which folder, what it goes on with, how it ends."""

import copy
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from fcn import cli
from fcn.cli import CONF
from fcn.datasets.download import HINT
from fcn.errors import DataError, Stopped, TrainingError
from fcn.files import write_json
from fcn.runs import process
from fcn.runs.folder import write_settings
from fcn.runs.launch import Train, launch

Start = Callable[..., int]
Call = tuple[DictConfig, Path, list[str]]


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    """conf/train.yaml with Hydra's own settings."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", ["name=x", "logger=wandb"], return_hydra_config=True)


@pytest.fixture
def start(composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`launch` in `tmp_path`, as Hydra calls it; the exit code of the script."""
    monkeypatch.chdir(tmp_path)

    def start(train: Train, *overrides: str, folder: str = ".", **settings: Any) -> int:
        cfg = copy.deepcopy(composed)
        with open_dict(cfg.hydra):
            cfg.hydra.mode = RunMode.RUN
            cfg.hydra.run.dir = folder
            cfg.hydra.overrides.task = list(overrides)
        Path(folder).mkdir(exist_ok=True)  # as Hydra does
        HydraConfig.instance().set_config(cfg)
        for key, value in settings.items():
            cfg[key] = value
        try:
            launch(cfg, train)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield start
    HydraConfig.instance().cfg = None


class Recorder:
    """Stands for `train`: notes its arguments, and ends as it is told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[Call] = []

    def __call__(self, cfg: DictConfig, run: Path, overrides: list[str]) -> dict[str, Any]:
        self.calls.append((cfg, run, overrides))
        if self.error:
            raise self.error
        return {"best/val/miou": 0.25}


def test_folder_of_a_new_run(tmp_path: Path, start: Start) -> None:
    train = Recorder()
    assert start(train, "name=x", "seed=3", "resume=auto", resume="auto") == 0
    assert start(train, "seed=3", folder="mine") == 0
    (cfg, run, overrides), (_, mine, _) = train.calls
    assert re.fullmatch(r"runs/x/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.as_posix())
    assert (cfg.resume, overrides) == (None, ["name=x", "seed=3"])
    assert mine == Path("mine")
    assert list(tmp_path.iterdir()) == []  # Hydra's empty folder is gone


def write_run(run: Path, status: str) -> None:
    """A run with `seed=3` on its command line."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    write_settings(run, OmegaConf.create({"seed": 3, "steps": 4, "resume": None}), ["seed=3"])
    write_json(run / "summary.json", {"status": status})


def test_going_on_with_a_run(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Recorder()
    write_run(tmp_path / "a", "stopped")
    assert start(train, "resume=a", "+steps=9", resume="a") == 0
    assert start(train, "seed=3", "resume=auto", folder="a", resume="auto") == 0
    changed, same = train.calls
    assert changed == ({"seed": 3, "steps": 9, "resume": "a"}, Path("a"), ["+steps=9"])
    assert same == ({"seed": 3, "steps": 4, "resume": "a"}, Path("a"), [])

    # The first command also finds a run that was extended by hand.
    write_settings(tmp_path / "a", changed[0], ["+steps=9"])
    assert start(train, "seed=3", "resume=auto", folder="a", resume="auto") == 0
    assert train.calls.pop() == ({"seed": 3, "steps": 9, "resume": "a"}, Path("a"), [])

    write_json(tmp_path / "a" / "summary.json", {"status": "finished"})
    assert start(train, "seed=3", "resume=auto", folder="a", resume="auto") == 0
    assert "a is finished: nothing to do" in capsys.readouterr().out
    assert len(train.calls) == 2

    assert start(train, "resume=runs/none", resume="runs/none") == 1
    message = "error: resume=runs/none: no run folder (it has no config.yaml)\n"
    assert capsys.readouterr().err == message
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


DIVERGED = TrainingError("the loss is nan")


@pytest.mark.parametrize(
    ("error", "main", "code", "message"),
    [
        (Stopped(Signals.SIGTERM, 4), True, 143, ""),
        (Stopped(Signals.SIGTERM, 4), False, 0, ""),
        (DIVERGED, True, 1, "error: the loss is nan\n"),
        (DIVERGED, False, 0, ""),  # else torchrun would kill the main process while it saves
        (
            DataError("a.png: broken"),
            True,
            1,
            "error: a.png: broken\nTo see all that is wrong: "
            "python -m fcn.datasets.check data=shapes data.limit=3\n",
        ),
        (DataError(f"no data. {HINT}"), True, 1, f"error: no data. {HINT}\n"),
        (KeyboardInterrupt(), True, 130, "\nstopped\n"),
    ],
)
def test_ends(
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    main: bool,
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(process, "is_main_process", lambda: main)
    given = ("data=shapes", "seed=1", "data.limit=3")
    assert start(Recorder(error), *given, folder="X") == code
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_through_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep, whose jobs are a group for its loggers, and an error without Hydra's own line."""
    train = Recorder()
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(
        lambda cfg: launch(cfg, train)
    )
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.root.level
    given = ["name=x", "logger=wandb", "hydra.sweep.dir=mine", "logger.wandb.group=null,ours"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *given, "resume=auto"])
    cli.run(main)
    found = [(cfg.logger.wandb.group, cfg.logger.wandb.name) for cfg, _, _ in train.calls]
    assert found == [("sweep_mine", "x_0"), ("ours", "x_1")]
    assert [run for _, run, _ in train.calls] == [Path("mine/0"), Path("mine/1")]

    train.error = DIVERGED
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: the loss is nan\n"
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    HydraConfig.instance().cfg = None
