"""Sweeps: crashes, a second start, table and figure, W&B's sweeps, launchers in other processes."""

import csv
import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT, TINY
from forks import fork
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf
from test_figures_curves import catch_figures
from test_runs_launch import call

import train
from fcn import cli, files
from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.errors import ConfigError, Stopped
from fcn.files import write_json
from fcn.module import SegmentationModule
from fcn.runs import sweep as sweeps
from fcn.runs.folder import lock_run
from fcn.runs.metrics import read_metrics

Job = Callable[[Path | None], None]
SWEPT = ("name=", "optimizer.lr=")  # settings that the sweeps choose
TINY_JOB = [*(o for o in TINY if not o.startswith(SWEPT)), "callbacks.curves=null"]


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_crashed_job_goes_on_when_the_sweep_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = SegmentationModule.training_step

    def crash(self: SegmentationModule, *args: Any) -> Any:
        if self.trainer.global_step == 2 and self.trainer.optimizers[0].defaults["lr"] == 1e-2:
            raise RuntimeError("the disk is\nfull")
        return step(self, *args)

    monkeypatch.chdir(tmp_path)
    command = ["-m", *TINY_JOB, "optimizer.lr=1e-2,1e-3", "trainer.max_steps=3"]
    command += ["callbacks.last_checkpoint.every_n_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", crash)
        assert call(train.main, *command) == 1
    (sweep,) = (tmp_path / "runs" / "sweep").iterdir()
    first, second = table(sweep)
    assert (first["status"], second["status"]) == ("crashed", "finished")
    assert first["error"] == "RuntimeError: the disk is full"
    assert "in crash" in (sweep / "0" / "error.txt").read_text()
    assert "1 crashed, 1 finished" in capsys.readouterr().out
    before = read_metrics(sweep / "0" / "metrics.csv")
    summary = (sweep / "1" / "summary.json").stat().st_mtime_ns

    assert call(train.main, *command) == 0
    assert list((tmp_path / "runs" / "sweep").iterdir()) == [sweep]
    assert [row["status"] for row in table(sweep)] == ["finished", "finished"]
    assert (sweep / "1" / "summary.json").stat().st_mtime_ns == summary
    assert f"{sweep.relative_to(tmp_path)}/1: finished before" in capsys.readouterr().out
    after = read_metrics(sweep / "0" / "metrics.csv")
    assert [row["step"] for row in after] == ["1", "2", "3"]
    assert after[:1] == before[:1]  # speed included: this step has not been made again
    assert not (sweep / "0" / "error.txt").exists()
    assert (sweep / "sweep.png").is_file()
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"0", "1"}


def crash_with(error: BaseException) -> Job:
    def train(earlier: Path | None) -> None:
        assert earlier is None
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("a\nb"), "RuntimeError: a b"),
        (SystemExit(3), "SystemExit: 3"),
        (ConfigError("a.b=1: must be 2"), "a.b=1: must be 2"),
    ],
)
def test_crash_is_written_down(tmp_path: Path, error: BaseException, reason: str) -> None:
    overrides = ["a=1", "b='x: ${y}'"]
    for _ in range(2):  # a second start leaves one folder and one row
        (tmp_path / "7").mkdir(exist_ok=True)  # as Hydra does
        sweeps.run_job(tmp_path / "7", overrides, crash_with(error))
    assert sweeps.find_job(tmp_path, overrides) == tmp_path / "7"
    text = (tmp_path / "7" / "error.txt").read_text()
    assert ("Traceback" in text) == (not isinstance(error, ConfigError))
    (row,) = table(tmp_path)
    assert row == {"run": "7", "status": "crashed", "a": "1", "b": "'x: ${y}'", "error": reason}
    assert not sweeps.resumable(tmp_path / "7")
    assert not (tmp_path / "7").exists()


def test_crash_takes_no_other_jobs_folder(tmp_path: Path) -> None:
    """A larger grid in the same folder: the number is another job's."""
    write_run(tmp_path / "0", ["a=1"], status="finished")
    sweeps.run_job(tmp_path / "0", ["a=2"], crash_with(ConfigError("no")))
    assert [row["status"] for row in table(tmp_path)] == ["finished", "crashed"]
    assert sweeps.find_job(tmp_path, ["a=2"]) == tmp_path / "0_2"


def test_interrupted_sweep_ends(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), Stopped(signal.SIGTERM, 3)):
        end = SystemExit(1)
        end.__context__ = error  # Lightning and train.py turn it into an exit code
        with pytest.raises(SystemExit):
            sweeps.run_job(tmp_path / "0", ["a=1"], crash_with(end))
    assert not (tmp_path / "0").exists()


def test_job_that_runs_elsewhere_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint or without one, another process trains it."""
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    write_run(tmp_path / "0", ["a=1"])
    with lock_run(tmp_path / "0"):
        sweeps.run_job(tmp_path / "0", ["a=1"], crash_with(AssertionError()))
        (tmp_path / "0" / "checkpoints").mkdir()
        last_checkpoint(tmp_path / "0").touch()

        def resume(earlier: Path | None) -> None:
            assert earlier is not None
            with lock_run(earlier):
                pass

        sweeps.run_job(tmp_path / "0", ["a=1"], resume)
    assert capsys.readouterr().out.count("is being trained by process") == 2
    assert [row["status"] for row in table(tmp_path)] == ["unfinished"]
    assert last_checkpoint(tmp_path / "0").exists()


def test_a_job_with_its_best_checkpoint_alone(tmp_path: Path) -> None:
    """With callbacks.last_checkpoint=null, or if somebody has removed the other."""
    write_run(tmp_path / "0", ["a=1"])
    (tmp_path / "0" / "checkpoints").mkdir()
    best_checkpoint(tmp_path / "0").touch()
    assert sweeps.resumable(tmp_path / "0")
    assert best_checkpoint(tmp_path / "0").exists()


def test_two_sweeps_in_one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    setup_globals()  # Hydra's resolver of ${now:...}
    folders = []
    for rate in (1, 2):
        sweep = {"dir": f"{tmp_path}/a/${{now:%Y}}"}
        hydra = {"sweep": sweep, "overrides": {"task": [f"lr={rate},3"], "hydra": []}}
        config = OmegaConf.create({"hydra": hydra, "lr": 1e-5})
        sweeps.ContinueSweep().on_multirun_start(config)
        folders.append(Path(config.hydra.sweep.dir))
        assert config.hydra.overrides.hydra == [f"hydra.sweep.dir={folders[-1]}"]
    assert folders[1].name == f"{folders[0].name}_2"
    assert all(folder.is_dir() for folder in folders)
    config.hydra.sweep.dir = str(tmp_path)  # as a file in conf/ may say
    sweeps.ContinueSweep().on_multirun_start(config)
    assert config.hydra.sweep.dir == str(tmp_path)


def test_sweep_is_known_by_command_and_settings(tmp_path: Path) -> None:
    def config(folder: str, *task: str, **settings: Any) -> Any:
        hydra = {"sweep": {"dir": str(tmp_path / folder)}, "overrides": {"task": [*task]}}
        return OmegaConf.create({"hydra": hydra, "lr": 1e-5, "name": "${x}", **settings})

    for folder, task in (("1", "a=1,2"), ("2", "a=1,2"), ("3", "a=1")):
        (tmp_path / folder).mkdir()
        OmegaConf.save(config("elsewhere", task), tmp_path / folder / "multirun.yaml")
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "multirun.yaml").write_text("hydra: {over")
    assert sweeps.find_sweep(config("new", "a=1,2")) == tmp_path / "2"
    assert sweeps.find_sweep(config("new", "a=1,2", "b=3")) is None
    assert sweeps.find_sweep(config("new", "a=1,2", lr=1e-4)) is None  # in a file of conf/
    assert sweeps.find_sweep(config("none/new", "a=1,2")) is None


def write_run(run: Path, overrides: list[str], **summary: Any) -> None:
    run.mkdir()
    OmegaConf.save(OmegaConf.create(overrides), run / "overrides.yaml")
    if summary:
        write_json(run / "summary.json", summary)


def test_sweep_table(tmp_path: Path) -> None:
    notes = "what I tried, at length: " + "a word and another, " * 9 + "x=1"
    jobs: list[list[str]] = [[f"optimizer.lr={10.0**-n}", "model=fcn8s"] for n in range(12)]
    jobs[3] = ["data.scale=[0.5,2.0]", "data.root='a: b'", f"logger.wandb.notes={notes}"]
    jobs[3] += ["~logger", "name=${x}"]
    for number, overrides in enumerate(jobs):
        summary = {"status": "finished", "steps": 3, "val/miou": 0.5 if number else math.nan}
        summary |= {"val/iou/cat": 0.25, "versions": {"torch": "2"}, "device": "cpu"}
        # The last one was killed.
        write_run(tmp_path / str(number), overrides, **(summary if number < 11 else {}))
    (tmp_path / "multirun.yaml").touch()
    (tmp_path / "other").mkdir()

    for _ in range(2):  # as each job does
        sweeps.write_results(tmp_path)
    rows = table(tmp_path)
    assert [row["run"] for row in rows] == [str(number) for number in range(12)]
    assert [row["status"] for row in rows] == ["finished"] * 11 + ["unfinished"]
    assert [row["val/miou"] for row in rows] == ["", *["0.5"] * 10, ""]
    assert rows[1]["optimizer.lr"] == "0.1"
    texts = {"data.scale": "[0.5,2.0]", "data.root": "'a: b'", "name": "${x}"}
    texts["logger.wandb.notes"] = f"'{notes}'"
    assert {name: rows[3][name] for name in texts} == texts
    numbers = {"run", "status", "optimizer.lr", "model", "steps", "val/miou"}
    assert set(rows[0]) == numbers | texts.keys()
    assert not (tmp_path / "sweep.png").exists()  # no run has a best score


def test_sweep_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = catch_figures(monkeypatch)
    grid = itertools.product(("fcn32s", "fcn8s"), ("1e-3", "1e-5"), (0, 1))
    scores = (0.1, 0.4, 0.2, 0.3, 0.6, 0.5, 0.7, 0.9)
    for number, ((model, lr, seed), score) in enumerate(zip(grid, scores, strict=True)):
        overrides = [f"model={model}", f"optimizer.lr={lr}", f"seed={seed}", "data=x"]
        best = {"best/val/miou": score}
        write_run(tmp_path / str(number), overrides, status="finished", **best)
    write_run(tmp_path / "8", ["model=fcn8s", "optimizer.lr=1", "seed=0", "data=x"])  # killed
    sweeps.write_results(tmp_path)
    assert (tmp_path / "sweep.png").read_bytes()[1:4] == b"PNG"
    models, rates, seeds = figures[0].axes  # data is the same in all
    assert [axes.get_title() for axes in figures[0].axes] == ["model", "optimizer.lr", "seed"]
    assert [t.get_text() for t in models.get_xticklabels()] == ["fcn32s", "fcn8s"]
    assert models.lines[0].get_ydata() == pytest.approx([0.25, 0.65])  # medians
    assert rates.lines[0].get_xdata() == pytest.approx([1e-5, 1e-3])
    assert rates.lines[0].get_ydata() == pytest.approx([0.5, 0.45])
    assert (rates.get_xscale(), seeds.get_xscale()) == ("log", "linear")
    assert [len(axes.collections[0].get_offsets()) for axes in figures[0].axes] == [8, 8, 8]


class FakeProcess:
    """Stands for the process that W&B's agent starts: notes how."""

    def __init__(self, started: dict[str, Any], how: dict[str, Any]) -> None:
        started.update(how)


@pytest.mark.slow
def test_wandb_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file passes W&B's own schema; what its agent starts is a run under the agent's id."""
    engine = pytest.importorskip("sweeps")  # of wandb[sweeps]
    text = (PROJECT / "conf" / "wandb_sweep.yaml").read_text()
    sweep = yaml.safe_load(text)
    assert engine.schema_violations_from_proposed_config(sweep) == []
    assert engine.schema_violations_from_proposed_config(yaml.safe_load(text.replace("3", "-3")))
    assert sweep["metric"] == {"name": "val/miou", "goal": "maximize"}
    assert (PROJECT / sweep["program"]).is_file()
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    chosen = engine.next_run(sweep, [], validate=True).config
    arguments = json.loads(json.dumps(chosen, default=float))  # as they come from W&B's server
    assert arguments.keys() == sweep["parameters"].keys()

    import wandb
    from wandb.wandb_agent import Agent

    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # a service that another test has started knows nothing of this environment
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "thesweep")
    agent = Agent(None, None)
    tiny = [o for o in TINY if o.partition("=")[0] not in arguments and o != "logger=none"]
    agent._sweep_command = [*sweep["command"], *tiny, "trainer.max_steps=1"]
    started: dict[str, Any] = {}
    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", lambda **how: FakeProcess(started, how))
    program = str(PROJECT / sweep["program"])
    agent._command_run({"run_id": "therun", "program": program, "args": arguments})
    assert started["command"][:3] == ["/usr/bin/env", "python", program]
    os.environ.update(started["env"])  # conftest.py undoes this
    assert call(train.main, *started["command"][3:]) == 0
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    config = OmegaConf.load(run / "config.yaml")
    assert config.logger.wandb.id == "therun"  # also when it is resumed without the agent
    for key, value in arguments.items():
        assert OmegaConf.select(config, key) == value["value"]
    wandb.teardown()  # W&B's service writes its file by then
    (offline,) = (run / "wandb").glob("offline-run-*-therun")
    assert b"thesweep" in next(offline.glob("*.wandb")).read_bytes()
    config = cli.compose([*(f"{key}={one['value']}" for key, one in chosen.items()), "name=x"])
    for key, one in chosen.items():
        assert OmegaConf.select(config, key) == one["value"], key


def submitted_job(folder: Path) -> None:
    """What submitit does in the process of a job."""
    from submitit.core.submission import process_job

    one_task = {"JOB_ID": str(os.getpid()), "NTASKS": "1", "JOB_NUM_NODES": "1"}
    one_task |= dict.fromkeys(("NODEID", "GLOBALID", "LOCALID"), "0")
    os.environ.update({f"SUBMITIT_LOCAL_{name}": value for name, value in one_task.items()})
    os.environ["SUBMITIT_EXECUTOR"] = "local"
    process_job(folder)


@pytest.mark.slow
def test_jobs_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slurm's: another launcher. Its processes are forked here, and start in the same folder."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from submitit.local.local import LocalExecutor, LocalJob

    def submit(self: LocalExecutor, _: str) -> Any:
        assert os.environ["PYTHONPATH"].startswith(str(PROJECT))  # so that jobs find this code
        process = fork(partial(submitted_job, self.folder), tmp_path / "log")
        monkeypatch.setattr(process, "poll", lambda: process.exitcode, raising=False)
        return LocalJob(self.folder, str(process.pid), tasks=[0], process=process)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalExecutor, "_submit_command", submit)
    monkeypatch.chdir(tmp_path)
    command = ["-m", "hydra/launcher=submitit_local", "optimizer.lr=1e-3,-1", *TINY_JOB]
    assert call(train.main, *command, "trainer.max_steps=1") == 1
    assert "Traceback" not in (tmp_path / "log").read_text()
    (sweep,) = (tmp_path / "runs" / "sweep").iterdir()
    first, second = table(sweep)
    assert (first["status"], first["steps"]) == ("finished", "1")
    assert second["status"] == "crashed"
    assert second["error"] == "optimizer.lr=-1: must be a number above 0"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "log"}
