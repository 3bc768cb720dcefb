"""W&B that cannot be reached, refuses or dies: training goes on, the CSV is whole, one warning."""

import os
import re
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from conftest import PROJECT, TINY, train_tiny
from omegaconf import OmegaConf

from fcn.errors import ConfigError
from fcn.runs.metrics import read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.wandb_logger import SUMMARIES, TolerantWandbLogger
from train import train


class Experiment:
    """A W&B run that writes down what it gets, and fails from its `fails_after`-th log on."""

    def __init__(self, fails_after: int = 10**6, **options: Any) -> None:
        self.id, self.fails_after, self.options = options["id"], fails_after, options
        self.config, self.logged = self, list[dict[str, Any]]()
        self.metrics, self.ended = dict[str, Any](), list[int]()
        self.models = dict[str, tuple[str, bytes]]()  # by their first alias

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def update(self, settings: Any, **_: Any) -> None:
        self.settings = settings

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)
        if len(self.logged) > self.fails_after:
            raise ConnectionResetError("Connection lost")

    def log_model(self, path: Path, *, name: str, aliases: list[str]) -> None:
        self.models[aliases[0]] = (name, path.read_bytes())

    def finish(self, exit_code: int) -> None:
        if len(self.logged) > self.fails_after:
            raise ConnectionResetError("Connection lost")
        self.ended.append(exit_code)


class Service:
    """Stands in for the package wandb: who may log in, and which modes begin a run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.login: Any = True
        self.begins: tuple[str | None, ...] = (None, "offline")
        self.fails_after = 10**6
        self.modes: list[str | None] = []
        self.runs: list[Experiment] = []
        patch.delenv("WANDB_MODE", raising=False)
        patch.setattr(wandb, "login", self.log_in)
        patch.setattr(wandb, "init", self.init)
        patch.setattr(wandb, "teardown", lambda: None)

    def log_in(self, *, prompt: bool) -> bool:
        assert not prompt  # nobody sits there
        if isinstance(self.login, Exception):
            raise self.login
        return self.login

    def init(self, *, mode: str | None, **options: Any) -> Experiment:
        self.modes.append(mode)
        if mode not in self.begins:
            raise wandb.errors.CommError("the server does not answer\nand more")
        self.runs.append(Experiment(self.fails_after, **options))
        return self.runs[-1]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(monkeypatch)


def warned(run: Path, why: str) -> None:
    """Train with a W&B that fails; there is one warning, and nothing else is missing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_tiny(run, "logger=wandb", "trainer.log_every_n_steps=1")
    about = [str(w.message) for w in caught if "W&B" in str(w.message)]
    assert len(about) == 1, about
    assert about[0].startswith(f"W&B failed ({why}); training goes on")
    assert f"upload later with: for run in {run}/wandb/*run-*; do wandb sync" in about[0]
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == ["1", "2", "3", "4"]
    assert (run / "summary.json").is_file()


@pytest.mark.slow
def test_unreachable(tmp_path: Path, service: Service) -> None:
    service.begins = ("offline",)
    warned(tmp_path / "run", "the server does not answer")
    assert service.modes == [None, "offline"]  # so that nothing is lost
    assert service.runs[0].logged[0]["train/loss_smooth"] > 0
    assert service.runs[0].ended == [0]


@pytest.mark.slow
def test_wrong_key(tmp_path: Path, service: Service) -> None:
    service.login = ValueError("API key must be 40 characters long")
    warned(tmp_path / "run", "API key must be 40 characters long")
    assert service.modes == ["offline"]


@pytest.mark.parametrize("fails_after", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_a_service_that_dies(tmp_path: Path, service: Service, fails_after: int) -> None:
    service.fails_after = fails_after
    warned(tmp_path / "run", "Connection lost")
    assert len(service.runs[0].logged) == fails_after + 1  # it is not asked again


def test_not_logged_in(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each W&B run in the folder is uploaded, also after one that is damaged."""
    service.login = False
    folder = tmp_path / "a run"
    logger = TolerantWandbLogger(save_dir=folder)
    assert service.modes == ["offline"]
    assert logger.experiment is service.runs[0]
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


def test_mode_of_the_environment(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named to `wandb.init`, which does not look again in a process that had a run before."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    service.login = ValueError("must not be asked")
    service.begins = ("disabled",)
    TolerantWandbLogger(save_dir=tmp_path)
    assert service.modes == ["disabled"]


def test_nothing_helps(tmp_path: Path, service: Service) -> None:
    service.begins = ()
    with pytest.warns(UserWarning, match="W&B failed"), pytest.raises(wandb.errors.CommError):
        TolerantWandbLogger(save_dir=tmp_path)


@pytest.mark.slow
def test_what_a_run_begins_with(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "from_agent")
    run = tmp_path / "run"
    one = ("trainer.max_steps=1", "logger=wandb", "logger.wandb.tags=[a]")
    train_tiny(run, *one, "logger.wandb.project=mine", "logger.wandb.group=ours")
    options = service.runs[0].options
    assert (options["id"], options["resume"], options["dir"]) == ("from_agent", "allow", str(run))
    assert (options["project"], options["group"]) == ("mine", "ours")
    assert (options["name"], options["tags"], options["notes"]) == ("tiny", ["a"], None)
    assert service.runs[0].settings["trainer"]["val_check_interval"] == 2
    for name, best in SUMMARIES.items():
        assert service.runs[0].metrics[name]["summary"] == best
        assert service.runs[0].metrics[name]["step_metric"] == "trainer/global_step"
    assert "*" in service.runs[0].metrics

    monkeypatch.delenv("WANDB_RUN_ID")
    assert OmegaConf.load(run / "config.yaml").logger.wandb.save_dir is None  # it may be moved
    train(resumed_config(run, ["trainer.max_steps=2"]), run)
    assert service.runs[1].id == "from_agent"


@pytest.mark.slow
def test_checkpoints_as_artefacts(tmp_path: Path, service: Service) -> None:
    """log_model: both files, as they are at the end of the run; and none without it."""
    run = tmp_path / "run"
    train_tiny(run, "logger=wandb", "trainer.max_steps=2", "logger.wandb.log_model=true")
    (first,) = service.runs
    assert set(first.models) == {"best", "last"}
    for kind, (name, content) in first.models.items():
        assert name == f"model-{first.id}"
        assert content == (run / "checkpoints" / f"{kind}.ckpt").read_bytes()
    assert first.ended == [0]  # after the uploads
    train_tiny(tmp_path / "other", "logger=wandb", "trainer.max_steps=1")
    assert service.runs[1].models == {}
    with pytest.raises(ConfigError, match=r"logger\.wandb\.log_model=yes: must be true or false"):
        train_tiny(tmp_path / "no", "logger=wandb", "logger.wandb.log_model='yes'")


@pytest.mark.slow
def test_artefacts_of_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself keeps a copy in the run folder, for `wandb sync`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    train_tiny(run, "logger=wandb", "trainer.max_steps=2", "logger.wandb.log_model=true")
    kept = {path.read_bytes() for path in (run / "wandb").rglob("*") if path.is_file()}
    assert {path.read_bytes() for path in (run / "checkpoints").iterdir()} <= kept


@pytest.mark.slow
def test_id_is_kept(tmp_path: Path, service: Service) -> None:
    run = tmp_path / "run"
    train_tiny(run, "logger=wandb", "trainer.max_steps=1")
    train(resumed_config(run, ["trainer.max_steps=2"]), run)
    first, second = (experiment.id for experiment in service.runs)
    assert first == second == OmegaConf.load(run / "config.yaml").logger.wandb.id
    assert len(first) == 8


@pytest.mark.slow
def test_agent_that_calls_a_function(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of docs/training.md for notebooks, with W&B's agent, which starts a thread."""
    text = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "agent" in part)
    tiny = [o for o in TINY if o not in ("logger=none", "name=tiny")]
    block = block.replace('"experiment=quickstart"', ", ".join(map(repr, tiny)))
    trial = SimpleNamespace(id="abc", config={"optimizer.lr": 0.5, "model.dropout": 0.1})
    errors: list[BaseException] = []

    def init(**options: Any) -> Any:
        return service.init(**options) if options else trial

    def agent(sweep: str, *, function: Callable[[], None], count: int) -> None:
        assert (sweep, count) == ("USER/fcn/ID", 10)

        def work() -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "agent", agent, raising=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    exec(block, {})
    assert errors == []
    assert signal.getsignal(signal.SIGTERM) == before
    config = OmegaConf.load(tmp_path / "runs" / "agent" / "abc" / "config.yaml")
    assert (config.optimizer.lr, config.model.dropout) == (0.5, 0.1)
    assert (tmp_path / "runs" / "agent" / "abc" / "summary.json").is_file()
    assert service.runs[0].options["id"] == "abc"
    assert service.runs[0].options["settings"].reinit == "return_previous"
    assert service.runs[0].ended == [0]
