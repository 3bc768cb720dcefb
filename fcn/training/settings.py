"""Checks of those settings that no constructor of this project checks, or not soon enough.

    check_settings(config)      # train.py and python -m fcn.memory call it first

All other settings are checked by the constructors that get them: those of the data module, of the
network and of the callbacks.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fcn.errors import (
    ConfigError,
    check_choice,
    check_flag,
    check_number,
    check_text,
    check_whole,
    is_number,
    refuse,
)
from fcn.precision import PRECISIONS

Settings = Mapping[str, Any]

GROUPS = ("data", "model", "optimizer", "scheduler", "trainer")
PROFILERS = ("simple", "advanced", "pytorch")


def check_settings(config: Settings) -> None:
    """Refuse what cannot work, before anything is downloaded, built or written.

    Args:
        config: what conf/train.yaml composes to, resolved, as plain Python.

    Raises:
        ConfigError: the message begins with the setting and its value.
    """
    for group in GROUPS:
        if not isinstance(config.get(group), Mapping):
            raise ConfigError(f"{group}={config.get(group)!r}: no settings; see conf/{group}/")
    name = config.get("name")
    if not isinstance(name, str) or name.strip() in ("", ".", "..") or re.search(r"[/\\\0]", name):
        refuse("name", name, "a folder's name, without / or \\")
    check_whole("seed", config.get("seed"), 0, 2**32 - 1)
    check_text("resume", config.get("resume"), wanted="a run folder", optional=True)
    check_optimizer(config["optimizer"])
    check_trainer(config["trainer"])


def dummy_parameters() -> list[nn.Parameter]:
    """A parameter to build an optimizer for, only to see whether it accepts its settings."""
    return [nn.Parameter(torch.zeros(1))]


def check_optimizer(settings: Settings) -> None:
    """Refuse values that torch accepts although no network learns with them, such as lr=0 or Inf.

    Args:
        settings: of conf/optimizer.

    Raises:
        ConfigError: the message begins with the setting and its value.
    """
    check_number("optimizer.lr", settings.get("lr"), above=0)
    if "momentum" in settings:
        check_number("optimizer.momentum", settings["momentum"], 0, below=1)
    if "weight_decay" in settings:
        check_number("optimizer.weight_decay", settings["weight_decay"], 0)
    if "nesterov" in settings:
        check_flag("optimizer.nesterov", settings["nesterov"])
    if "fused" in settings:
        check_choice("optimizer.fused", settings["fused"], ("auto", True, False), optional=True)
    betas = settings.get("betas", [0, 0])
    fractions = isinstance(betas, list) and all(is_number(b) and 0 <= b < 1 for b in betas)
    if not fractions or len(betas) != 2:
        refuse("optimizer.betas", betas, "two numbers, at least 0 and below 1")


def check_trainer(settings: Settings) -> None:
    """Refuse settings of conf/trainer that Lightning would refuse too late, or not at all.

    Raises:
        ConfigError: the message begins with the setting and its value.
    """
    for name in ("val_check_interval", "log_every_n_steps", "accumulate_grad_batches"):
        check_whole(f"trainer.{name}", settings.get(name), 1)
    max_steps, max_time = settings.get("max_steps"), settings.get("max_time")
    if max_steps != -1:
        check_whole("trainer.max_steps", max_steps, 1)
    check_whole("trainer.max_epochs", settings.get("max_epochs"), 1, optional=True)
    if not _is_duration(max_time):
        refuse("trainer.max_time", max_time, "null or a time DD:HH:MM:SS")
    if max_steps == -1 and not settings.get("max_epochs") and not max_time:
        raise ConfigError("training would never end: set trainer.max_steps, max_epochs or max_time")
    clip = settings.get("gradient_clip_val")
    check_number("trainer.gradient_clip_val", clip, above=0, optional=True)
    check_choice("trainer.precision", settings.get("precision"), ("auto", *PRECISIONS))
    check_choice("trainer.profiler", settings.get("profiler"), PROFILERS, optional=True)
    check_choice("trainer.benchmark", settings.get("benchmark"), (True, False), optional=True)
    exact = settings.get("deterministic", False)
    check_choice("trainer.deterministic", exact, (True, False, "warn"))
    for name in ("compile", "enable_progress_bar", "enable_model_summary"):
        check_flag(f"trainer.{name}", settings.get(name, False))
    wanted = "auto, cpu, gpu, mps or another of Lightning's"
    check_text("trainer.accelerator", settings.get("accelerator"), wanted=wanted)
    check_whole("trainer.num_nodes", settings.get("num_nodes", 1), 1)
    _check_devices(settings.get("devices"))
    _check_strategy(settings.get("strategy", "auto"))
    share = settings.get("limit_val_batches")
    if not isinstance(share, float):
        check_whole("trainer.limit_val_batches", share, 1, optional=True)
    elif not 0 < share <= 1:
        refuse("trainer.limit_val_batches", share, "null, a whole number, or a part of 1.0")


def _is_duration(value: Any) -> bool:
    """Whether this is a time above zero in a form that Lightning accepts, or None."""
    if isinstance(value, dict):  # such as {"hours": 1}
        return any(value.values())
    if not isinstance(value, str):
        return value is None
    return re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None and value.strip("0:") != ""


def _check_devices(value: Any) -> None:
    if value in ("auto", -1) or (isinstance(value, list) and value):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 256:
        refuse("trainer.devices", value, "a count up to 256, a list or auto")


def _check_strategy(value: Any) -> None:
    """Refuse what is neither the name of a strategy of Lightning's nor a table as in ddp.yaml."""
    if not isinstance(value, Mapping):
        check_text("trainer.strategy", value, wanted="the name of a strategy, or a table")
        return
    for name in ("broadcast_buffers", "gradient_as_bucket_view"):
        check_flag(f"trainer.strategy.{name}", value.get(name, True))
