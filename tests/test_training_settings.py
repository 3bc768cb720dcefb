"""Settings: what is in conf/ is accepted, and what cannot work is named before anything runs."""

import inspect
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import PROJECT, compose_config
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback

from fcn import cli
from fcn.errors import ConfigError
from fcn.network import FCN
from fcn.training.settings import NOT_TAKEN, check_settings, dummy_parameters
from fcn.training.trainer import build_trainer

GROUPS = ("model", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger")


def check(cfg: DictConfig) -> None:
    """Everything that refuses a value, as train.py has it, without data and with a tiny network."""
    OmegaConf.resolve(cfg)
    check_settings(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    if cfg.optimizer.get("fused") == "auto":
        cfg.optimizer.fused = None
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = "32-true"
    build_trainer(cfg)
    cli.build_each(cfg, "callbacks", Callback)
    optimizer = cli.build(cfg, "optimizer", _partial_=False, params=dummy_parameters())
    cli.build(
        cfg, "scheduler", _partial_=False, optimizer=optimizer, total_steps=1, time_used=lambda: 0
    )
    names = list(cli.build(cfg, "data").classes)
    with torch.device("meta"):
        cli.build(cfg, "model", weights=None, class_names=names)


@pytest.fixture(scope="module")
def defaults() -> DictConfig:
    return compose_config("train", "name=test", "data=shapes", "model.backbone=vgg_tiny")


def changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    cfg = cfg.copy()
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (PROJECT / "conf" / group).glob("*.yaml"))


CHOICES = [
    f"{group}={name}" for group in GROUPS for name in options(group)
]  # recipes: test_recipes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random values cost most, and are not looked at here."""
    monkeypatch.setattr(FCN, "reset_parameters", lambda self: None)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_everything_in_conf_is_accepted(choice: str) -> None:
    own = ["data.dataset.classes=[a,b]"] if choice == "data=folder" else []
    own += [] if choice.startswith("model") else ["model.backbone=vgg_tiny"]
    check(compose_config("train", "name=test", choice, *own))


def test_help_lists_real_groups_only() -> None:
    folders = {path.name for path in (PROJECT / "conf").iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment"}
    assert not [name for group in folders for name in options(group) if name.startswith("_")]


BAD_VALUES = [
    ("name", ""),
    ("name", "a/b"),
    ("name", ".."),
    ("name", "a:b"),
    ("name", "a?"),
    ("name", "a."),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**32),
    ("data.batch_size", "two"),
    ("data.val_split", None),
    ("data.seed", 1.5),
    ("model.backbone", "vgg19_bn"),
    ("model.num_classes", 21),  # the data has 8
    ("optimizer.lr", 0),
    ("optimizer.lr", -1e-4),
    ("optimizer.lr", "fast"),
    ("optimizer.lr", float("nan")),
    ("optimizer.lr", float("inf")),
    ("optimizer.momentum", 1),
    ("optimizer.weight_decay", -1),
    ("scheduler.warmup_steps", -5),
    ("trainer.max_steps", 0),
    ("trainer.max_steps", -2),
    ("trainer.max_steps", None),
    ("trainer.max_epochs", 0),
    ("trainer.max_time", "15min"),
    ("trainer.max_time", "00:00:00:00"),
    ("trainer.val_check_interval", 0),
    ("trainer.accumulate_grad_batches", 0),
    ("trainer.gradient_clip_val", 0),
    ("trainer.precision", "fp8"),
    ("trainer.devices", 257),
    ("trainer.profiler", "xla"),
    ("trainer.min_steps", 0),
    ("trainer.num_sanity_val_steps", -2),
    ("trainer.detect_anomaly", "no"),
    ("trainer.limit_val_batches", 0),
    ("trainer.deterministic", "yes"),
    ("trainer.benchmark", "yes"),
    ("trainer.enable_progress_bar", 1),
    ("callbacks.loss_statistics.half_life", 0),
    ("callbacks.loss_statistics.window", 0),
    ("callbacks.last_checkpoint.every_n_steps", 0),
    ("callbacks.panels.images", -1),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_bad_value_is_named(key: str, value: Any, defaults: DictConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        check(changed(defaults, key, value))
    message = str(caught.value)
    shown = "null" if value is None else "true" if value is True else value
    assert message.startswith(f"{key}={shown}: must be ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("devices", 0, r"devices=0"),
        ("devices", "two", r"`devices` "),
        ("accelerator", "gpuu", r"accelerator.*gpuu"),
        ("strategy", "ddpp", r"strategy.*ddpp"),
    ],
)
def test_lightning_refuses_the_rest(
    key: str, value: Any, message: str, defaults: DictConfig
) -> None:
    with pytest.raises(ConfigError, match=f"^trainer: .*{message}") as caught:
        check(changed(defaults, f"trainer.{key}", value))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.gradient_clip_algorithm", "value", "=value: needs trainer.gradient_clip_val"),
        ("trainer.patience", 3, ": Trainer has no such argument"),
        ("optimizer.lr", "1e-4", "=1e-4: must be .*, but is a text; remove the quotes"),
        ("data.batch_size", "4", "=4: must be .*, but is a text; remove the quotes"),
    ],
)
def test_what_is_wrong(key: str, value: Any, message: str, defaults: DictConfig) -> None:
    with pytest.raises(ConfigError, match=f"^{key}{message}$"):
        check(changed(defaults, key, value))


def test_precision_that_a_cpu_does_not_have(defaults: DictConfig) -> None:
    cfg = changed(changed(defaults, "trainer.accelerator", "cpu"), "trainer.precision", "16-mixed")
    wanted = "must be 32-true or bf16-mixed on the device cpu"
    with pytest.raises(ConfigError, match=rf"^trainer\.precision=16-mixed: {wanted}$"):
        check(cfg)
    for precision in ("bf16-mixed", "64-true"):
        check(changed(cfg, "trainer.precision", precision))


def test_every_argument_of_lightnings_trainer(defaults: DictConfig) -> None:
    """Each is a setting of ours, or passed on, or refused with the reason."""
    passed_on = {"detect_anomaly", "gradient_clip_algorithm", "inference_mode", "min_steps"}
    passed_on |= {"num_nodes", "num_sanity_val_steps", "strategy"}
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert arguments - set(defaults.trainer) - passed_on == set(NOT_TAKEN)
    for name in NOT_TAKEN:
        with pytest.raises(ConfigError, match=rf"^trainer\.{name} is not a setting of a run: ."):
            check(changed(defaults, f"trainer.{name}", None))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.batch_size", 7),
        ("data.batch_size", "auto"),
        ("data.crop_size", [224, 320]),
        ("data.scale", [0.5, 2]),
        ("data.jitter", None),
        ("model.num_classes", 8),
        ("optimizer.lr", 1),
        ("trainer.max_time", "00:00:15:00"),
        ("trainer.max_time", {"minutes": 15}),
        ("trainer.devices", 2),
        ("trainer.min_steps", 3),
        ("trainer.inference_mode", False),
        ("trainer.num_sanity_val_steps", -1),
        ("trainer.devices", "auto"),
        ("trainer.limit_val_batches", 0.5),
        ("trainer.deterministic", "warn"),
        ("callbacks.panels.images", 0),
        ("callbacks.panels", None),
    ],
)
def test_good_value_passes(key: str, value: Any, defaults: DictConfig) -> None:
    check(changed(defaults, key, value))


@pytest.mark.parametrize("group", GROUPS[:5])
def test_a_group_is_a_table(group: str, defaults: DictConfig) -> None:
    with pytest.raises(ConfigError, match=rf"{group}='voc'.*conf/{group}"):
        check(changed(defaults, group, "voc"))


@pytest.mark.parametrize("end", ["max_steps=9", "max_epochs=2", "max_time='00:01:00:00'"])
def test_every_run_has_an_end(end: str) -> None:
    endless = ["name=x", "scheduler=poly", "trainer.max_steps=-1"]
    with pytest.raises(ConfigError, match=r"training would never end: .*trainer\.max_steps"):
        check_settings(OmegaConf.to_container(compose_config("train", *endless)))  # type: ignore[arg-type]
    cfg = compose_config("train", *endless, f"trainer.{end}")
    check_settings(OmegaConf.to_container(cfg))  # type: ignore[arg-type]


def test_feature_fusion_learns_upsampling(defaults: DictConfig) -> None:
    cfg = changed(defaults, "model.fusion", "feature")
    check(cfg)
    with pytest.raises(ConfigError, match=r"^model\.learn_upsampling=false: must be true with"):
        check(changed(cfg, "model.learn_upsampling", False))


def test_torch_refuses_what_we_do_not_know(defaults: DictConfig) -> None:
    """Any optimizer's own errors are short, and name the group."""
    other = {"_target_": "torch.optim.Adadelta", "_partial_": True, "lr": 0.1, "rho": 2}
    cfg = changed(defaults, "optimizer", other)
    with pytest.raises(ConfigError, match=r"^optimizer: Invalid rho value: 2$"):
        check(cfg)
