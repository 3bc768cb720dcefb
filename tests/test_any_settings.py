"""Any value for any setting: a message of at most three lines, or a run that works.

Everything up to the first step is real: checks, data, network, optimizer, schedule, trainer and the
first batches. The choices are Hypothesis's, the same ones at each run of the tests.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY, compose_config
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_config import leaves

from fcn.config import short_messages
from fcn.network import FCN
from train import train

SMALL = [*TINY, "data.dataset.train_length=3", "data.dataset.val_length=2"]
OTHERS = ["optimizer=adamw", "scheduler=cosine", "model=fcn8s", "trainer=ddp"]
OTHERS += [o for o in SMALL if o.startswith(("model.", "trainer.", "optimizer."))]
CONFIGS = [compose_config("train", *SMALL), compose_config("train", *SMALL, *OTHERS)]
# Not drawn: what Hydra calls (a target is the user's own code)
KEYS = [
    [
        key
        for key in leaves(OmegaConf.to_container(cfg))
        if not key.endswith(("_target_", "_partial_"))
    ]  # type: ignore[arg-type]
    for cfg in CONFIGS
]
VALUES: list[Any] = [None, True, False, "", " ", "auto", "-1", "two", "a/b", "../..", "\0", "é\n"]
VALUES += [-1, 0, 1, 2, 5, -0.5, 0.5, 1.5, 10**6, 2**31, 10**12, 10**30, -(10**30)]
VALUES += [1e-300, 1e300, math.nan, math.inf, -math.inf]
VALUES += [[], [1], [0.5, 2], [-1, 1], [1, 1e9], [10**12, 10**12], ["a"], [[1]], {}, {"a": 1}]
VALUES += ["99999999999:00:00:00", "00:00:00:01", "cpu", "gpu", "32-true", "train", "val", "none"]
QUIET = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[*__import__("hypothesis").HealthCheck],
)


def outcome(work: Callable[[], Any]) -> str:
    """What a script would print about an error; empty if all went well."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            with short_messages(HydraException, OmegaConfBaseException):
                work()
    except SystemExit as stop:
        assert stop.code == 1
        message = printed.getvalue()
        error = message[message.index("error: ") :]
        assert 1 <= len(error.strip().splitlines()) <= 3, error
        assert len(error) < 2000, error
        assert len(error) > len("error: ") + 10, error
        return error
    return ""


@pytest.fixture(scope="module")
def until_the_first_step() -> Iterator[None]:
    """`fit` sets all up and takes no step; random values, which cost most, are left out."""
    fit = pl.Trainer.fit

    def prepared(trainer: pl.Trainer, module: Any, *, datamodule: Any, **options: Any) -> None:
        if trainer.world_size == 1:  # more would start processes
            trainer.fit_loop.epoch_loop.max_steps = 0
            fit(trainer, module, datamodule=datamodule, **options)
        next(iter(datamodule.train_dataloader()))
        next(iter(datamodule.val_dataloader()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", prepared)
        patch.setattr(FCN, "reset_parameters", lambda self: None)
        yield
    torch.use_deterministic_algorithms(False)


def with_values(cfg: DictConfig, changes: list[tuple[str, Any]]) -> DictConfig:
    changed = cfg.copy()
    for key, value in changes:
        OmegaConf.update(changed, key, value, merge=False)
    return changed


@st.composite
def changed(draw: st.DrawFn) -> tuple[int, list[tuple[str, Any]]]:
    which = draw(st.integers(0, len(CONFIGS) - 1))
    one = st.tuples(st.sampled_from(KEYS[which]), st.sampled_from(VALUES))
    return which, draw(st.lists(one, min_size=1, max_size=2))


@settings(QUIET, max_examples=300)
@given(changed())
def test_training(until_the_first_step: None, drawn: tuple[int, list[tuple[str, Any]]]) -> None:
    which, changes = drawn
    check_one(CONFIGS[which], changes)


def check_one(cfg: DictConfig, changes: list[tuple[str, Any]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "runs", "x")
        error = outcome(lambda: train(with_values(cfg, changes), run))
        if error and "out of memory" not in error:
            assert not list(Path(folder).rglob("*.*")), error  # nothing is half-written
        return error
