"""Checks of settings that no constructor of this project checks, or only after a download.

    check_settings(config)      # train.py and python -m fcn.memory call it first

All other settings are checked by the constructors that get them: those of the data module, of the
network and of the callbacks.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer
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
from fcn.metrics import SCORES
from fcn.precision import PRECISIONS

Settings = Mapping[str, Any]

GROUPS = ("data", "model", "optimizer", "scheduler", "trainer")
SWITCHES = ["compile", "enable_progress_bar", "enable_model_summary", "detect_anomaly"]
SWITCHES += ["inference_mode"]
ONE_EPOCH = "a run is one endless epoch, and all settings count optimizer steps"
ONLY_TRAINS = "train.py only trains and validates; evaluate.py scores, predict.py predicts"
# Arguments of Lightning's Trainer that a run would replace or ignore, with what serves instead.
NOT_TAKEN = {
    "barebones": "it would switch off checkpoints and metrics.csv",
    "callbacks": "callbacks are entries of conf/callbacks: +callbacks.NAME._target_=CLASS",
    "check_val_every_n_epoch": f"{ONE_EPOCH}; use trainer.val_check_interval",
    "default_root_dir": "hydra.run.dir=FOLDER chooses the run folder",
    "enable_autolog_hparams": "every logger gets all settings",
    "enable_checkpointing": "checkpoints are callbacks; callbacks.best_checkpoint=null removes one",
    "fast_dev_run": "trainer.max_steps=1 trainer.limit_val_batches=1 is a short trial",
    "limit_predict_batches": ONLY_TRAINS,
    "limit_test_batches": ONLY_TRAINS,
    "limit_train_batches": "data.limit=N uses the first N images of each split",
    "logger": "loggers are entries of conf/logger: logger=none, logger=tensorboard",
    "min_epochs": f"{ONE_EPOCH}; use trainer.min_steps",
    "model_registry": "it belongs to a paid service of Lightning's makers",
    "overfit_batches": "data.limit=N trains on the first N images; train/loss_smooth shows the fit",
    "plugins": "trainer.precision and trainer.strategy choose Lightning's own",
    "reload_dataloaders_every_n_epochs": ONE_EPOCH,
    "sync_batchnorm": "the network has no batch normalisation",
    "use_distributed_sampler": "the data module gives each process its own images",
}


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
    if is_number(name):  # which is how Hydra reads 2024, 1e5 and 2024_01
        refuse("name", name, "a text, not a number: write it in quotes, as in \"name='2024'\"")
    # A run folder may be copied to Windows. Older runs with other names can still be resumed.
    wrong = r"[/\\\0]" if config.get("resume") else r'[/\\:*?"<>|\0-\x1f]|[. ]$'
    if not isinstance(name, str) or name.strip() in ("", ".", "..") or re.search(wrong, name):
        refuse("name", name, "a folder's name, without / \\ : * ? \" < > | and no dot at its end")
    check_whole("seed", config.get("seed"), 0, 2**32 - 1)
    check_text("resume", config.get("resume"), wanted="a run folder", optional=True)
    check_optimizer(config["optimizer"])
    check_trainer(config["trainer"])


def check_callbacks(callbacks: Mapping[str, Callback], class_names: Sequence[str]) -> None:
    """Refuse a second timer, and a callback that monitors a score which no validation computes.

    A callback of the user's own may log further metrics. If there is one, nothing is refused.

    Args:
        callbacks: those of conf/callbacks, by name.
        class_names: of the data.

    Raises:
        ConfigError: the message names the callback's setting and the scores that there are.
    """
    scores = [f"val/{name}" for name in ("loss", *SCORES)]
    known = {*scores, *(f"val/iou/{name}" for name in class_names)}
    ours = ("fcn.", "pytorch_lightning.")
    complete = all(type(callback).__module__.startswith(ours) for callback in callbacks.values())
    for name, callback in callbacks.items():
        if isinstance(callback, Timer) and callback.state_key == "Timer":  # as that of `Clock`
            raise ConfigError(
                f"callbacks.{name}: each run has a timer already; set trainer.max_time"
            )
        if isinstance(callback, EarlyStopping):
            check_whole(f"callbacks.{name}.patience", callback.patience)
        monitor = getattr(callback, "monitor", None)
        if complete and monitor is not None and monitor not in known:
            wanted = f"{', '.join(scores)} or val/iou/ and the name of a class"
            refuse(f"callbacks.{name}.monitor", monitor, wanted)


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
    check_number("optimizer.momentum", settings.get("momentum", 0), 0, below=1)
    check_number("optimizer.weight_decay", settings.get("weight_decay", 0), 0)
    check_flag("optimizer.nesterov", settings.get("nesterov", False))
    check_choice("optimizer.fused", settings.get("fused"), ("auto", True, False), optional=True)
    betas = settings.get("betas", [0, 0])
    fractions = isinstance(betas, list) and all(is_number(b) and 0 <= b < 1 for b in betas)
    if not fractions or len(betas) != 2:
        refuse("optimizer.betas", betas, "two numbers, at least 0 and below 1")


def check_trainer(settings: Settings) -> None:
    """Refuse settings of conf/trainer that Lightning would refuse too late, or not at all.

    All others are refused by Lightning's Trainer, which train.py builds once before anything else.

    Raises:
        ConfigError: the message begins with the setting and its value.
    """
    for name, why in NOT_TAKEN.items():
        if name in settings:
            raise ConfigError(f"trainer.{name} is not a setting of a run: {why}")
    for name in ("val_check_interval", "log_every_n_steps", "accumulate_grad_batches"):
        check_whole(f"trainer.{name}", settings.get(name), 1)
    max_steps, max_time = settings.get("max_steps"), settings.get("max_time")
    if max_steps != -1:
        check_whole("trainer.max_steps", max_steps, 1)
    for name in ("max_epochs", "min_steps"):
        check_whole(f"trainer.{name}", settings.get(name), 1, optional=True)
    if not _is_duration(max_time):
        refuse("trainer.max_time", max_time, "null or a time DD:HH:MM:SS")
    if max_steps == -1 and not settings.get("max_epochs") and not max_time:
        raise ConfigError("training would never end: set trainer.max_steps, max_epochs or max_time")
    check_whole("trainer.num_sanity_val_steps", settings.get("num_sanity_val_steps", 0), -1)
    check_whole("trainer.num_nodes", settings.get("num_nodes", 1), 1)
    clip = settings.get("gradient_clip_val")
    check_number("trainer.gradient_clip_val", clip, above=0, optional=True)
    algorithm = settings.get("gradient_clip_algorithm")
    if algorithm is not None and clip is None:
        needs = "needs trainer.gradient_clip_val"
        raise ConfigError(f"trainer.gradient_clip_algorithm={algorithm}: {needs}")
    check_choice("trainer.precision", settings.get("precision"), ("auto", *PRECISIONS))
    check_choice("trainer.benchmark", settings.get("benchmark"), (True, False), optional=True)
    profilers = ("simple", "advanced", "pytorch")  # the last one with a trace for Perfetto
    check_choice("trainer.profiler", settings.get("profiler"), profilers, optional=True)
    exact = settings.get("deterministic", False)
    check_choice("trainer.deterministic", exact, (True, False, "warn"))
    for name in SWITCHES:
        check_flag(f"trainer.{name}", settings.get(name, False))
    devices = settings.get("devices")
    if isinstance(devices, int) and devices > 256:  # each would be a process
        refuse("trainer.devices", devices, "at most 256")
    share = settings.get("limit_val_batches")
    if share is not None:
        valid = is_number(share) and share > 0 and (share <= 1 or isinstance(share, int))
        wanted = (
            "null, a whole number from 1 up, or a share up to 1.0: best.ckpt needs a validation"
        )
        if not valid:
            refuse("trainer.limit_val_batches", share, wanted)


def _is_duration(value: Any) -> bool:
    """Whether this is a time above zero in a form that Lightning accepts, or None."""
    if isinstance(value, dict):  # such as {"hours": 1}
        return any(value.values())
    if not isinstance(value, str):
        return value is None
    return re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None and value.strip("0:") != ""
