"""FCN-32s, 16s and 8s in one command: what train.py is called with, and a kill in the middle."""

import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_config
from forks import at_call
from omegaconf import OmegaConf

from fcn import stages
from fcn.checkpoint import last_checkpoint
from fcn.errors import ConfigError
from fcn.files import write_json
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.stages import run_train, settings_of, train_stages
from train import train

SETTINGS = [o for o in TINY if o.partition("=")[0] not in ("name", "model", "trainer.max_steps")]
SETTINGS += ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
SETTINGS += ["callbacks.last_checkpoint.every_n_steps=1"]
SETTINGS += ["callbacks.curves=null", "callbacks.panels=null"]


def test_settings_of_the_stages() -> None:
    best = Path("a=b/best.ckpt")
    given = ["experiment=paper", "model.weights=vgg.pth", "seed=1"]
    first = ["experiment=paper_fcn32s", "model.weights=vgg.pth", "seed=1"]
    assert settings_of("fcn32s", given, None) == first
    second = ["experiment=paper_fcn16s", "model.weights='a=b/best.ckpt'", "seed=1"]
    assert settings_of("fcn16s", given, best) == second
    model = ["model=fcn8s", "name=quickstart_fcn8s", "experiment=quickstart"]
    assert settings_of("fcn8s", ["experiment=quickstart"], None) == model
    assert settings_of("fcn8s", [], None) == ["model=fcn8s", "name=fcn8s"]
    for wrong in ("model=fcn8s", "model.stride=8", "resume=x", "-m"):
        with pytest.raises(ConfigError, match=wrong):
            settings_of("fcn32s", [wrong], None)


def without_training(arguments: list[str], code: int) -> int:
    """What train.py leaves in a run folder that it ends with this code."""
    settings, folder = arguments[:-1], arguments[-1].partition("=")[2]
    Path(folder).mkdir(parents=True)
    given = [setting for setting in settings if not setting.startswith("hydra")]
    OmegaConf.save(OmegaConf.create(given), Path(folder, "overrides.yaml"))
    if code == 0:
        write_json(Path(folder, "summary.json"), {"status": "finished"})
    return code


def test_stages_that_fail_and_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    codes = iter((0, 9, 0, 0))

    def run_train(arguments: list[str]) -> int:
        calls.append(arguments)
        return without_training(arguments, next(codes))

    monkeypatch.setattr(stages, "run_train", run_train)
    monkeypatch.chdir(tmp_path)
    # Without a checkpoint, the second stage begins again. At the third start nothing is left to do.
    assert [train_stages(["seed=1"]) for _ in range(3)] == [9, 0, 0]
    (folder,) = Path("runs/stages").iterdir()
    assert [call[0] for call in calls] == ["model=fcn32s", *2 * ["model=fcn16s"], "model=fcn8s"]
    assert calls[1] == calls[2]
    weights = f"model.weights={folder}/fcn16s/checkpoints/best.ckpt"
    settings = ["model=fcn8s", "name=fcn8s", weights, "seed=1"]
    assert calls[3] == [*settings, f"hydra.run.dir={folder}/fcn8s"]
    assert "fcn8s: finished before" in capsys.readouterr().out


def test_fcn_4s_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the recipe is one of FCN-4s. The paper's stages end at FCN-8s."""
    calls: list[list[str]] = []

    def run_train(arguments: list[str]) -> int:
        calls.append(arguments)
        return without_training(arguments, 0)

    monkeypatch.setattr(stages, "run_train", run_train)
    folder = tmp_path / "out"
    assert train_stages(["experiment=camvid_fcn4s", f"hydra.run.dir={folder}"]) == 0
    models = [f"model={name}" for name in ("fcn32s", "fcn16s", "fcn8s", "fcn4s")]
    assert [call[0] for call in calls] == models
    assert f"model.weights={folder}/fcn8s/checkpoints/best.ckpt" in calls[3]
    cfg = compose_config("train", *calls[2][:-1])
    assert (cfg.model.stride, cfg.model.skip_kernel) == (8, 3)  # as in the FCN-4s that follows


def test_settings_of_hydra_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They reach train.py, which does not write them to overrides.yaml."""
    calls: list[list[str]] = []

    def run_train(arguments: list[str]) -> int:
        calls.append(arguments)
        return without_training(arguments, 0)

    monkeypatch.setattr(stages, "run_train", run_train)
    monkeypatch.chdir(tmp_path)
    given = ["hydra.verbose=true", "hydra/job_logging=none"]
    assert [train_stages(given) for _ in range(2)] == [0, 0]
    assert len(calls) == 3
    assert set(given) <= set(calls[2])


def test_one_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would train the same stages, each in folders of its own."""
    monkeypatch.setattr(stages, "run_train", lambda arguments: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE or .* start fcn\.stages once"):
        train_stages(["seed=1"])


def test_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the "~" in this argument to us; so the second stage finds the first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    given: list[str] = []
    monkeypatch.setattr(stages, "run_train", lambda arguments: given.extend(arguments) or 1)
    assert train_stages(["hydra.run.dir=~/out"]) == 1
    assert given[-1] == f"hydra.run.dir={tmp_path}/out/fcn32s"
    assert train_stages(["hydra.run.dir=~no_user/out"]) == 1  # of nobody; an ordinary name
    assert "no_user/out/fcn32s" in given[-1]
    train_stages(["hydra.run.dir='a b'"])  # in quotes for Hydra
    assert given[-1] == "hydra.run.dir='a b/fcn32s'"
    with pytest.raises(ConfigError, match=r"^hydra\.run\.dir=x/\$\{now:%Y\}: the stages need"):
        train_stages(["hydra.run.dir=x/${now:%Y}"])


class Killed(BaseException):
    """Ends a run as a kill does: no part of it can react."""


def in_this_process(arguments: list[str]) -> int:
    """What train.py does with these arguments; 137 if it is killed."""
    *settings, last = arguments
    key, _, folder = last.partition("=")
    run = Path(folder.strip("'"))
    cfg = resumed_config(run, []) if key == "resume" else compose_config("train", *settings)
    try:
        train(cfg, run, settings)
    except Killed:
        return 137
    return 0


@pytest.mark.slow
def test_killed_in_the_second_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a=b"

    def die() -> None:
        raise Killed

    monkeypatch.setattr(stages, "run_train", in_this_process)
    command = [f"hydra.run.dir={folder}", *SETTINGS]
    with monkeypatch.context() as patch:
        at_call(SegmentationModule, "training_step", die, count=4, patch=patch)
        assert train_stages(command) == 137
    first = (folder / "fcn32s" / "summary.json").stat().st_mtime_ns
    assert not (folder / "fcn16s" / "summary.json").exists()
    assert {run.name for run in folder.iterdir()} == {"fcn32s", "fcn16s"}

    assert train_stages(command) == 0
    assert {run.name for run in folder.iterdir()} == set(stages.STAGES)
    assert (folder / "fcn32s" / "summary.json").stat().st_mtime_ns == first
    resumed = shlex.quote(f"resume='{folder}/fcn16s'")  # for a shell
    assert f"stage fcn16s: python train.py {resumed}\n" in capsys.readouterr().out
    for stage, before in (("fcn16s", "fcn32s"), ("fcn8s", "fcn16s")):
        assert [row["step"] for row in read_metrics(folder / stage / "metrics.csv")] == ["1", "2"]
        config = OmegaConf.load(folder / stage / "config.yaml")
        assert config.model.stride == int(stage[3:-1])
        assert config.model.weights == f"{folder}/{before}/checkpoints/best.ckpt"
        fresh = torch.load(last_checkpoint(folder / stage), weights_only=True)["fresh_layers"]
        assert "conv6" not in fresh  # it came from the stage before


SCRIPT = """
import os, signal, sys, time
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
def test_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM, here sent by the script itself, reaches train.py; run_train waits for its end."""
    monkeypatch.setattr(stages, "TRAIN", tmp_path / "train.py")
    stages.TRAIN.write_text(SCRIPT)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_train(["stopped"]) == 128 + signal.SIGTERM
    assert run_train(["killed"]) == 128 + signal.SIGKILL
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
