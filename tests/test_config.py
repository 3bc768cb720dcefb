"""Settings: what is in conf/ is accepted, and what cannot work is named before anything runs."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fcn.config import RULES, check_training, check_values, short_messages
from fcn.errors import ConfigError, DataError

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = ("model", "data", "optimizer", "scheduler", "trainer", "logger", "callbacks")
# Settings without a rule: import paths, the data sets' own arguments, and W&B's texts.
FREE = ("trainer.strategy", "_target_", "_partial_", "data.dataset", "logger")


def composed(*overrides: str) -> dict[str, Any]:
    """As train.py sees it; `name` comes from Hydra at run time."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["++name=test", *overrides])
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def options(group: str) -> list[str]:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in names if not name.startswith("_")]  # parts of others


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    return composed()


@pytest.fixture(scope="module")
def every_choice() -> list[dict[str, Any]]:
    choices = [f"{group}={name}" for group in GROUPS for name in options(group)]
    choices += [f"experiment={name}" for name in options("experiment")]
    more = {"scheduler=poly": ["optimizer=adamw"], "scheduler=cosine": ["data=shapes"]}
    return [composed(choice, *more.get(choice, [])) for choice in choices]


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *groups, name = key.split(".")
    section = config
    for group in groups:
        section = section[group]
    section[name] = value
    return config


def test_everything_in_conf_is_accepted(every_choice: list[dict[str, Any]]) -> None:
    assert len(every_choice) >= 12
    for config in every_choice:
        check_training(config)


def test_no_rule_is_stale(every_choice: list[dict[str, Any]]) -> None:
    known = set(itertools.chain.from_iterable(map(leaves, every_choice)))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        others = (compose("evaluate", ["data=shapes"]), compose("predict"), compose("export"))
    for cfg in others:
        known |= set(leaves(OmegaConf.to_container(cfg)))
    known |= {key.rpartition(".")[0] for key in known}  # groups in groups: trainer.strategy
    assert set(RULES) - known == set()


def test_every_setting_has_a_rule(every_choice: list[dict[str, Any]]) -> None:
    known = set(itertools.chain.from_iterable(map(leaves, every_choice)))
    free = {k for k in known if k.startswith(FREE) or k.rpartition(".")[2] in FREE}
    assert known - set(RULES) - free == set()


BAD_VALUES = [
    ("name", ""),
    ("name", "a/b"),
    ("name", ".."),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**32),
    ("data.batch_size", -2),
    ("data.batch_size", 0),
    ("data.batch_size", 2.5),
    ("data.batch_size", True),
    ("data.batch_size", "two"),
    ("data.batch_size", None),
    ("data.num_workers", -1),
    ("data.limit", 0),
    ("data.crop_size", 0),
    ("data.crop_size", [224]),
    ("data.scale", [2.0, 0.5]),
    ("data.scale", [0, 1]),
    ("data.scale", 0.5),
    ("data.flip", 1.5),
    ("data.jitter", -0.1),
    ("data.download", "yes"),
    ("data.root", " "),
    ("data.val_split", None),
    ("data.seed", 1.5),
    ("model.stride", 4),
    ("model.stride", "8"),
    ("model.backbone", "resnet50"),
    ("model.backbone", "vgg19_bn"),
    ("model.weights", ""),
    ("model.weights", True),
    ("model.num_classes", 1),
    ("model.head_width", 0),
    ("model.head_kernel", 4),
    ("model.dropout", 1.0),
    ("model.pooling", "median"),
    ("model.fusion", "concat"),
    ("model.pool_scales", [1.0, 1.0]),
    ("model.learn_upsampling", "no"),
    ("model.freeze_stages", 6),
    ("model.freeze_stages", True),
    ("model.head_lr_multiplier", 0),
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
    ("trainer.devices", 0),
    ("trainer.limit_val_batches", 0),
    ("trainer.deterministic", "yes"),
    ("trainer.enable_progress_bar", 1),
    ("callbacks.half_life", 0),
    ("callbacks.window", 0),
    ("callbacks.checkpoint_every_n_steps", 0),
    ("callbacks.panel_images", -1),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_bad_value_is_named(key: str, value: Any, defaults: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_values(changed(defaults, key, value))
    message = str(caught.value)
    shown = "null" if value is None else "true" if value is True else value
    assert message.startswith(f"{key}={shown}: must be ")
    assert message.endswith(RULES[key][1])
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.batch_size", 7),
        ("data.crop_size", [224, 320]),
        ("data.scale", [0.5, 2]),
        ("data.jitter", None),
        ("model.weights", "vgg19.pth"),
        ("model.num_classes", 21),
        ("optimizer.lr", 1),
        ("trainer.max_time", "00:00:15:00"),
        ("trainer.max_time", {"minutes": 15}),
        ("trainer.devices", [0, 1]),
        ("trainer.devices", "auto"),
        ("trainer.limit_val_batches", 0.5),
        ("trainer.deterministic", "warn"),
    ],
)
def test_good_value_passes(key: str, value: Any, defaults: dict[str, Any]) -> None:
    check_training(changed(defaults, key, value))


def test_part_of_a_config_may_be_checked() -> None:
    check_values({"seed": 1, "data": {"batch_size": 2}})
    with pytest.raises(ConfigError, match=r"data='voc'.*conf/data"):
        check_values({"data": "voc"})


def test_training_must_end(defaults: dict[str, Any]) -> None:
    endless = changed(defaults, "trainer.max_steps", -1)
    with pytest.raises(ConfigError, match=r"never end: .*trainer\.max_steps"):
        check_training(endless)
    for key, value in (("max_epochs", 3), ("max_time", "00:01:00:00")):
        check_training(changed(endless, f"trainer.{key}", value))


@pytest.mark.parametrize("end", ["max_steps=9", "max_epochs=2", "max_time='00:01:00:00'"])
def test_every_run_has_an_end(end: str) -> None:
    endless = ["scheduler=poly", "trainer.max_steps=-1"]
    with pytest.raises(ConfigError, match="training would never end"):
        check_training(composed(*endless))
    check_training(composed(*endless, f"trainer.{end}"))


def test_feature_fusion_learns_upsampling(defaults: dict[str, Any]) -> None:
    config = changed(defaults, "model.fusion", "feature")
    check_training(config)
    with pytest.raises(ConfigError, match=r"model\.learn_upsampling=true"):
        check_training(changed(config, "model.learn_upsampling", False))


def test_loads_without_torch_and_hydra() -> None:
    """`--help` must be instant."""
    code = "import sys, fcn.config; print({'torch', 'hydra', 'numpy'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# ---- short messages


class ForeignError(Exception):
    pass


def test_short_message_of_our_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, short_messages():
        raise ConfigError("optimizer.lr=0: must be a number above 0")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: optimizer.lr=0: must be a number above 0\n"


def test_short_message_finds_our_error_in_a_foreign_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra wraps what `instantiate` raises."""
    with pytest.raises(SystemExit), short_messages(ForeignError):
        raise ForeignError("Error in call to target") from DataError("a.jpg is broken")
    assert capsys.readouterr().err == "error: a.jpg is broken\n"


def test_short_message_of_a_foreign_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), short_messages(ForeignError):
        raise ForeignError("Could not override 'optimizer.rate'.\nTo append use +\n\nKey ...")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert "optimizer.rate" in first
    assert "--help" in second


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), short_messages(ForeignError):
        print(1 / 0)


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, short_messages():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
