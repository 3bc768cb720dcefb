"""W&B that cannot be reached, refuses or dies: training goes on, the CSV is whole, one warning."""

import os
import re
import signal
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest
import wandb
from conftest import PROJECT, TINY, train_tiny
from omegaconf import OmegaConf

from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.cli import compose
from fcn.errors import ConfigError
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.wandb_logger import SUMMARIES, TolerantWandbLogger
from train import train


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Stands in for the package wandb, with its one `run`; its server refuses some modes."""
    service = MagicMock(refused=[])

    def init(*, mode: str | None, id: str | None, **_: Any) -> MagicMock:
        if mode in service.refused:
            raise wandb.errors.CommError("the server does not answer\nand more")
        service.run.id = id
        return service.run

    service.init.side_effect = init
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("login", "init", "teardown"):
        monkeypatch.setattr(wandb, name, getattr(service, name))
    return service


def modes(service: MagicMock) -> list[str | None]:
    return [each.kwargs["mode"] for each in service.init.call_args_list]


@pytest.mark.slow
def test_a_service_that_dies(tmp_path: Path, service: MagicMock) -> None:
    """There is one warning, and nothing else is missing."""
    run, lost = tmp_path / "run", ConnectionResetError("Connection lost")
    service.run.log.side_effect, service.run.finish.side_effect = [*[None] * 5, lost], lost
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_tiny(run, "logger=wandb", "trainer.log_every_n_steps=1")
    (about,) = (str(w.message) for w in caught if "W&B" in str(w.message))
    assert about.startswith("W&B failed (Connection lost); training goes on")
    assert f"upload later with: for run in {run}/wandb/*run-*; do wandb sync" in about
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == ["1", "2", "3", "4"]
    assert (run / "summary.json").is_file()
    assert service.run.log.call_count == 6  # it is not asked again


UNREACHABLE, SHORT = "the server does not answer", "API key must be 40 characters long"


@pytest.mark.parametrize(
    ("login", "refused", "why", "tried"),
    [
        (None, [None], UNREACHABLE, [None, "offline"]),  # so that nothing is lost
        (ValueError(SHORT), [None], SHORT, ["offline"]),
        (None, [None, "offline"], UNREACHABLE, [None, "offline"]),
        (ValueError(SHORT), ["offline"], SHORT, ["offline"]),
    ],
)
def test_a_run_that_cannot_begin_online(
    tmp_path: Path, service: MagicMock, login: Any, refused: list[Any], why: str, tried: list[Any]
) -> None:
    service.login.side_effect, service.refused = login, refused
    helps = pytest.raises(wandb.errors.CommError) if "offline" in refused else nullcontext()
    with pytest.warns(UserWarning, match=rf"^W&B failed \({why}\); training goes on"), helps:
        TolerantWandbLogger(save_dir=tmp_path)
    assert modes(service) == tried
    service.login.assert_called_once_with(prompt=False)  # nobody sits there


@pytest.mark.skipif(os.name == "nt", reason="there, the command is one of PowerShell")
def test_not_logged_in(
    tmp_path: Path, service: MagicMock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each W&B run in the folder is uploaded, also after one that is damaged."""
    service.login.return_value = False
    folder = tmp_path / "a run"
    logger = TolerantWandbLogger(save_dir=folder)
    assert modes(service) == ["offline"]
    assert logger.experiment is service.run
    _, _, command = capsys.readouterr().out.partition("upload later with: ")
    fake = tmp_path / "wandb"  # the program, which ends at the first of the runs
    fake.write_text('#!/bin/sh\necho "$@" >> "$0".log\nexit 1\n')
    fake.chmod(0o755)
    for name in ("run-1-killed", "offline-run-2", "offline-run-3"):
        (folder / "wandb" / name).mkdir(parents=True)
    subprocess.run(["sh", "-c", command], env={"PATH": f"{tmp_path}:{os.defpath}"}, check=False)
    synced = (tmp_path / "wandb.log").read_text().splitlines()
    names = ("offline-run-2", "offline-run-3", "run-1-killed")
    assert synced == [f"sync --include-online {folder}/wandb/{name}" for name in names]


def test_a_service_that_dies_after_its_start(tmp_path: Path, service: MagicMock) -> None:
    service.run.define_metric.side_effect = ConnectionResetError("Connection lost")
    with pytest.warns(UserWarning, match=r"^W&B failed \(Connection lost\); training goes on"):
        logger = TolerantWandbLogger(save_dir=tmp_path)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    service.run.log.assert_not_called()


def test_mode_of_the_environment(
    tmp_path: Path, service: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named to `wandb.init`, which does not look again in a process that had a run before."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    TolerantWandbLogger(save_dir=tmp_path)
    assert modes(service) == ["disabled"]
    service.login.assert_not_called()


@pytest.mark.slow
def test_what_a_run_gets(
    tmp_path: Path, service: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id, settings and metrics; with log_model both checkpoints, before it ends."""
    monkeypatch.setenv("WANDB_RUN_ID", "from_agent")
    run, wb, elsewhere = tmp_path / "run", service.run, tmp_path / "wandb_files"
    given = ("project=mine", "group=ours", "tags=[a]", "log_model=true", f"save_dir={elsewhere}")
    train_tiny(run, "trainer.max_steps=1", "logger=wandb", *(f"logger.wandb.{o}" for o in given))
    expected = {"id": "from_agent", "resume": "allow", "dir": str(elsewhere), "project": "mine"}
    expected |= {"group": "ours", "name": "tiny", "tags": ["a"], "notes": None}
    assert service.init.call_args.kwargs.items() >= expected.items()
    assert wb.config.update.call_args.args[0]["trainer"]["val_check_interval"] == 2
    assert wb.log.call_args_list[0].args[0]["train/loss_smooth"] > 0
    step = {"step_metric": "trainer/global_step", "step_sync": True}
    wb.define_metric.assert_any_call("*", **step)
    for name, best in SUMMARIES.items():
        wb.define_metric.assert_any_call(name, summary=best, **step)
    assert wb.method_calls[-3:] == [
        call.log_model(file(run), name="model-from_agent", aliases=[file(run).stem, "latest"])
        for file in (last_checkpoint, best_checkpoint)
    ] + [call.finish(exit_code=0)]

    monkeypatch.delenv("WANDB_RUN_ID")
    changes = ["trainer.max_steps=2", "logger.wandb.log_model=false", "logger.wandb.save_dir=null"]
    train(resumed_config(run, changes), run)
    assert service.init.call_args.kwargs["dir"] == str(run)
    assert OmegaConf.load(run / "config.yaml").logger.wandb.save_dir is None  # it may be moved
    assert service.init.call_args.kwargs["id"] == "from_agent"
    assert wb.log_model.call_count == 2  # none more
    with pytest.raises(ConfigError, match=r"^log_model=yes: must be true or false"):
        TolerantWandbLogger(save_dir=tmp_path, log_model="yes")  # type: ignore[arg-type]


def test_tags(tmp_path: Path, service: MagicMock) -> None:
    """A single one would be read as a list of its letters."""
    for tags, expected in ((None, []), (["a", "b"], ["a", "b"])):
        TolerantWandbLogger(save_dir=tmp_path, tags=tags)
        assert service.init.call_args.kwargs["tags"] == expected
    for tags in ("baseline", 3):
        wanted = rf"^tags={tags}: must be null or a list such as \[a,b\]$"
        with pytest.raises(ConfigError, match=wanted):
            TolerantWandbLogger(save_dir=tmp_path, tags=tags)  # type: ignore[arg-type]


def test_settings_of_the_agent_take_what_the_sweep_sets() -> None:
    """Those in docs/training.md, with values of each parameter of conf/wandb_sweep.yaml."""
    text = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"settings = \[(.*), f\"logger", text)
    settings = [word.strip('" ') for word in listed.split(",")]
    for name, values in OmegaConf.load(PROJECT / "conf" / "wandb_sweep.yaml").parameters.items():
        value = values["min"] if "min" in values else values["values"][0]
        cfg = compose([*settings, f"{name}={value}"])
        assert OmegaConf.select(cfg, str(name)) == value


@pytest.mark.slow
def test_agent_that_calls_a_function(
    tmp_path: Path, service: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of docs/training.md for notebooks, with W&B's agent, which starts a thread."""
    text = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "agent" in part)
    tiny = [o for o in TINY if o not in ("logger=none", "name=tiny")]
    block = block.replace('"model=fcn8s"', ", ".join(map(repr, tiny)))
    trial = SimpleNamespace(id="abc", config={"optimizer.lr": 0.5, "model.dropout": 0.1})

    def init(**options: Any) -> Any:
        return service.init(**options) if options else trial

    def agent(sweep: str, *, function: Callable[[], None], count: int) -> None:
        assert (sweep, count) == ("USER/fcn/ID", 10)
        with ThreadPoolExecutor(1) as threads:
            threads.submit(function).result()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "agent", agent, raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    exec(block, {})
    assert signal.getsignal(signal.SIGTERM) == before
    run, options = tmp_path / "runs" / "agent" / "abc", service.init.call_args.kwargs
    config = OmegaConf.load(run / "config.yaml")
    assert (config.optimizer.lr, config.model.dropout) == (0.5, 0.1)
    assert (run / "summary.json").is_file()
    assert (options["id"], options["settings"].reinit) == ("abc", "return_previous")
    service.run.finish.assert_called_once_with(exit_code=0)
