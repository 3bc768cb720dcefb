"""Going on with a run: which run it is, and the settings that it goes on with.

    cfg = resumed_config(Path("runs/fcn8s/2026-01-31_12-00-00"), ["trainer.max_steps=80000"])

A run folder may come from somebody else. Its config.yaml names classes for Hydra to call, and only
these are accepted: what conf/ names too, what is a callback, a logger or an optimizer in the place
of one, and what is named again on the command line.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from fcn.cli import CONF, RENAMED
from fcn.errors import ConfigError
from fcn.runs.folder import is_training, started_with


def find_run(new: Path, overrides: Sequence[str], *, named: bool, main: bool) -> Path | None:
    """What `resume=auto` means: the newest run with this command line that has not finished.

    A run without a checkpoint cannot be resumed, and one that is being trained must not be.

    Args:
        new: the folder that a new run would get.
        overrides: the command line.
        named: whether the user has chosen the name of this folder. The run must then have it, with
            or without a number behind it; otherwise any run next to it will do.
        main: whether this is the process that will hold the run's lock. The others of a distributed
            run follow it, and do not ask who holds the lock.

    Returns:
        A finished run if there is no other; None if a new one is to be started.
    """
    name = re.escape(new.name) + r"(_\d+)?" if named else ".*"
    finished = None
    for run in sorted(new.parent.glob("*"), reverse=True):  # the newest first
        if not re.fullmatch(name, run.name) or not started_with(run, overrides):
            continue
        if is_finished(run):
            finished = finished or run
        elif any(run.glob("checkpoints/*.ckpt")) and not (main and is_training(run)):
            return run
    return finished


def is_finished(run: Path) -> bool:
    """Whether a run has reached the end that its settings gave it."""
    return read_summary(run).get("status") == "finished"


def read_summary(run: Path) -> dict[str, Any]:
    """What summary.json holds; empty if the run has not ended yet, or was killed."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def resumed_config(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The settings of a run, with changes such as a later last step.

    Args:
        run: its folder. Runs of commit 33324f3, where callbacks and loggers had no entries of their
            own, are brought into today's form.
        overrides: changes of single settings, as on the command line.

    Raises:
        ConfigError: this is no run folder, a change is not possible, or the settings want to call
            what is not known.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"resume={run}: no run folder (it has no config.yaml)")
    cfg = OmegaConf.load(run / "config.yaml")
    if not isinstance(cfg, DictConfig) or "resume" not in cfg:
        raise ConfigError(f"resume={run}: its config.yaml does not hold the settings of a run")
    _convert_old_settings(cfg)
    OmegaConf.set_struct(cfg, True)  # refuses names that are not there
    given = [override for override in overrides if not override.startswith("resume=")]
    changes = OverridesParser.create().parse_overrides(given)
    for change in changes:
        _apply(change, cfg)
    OmegaConf.resolve(cfg)  # an interpolation could make a _target_ too
    _check_targets(run, cfg, {(c.key_or_group, c.value()) for c in changes if _is_text(c)})
    cfg.resume = str(run)
    return cfg


def _convert_old_settings(cfg: DictConfig) -> None:
    """Give settings of commit 33324f3 the form of today's conf/callbacks and conf/logger."""
    callbacks, logger = cfg.get("callbacks") or {}, cfg.get("logger") or {}
    if any(f"callbacks.{name}" in RENAMED for name in callbacks):
        cfg.callbacks = OmegaConf.load(CONF / "callbacks" / "default.yaml")
        if callbacks.get("average_decay") is not None:
            cfg.callbacks.ema = OmegaConf.load(CONF / "callbacks" / "ema.yaml").ema
        for name, value in callbacks.items():
            if value is not None:  # without average_decay, there is no callback for it
                OmegaConf.update(cfg, RENAMED[f"callbacks.{name}"], value)
    if "_target_" in logger:
        cfg.logger = OmegaConf.load(CONF / "logger" / "wandb.yaml")
        cfg.logger.wandb.merge_with({k: v for k, v in logger.items() if k != "_target_"})


def _apply(change: Override, cfg: DictConfig) -> None:
    """Change one setting; `+key=value` adds one.

    Raises:
        ConfigError: it is a group, an old name, or not a single value.
    """
    key, text = change.key_or_group, change.input_line
    if key in RENAMED:
        raise ConfigError(f"{key} has a new name: {RENAMED[key]}")
    if key == "experiment" or OmegaConf.is_dict(OmegaConf.select(cfg, key, default=None)):
        raise ConfigError(f"{text}: a resumed run keeps its groups; change single settings")
    if change.is_delete() or change.is_sweep_override():
        raise ConfigError(
            f"{text}: a resumed run takes only key=value, or +key=value for a new key"
        )
    new = change.is_add() or change.is_force_add()
    OmegaConf.update(cfg, key, change.value(), force_add=new)


def _is_text(change: Override) -> bool:
    return isinstance(change.value(), str)


def _check_targets(run: Path, cfg: DictConfig, named: set[tuple[str, Any]]) -> None:
    """Refuse settings that want to call what is not known.

    Args:
        named: keys and values that the user has given.

    Raises:
        ConfigError: with the words that accept it, if it is the user's own code.
    """
    texts = [path.read_text(encoding="utf-8") for path in CONF.glob("**/*.yaml")]
    known = {target for text in texts for target in re.findall(r"(?m)^ *_target_: *(\S+)", text)}
    for key, target in _targets(OmegaConf.to_container(cfg)):
        if target not in known and (key, target) not in named and not _fits(key, target):
            raise ConfigError(
                f"resume={run}: its config.yaml wants to call {target}, which conf/ does not name. "
                f"If that is code of yours, say so: {key}={target}"
            )


def _targets(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each `_target_` in plain settings, which Hydra would import and call, and its key."""
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        inner = f"{place}.{key}".lstrip(".")
        if key == "_target_":
            yield inner, str(value)
        yield from _targets(value, inner)


def _fits(key: str, target: str) -> bool:
    """Whether a target is a class of the kind that belongs at this key. It is not called."""
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger
    from torch.optim import Optimizer

    kinds: dict[str, type] = {
        r"callbacks\.[^.]+\._target_": Callback,
        r"logger\.[^.]+\._target_": Logger,
        r"optimizer\._target_": Optimizer,
    }
    kind = next((kind for place, kind in kinds.items() if re.fullmatch(place, key)), None)
    if kind is None:
        return False
    try:
        return issubclass(get_class(target), kind)
    except Exception:  # There is no such class, or its module cannot be imported.
        return False
