"""32s, 16s and 8s in one command: what each is called with, and a kill in the middle."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY, train_tiny
from omegaconf import OmegaConf

from fcn import stages
from fcn.csv_logger import read_metrics
from fcn.errors import ConfigError
from fcn.runs import write_json
from fcn.stages import settings_of, train_stages

SETTINGS = [o for o in TINY if o.partition("=")[0] not in ("name", "model", "trainer.max_steps")]
SETTINGS += ["trainer.max_steps=6", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]
SETTINGS += ["callbacks.checkpoint_every_n_steps=1"]


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
    for wrong in ("model=fcn8s", "resume=x", "-m"):
        with pytest.raises(ConfigError, match=wrong):
            settings_of("fcn32s", [wrong], None)


def test_stages_that_fail_and_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    codes = iter((0, 9, 0, 0))

    def run_train(arguments: list[str]) -> int:
        calls.append(arguments)
        *settings, folder = arguments
        run = Path(folder.partition("=")[2].strip("'"))
        run.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(settings), run / "overrides.yaml")
        code = next(codes)
        if code == 0:
            write_json(run / "summary.json", {"status": "finished"})
        return code

    monkeypatch.setattr(stages, "run_train", run_train)
    monkeypatch.chdir(tmp_path)
    assert train_stages(["seed=1"]) == 9
    assert train_stages(["seed=1"]) == 0  # no checkpoint yet, so the second begins anew
    (folder,) = (tmp_path / "runs" / "stages").iterdir()
    assert [call[0] for call in calls] == ["model=fcn32s", *2 * ["model=fcn16s"], "model=fcn8s"]
    assert calls[1] == calls[2]
    weights = f"model.weights='runs/stages/{folder.name}/fcn16s/checkpoints/best.ckpt'"
    assert calls[3] == [
        "model=fcn8s",
        "name=fcn8s",
        weights,
        "seed=1",
        f"hydra.run.dir='runs/stages/{folder.name}/fcn8s'",
    ]
    assert train_stages(["seed=1"]) == 0  # nothing is left to do
    assert len(calls) == 4
    assert "fcn8s: finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_in_the_second_stage(tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    first = settings_of("fcn32s", SETTINGS, None)
    train_tiny(folder / "fcn32s", *first)
    summary = (folder / "fcn32s" / "summary.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "fcn.stages", f"hydra.run.dir={folder}", *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        command, cwd=PROJECT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    while not (folder / "fcn16s" / "checkpoints" / "last.ckpt").exists():
        assert killed.poll() is None
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "fcn16s" / "summary.json").exists()

    again = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {run.name for run in folder.iterdir()} == set(stages.STAGES)
    assert (folder / "fcn32s" / "summary.json").stat().st_mtime_ns == summary
    assert f"stage fcn16s: python train.py resume='{folder}/fcn16s'" in again.stdout
    for stage, before in (("fcn16s", "fcn32s"), ("fcn8s", "fcn16s")):
        rows = read_metrics(folder / stage / "metrics.csv")
        assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
        config = OmegaConf.load(folder / stage / "config.yaml")
        assert config.model.stride == int(stage[3:-1])
        assert config.model.weights == f"{folder}/{before}/checkpoints/best.ckpt"
        checkpoint = folder / stage / "checkpoints" / "last.ckpt"
        fresh = torch.load(checkpoint, weights_only=True)["fresh_layers"]
        assert "conv6" not in fresh  # it came from the stage before
