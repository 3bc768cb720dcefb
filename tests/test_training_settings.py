"""Settings: what is in conf/ is accepted, and what cannot work is named before anything runs."""

import inspect
import re
from itertools import zip_longest
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
    trial = {"optimizer": optimizer, "total_steps": 1, "time_used": lambda: 0}
    cli.build(cfg, "scheduler", _partial_=False, **trial)
    names = list(cli.build(cfg, "data").classes)
    with torch.device("meta"):
        cli.build(cfg, "model", weights=None, class_names=names)


@pytest.fixture(scope="module")
def defaults() -> DictConfig:
    cfg = compose_config("train", "name=test", "data=shapes", "model.backbone=vgg_tiny")
    OmegaConf.set_struct(cfg, False)  # which takes new keys
    return cfg


def changed(cfg: DictConfig, changes: str) -> DictConfig:
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(changes.split()))  # type: ignore[return-value]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (PROJECT / "conf" / group).glob("*.yaml"))


# The first options of all groups, then the second ones, and so on; recipes: test_recipes.
CHOICES = [
    " ".join(filter(None, choices))
    for choices in zip_longest(*([f"{g}={name}" for name in options(g)] for g in GROUPS))
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random values cost most, and are not looked at here."""
    monkeypatch.setattr(FCN, "reset_parameters", lambda self: None)


@pytest.mark.slow
@pytest.mark.parametrize("choices", CHOICES)
def test_everything_in_conf_is_accepted(choices: str) -> None:
    own = ["data.dataset.classes=[a,b]"] if "data=folder" in choices else []
    check(compose_config("train", "name=test", "model.backbone=vgg_tiny", *choices.split(), *own))


def test_help_lists_real_groups_only() -> None:
    folders = {path.name for path in (PROJECT / "conf").iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment"}
    assert not [name for group in folders for name in options(group) if name.startswith("_")]


STATISTICS = "callbacks.loss_statistics"
BAD_VALUES: list[tuple[Any, str]] = [
    (0, "optimizer.lr trainer.max_steps trainer.max_epochs trainer.val_check_interval"),
    (0, "trainer.accumulate_grad_batches trainer.gradient_clip_val trainer.min_steps"),
    (0, f"trainer.limit_val_batches {STATISTICS}.half_life {STATISTICS}.window"),
    (0, "callbacks.last_checkpoint.every_n_steps"),
    (-1, "seed optimizer.weight_decay scheduler.warmup_steps callbacks.panels.images"),
    (-2, "trainer.max_steps trainer.num_sanity_val_steps"),
    (1, "optimizer.momentum trainer.enable_progress_bar"),
    (0.5, "seed data.seed"),
    (None, "data.val_split trainer.max_steps"),
    ("yes", "optimizer.lr data.batch_size trainer.deterministic trainer.benchmark"),
    ("no", "trainer.detect_anomaly"),
    *((float(number), "optimizer.lr") for number in ("nan", "inf")),
    *((name, "name") for name in ("", "..", "a/b", "a?", "a.")),
    *((time, "trainer.max_time") for time in ("15min", "00:00:00:00")),
    (2**32, "seed"),
    (21, "model.num_classes"),  # the data has 8
    (257, "trainer.devices"),
    ("vgg19_bn", "model.backbone"),
    ("fp8", "trainer.precision"),
    ("xla", "trainer.profiler"),
]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for value, keys in BAD_VALUES for key in keys.split()]
)
def test_bad_value_is_named(key: str, value: Any, defaults: DictConfig) -> None:
    cfg = defaults.copy()
    OmegaConf.update(cfg, key, value)
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    message = str(caught.value)
    assert message.startswith(f"{key}={'null' if value is None else value}: must be ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "optimizer.dampening=1 optimizer.nesterov=true",
            "optimizer: Nesterov momentum requires.*",
        ),
        ("trainer.devices=0", "trainer: .*devices=0.*"),
        ("trainer.devices=two", "trainer: .*`devices` .*"),
        ("trainer.accelerator=gpuu", "trainer: .*accelerator.*gpuu.*"),
        ("trainer.strategy=ddpp", "trainer: .*strategy.*ddpp.*"),
        ("trainer.patience=3", "trainer.patience: Trainer has no such argument"),
        ("trainer.gradient_clip_algorithm=value", ".*=value: needs trainer.gradient_clip_val"),
        ("optimizer.lr='1e-4'", "optimizer.lr=1e-4: must be .*, but is a text; remove the quotes"),
        ("data.batch_size='4'", "data.batch_size=4: must be .*is a text; remove the quotes"),
        ("optimizer.betas=[0.9,1]", r"optimizer.betas=\[0.9, 1\]: must be two numbers, .*"),
        ("data=voc", "data='voc'.*conf/data/"),
        ("trainer=voc", "trainer='voc'.*conf/trainer/"),
        ("trainer.max_steps=-1", "training would never end: set trainer.max_steps, .*"),
        ("model.fusion=feature model.learn_upsampling=false", ".*=false: must be true with .*"),
        (
            "trainer.accelerator=cpu trainer.precision=16-mixed",
            "trainer.precision=16-mixed: must be 32-true or bf16-mixed on the device cpu",
        ),
    ],
)
def test_what_is_wrong(changes: str, message: str, defaults: DictConfig) -> None:
    """In one line, also where torch or Lightning refuses what this project does not know."""
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        check(changed(defaults, changes))
    assert len(str(caught.value).splitlines()) == 1


def test_name_that_is_a_number(defaults: DictConfig) -> None:
    with pytest.raises(ConfigError, match=r"^name=2024: must be a text, not a number") as caught:
        check(changed(defaults, "name=2024"))
    (advice,) = re.findall(r'as in "(.*)"$', str(caught.value))
    assert cli.compose([advice]).name == "2024"
    with pytest.raises(ConfigError, match=r"^name=100000\.0: .*: write it in quotes, as in"):
        check(changed(defaults, "name=1e5"))


@pytest.mark.parametrize(
    "changes",
    [
        "data.batch_size=7 data.crop_size=[224,320] data.scale=[0.5,2] data.jitter=null "
        "model.num_classes=8 optimizer.lr=1 trainer.max_time='00:00:15:00' trainer.devices=2 "
        "trainer.min_steps=3 trainer.inference_mode=false trainer.num_sanity_val_steps=-1 "
        "trainer.limit_val_batches=0.5 trainer.deterministic=warn callbacks.panels.images=0",
        "data.batch_size=auto trainer.max_steps=-1 trainer.max_time.minutes=15 "
        "trainer.devices=auto callbacks.panels=null model.fusion=feature",
        "trainer.max_steps=-1 trainer.max_epochs=2 trainer.accelerator=cpu "
        "trainer.precision=bf16-mixed",
        "trainer.precision=64-true trainer.accelerator=cpu",
    ],
)
def test_good_values_pass(changes: str, defaults: DictConfig) -> None:
    check(changed(defaults, changes))


def test_every_argument_of_lightnings_trainer(defaults: DictConfig) -> None:
    """Each is a setting of ours, or passed on, or refused with the reason."""
    passed_on = {"detect_anomaly", "gradient_clip_algorithm", "inference_mode", "min_steps"}
    passed_on |= {"num_nodes", "num_sanity_val_steps", "strategy"}
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert arguments - set(defaults.trainer) - passed_on == set(NOT_TAKEN)
    for name in NOT_TAKEN:
        with pytest.raises(ConfigError, match=rf"^trainer\.{name} is not a setting of a run: ."):
            check(changed(defaults, f"trainer.{name}=null"))
