"""Any value for any setting: a message of at most three lines, or a run that works.

Most examples meet the checks alone; some go on to the first step, with real data, network,
optimizer, schedule, trainer and batches. The choices are Hypothesis's, the same ones each time.
"""

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY, compose_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from evaluate import evaluate
from export import export
from fcn.checkpoint import best_checkpoint
from fcn.cli import short_messages
from fcn.network import FCN
from predict import predict
from train import train

FEW = ["data.dataset.size=48", "data.dataset.val_length=2", "data.num_workers=0"]
SMALL = [*TINY, *FEW, "data.dataset.train_length=3"]
OTHERS = ["optimizer=adamw", "scheduler=cosine", "model=fcn8s", "trainer=ddp"]
OTHERS += [o for o in SMALL if o.startswith(("model.", "trainer.", "optimizer."))]
CONFIGS = [compose_config("train", *SMALL), compose_config("train", *SMALL, *OTHERS)]
VALUES: list[Any] = [None, True, False, "", " ", "auto", "-1", "two", "a/b", "../..", "\0", "é\n"]
VALUES += [-1, 0, 1, 2, 5, -0.5, 0.5, 1.5, 10**6, 2**31, 10**12, 10**30, -(10**30)]
VALUES += [1e-300, 1e300, math.nan, math.inf, -math.inf]
VALUES += [[], [1], [0.5, 2], [-1, 1], [1, 1e9], [10**12, 10**12], ["a"], [[1]], {}, {"a": 1}]
VALUES += ["99999999999:00:00:00", "00:00:00:01", "cpu", "gpu", "32-true", "train", "val", "none"]
QUIET = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck]
)


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def keys(cfg: DictConfig) -> list[str]:
    """Every setting, but for what Hydra calls: a target is the user's own code."""
    names = leaves(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    return [name for name in names if not name.endswith(("_target_", "_partial_"))]


def outcome(work: Callable[[], Any]) -> str:
    """What a script would print about an error; empty if all went well."""
    printed, code = io.StringIO(), 0
    hidden = contextlib.redirect_stdout(io.StringIO())
    try:
        with hidden, contextlib.redirect_stderr(printed), short_messages():
            work()
    except SystemExit as stop:
        code = int(stop.code or 0)
    if not code:
        return ""
    message = printed.getvalue()
    error = message[message.index("error: ") :]
    assert code == 1
    assert 1 <= len(error.strip().splitlines()) <= 3, error
    assert len("error: ") + 10 < len(error) < 2000, error
    return error


def with_values(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    changed = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(changed, key, value, merge=False)
    return changed


def train_with(cfg: DictConfig, changes: dict[str, Any]) -> str:
    """The error of a run with these values, after which nothing is left."""
    with tempfile.TemporaryDirectory() as folder:
        error = outcome(lambda: train(with_values(cfg, changes), Path(folder, "runs", "x")))
        if error and "out of memory" not in error:  # that is found when the run has begun
            assert not list(Path(folder).glob("runs/*")), error
        return error


# Odd values that are accepted: what is refused for another value is refused for its value.
ODD = {"data.batch_size": 5, "data.crop_size": [1, 40], "data.flip": 0, "data.scale": [0.5, 2]}
ODD |= {"data.limit": 1, "model.head_width": 1, "seed": 2**31, "optimizer.lr": 1e-300}
ODD |= {"callbacks.loss_statistics.half_life": 1e-300, "callbacks.panels.images": 10**6}
ODD |= {"trainer.max_steps": 2, "trainer.val_check_interval": 10**6}
ODD |= {"trainer.log_every_n_steps": 2**31 - 1, "trainer.max_time": "0:00:01:00"}


@pytest.mark.slow
def test_two_steps(tmp_path: Path) -> None:
    assert outcome(lambda: train(with_values(CONFIGS[0], ODD), tmp_path / "run")) == ""
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` sets all up and takes no step; random values, which cost most, are left out."""
    fit = pl.Trainer.fit

    def prepared(trainer: pl.Trainer, module: Any, *, datamodule: Any, **options: Any) -> None:
        if trainer.world_size == 1:  # more would start processes
            trainer.fit_loop.epoch_loop.max_steps = 0
            fit(trainer, module, datamodule=datamodule, **options)
        next(iter(datamodule.train_dataloader()))
        next(iter(datamodule.val_dataloader()))

    @settings(QUIET, max_examples=50)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        cfg = data.draw(st.sampled_from(CONFIGS))
        key, value = st.sampled_from(keys(cfg)), st.sampled_from(VALUES)
        train_with(cfg, data.draw(st.dictionaries(key, value, min_size=1, max_size=2)))

    monkeypatch.setattr(pl.Trainer, "fit", prepared)
    monkeypatch.setattr(FCN, "reset_parameters", lambda self: None)
    assert train_with(CONFIGS[0], ODD | {"optimizer.lr": 1e300}) == ""
    try:
        one()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("script", [predict, export, evaluate])
def test_other_scripts(
    script: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {predict: [f"input={tmp_path}/photo.png"], export: ["format=safetensors"]}
    options = own.get(script, ["data=shapes", *FEW])
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))  # output=null writes into it
    ckpt = f"ckpt={best_checkpoint(run)}"
    cfg = compose_config(script.__name__, ckpt, "output=out", *options)
    Image.new("RGB", (20, 16)).save(tmp_path / "photo.png")
    folder = tmp_path / "a" / "b" / "c"  # an `output` of ../.. is in tmp_path too
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)

    @settings(QUIET, max_examples=20)
    @given(st.sampled_from(keys(cfg)), st.sampled_from(VALUES))
    def one(key: str, value: Any) -> None:
        outcome(lambda: script(with_values(cfg, {key: value})))

    one()
