"""Going on with a run: which run it is, and the settings that it goes on with.

    cfg = resumed_config(Path("runs/fcn8s/2026-01-31_12-00-00"), ["trainer.max_steps=80000"])

A run folder may come from somebody else. Its config.yaml names classes for Hydra to call, and only
these are accepted: what conf/ names too; callbacks, loggers and optimizers of Lightning and torch,
or of the run's first command line, in the place of one; and what is named again now.
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
from fcn.runs.folder import is_training, read_overrides, started_with

# Whoever imports a module of these runs no code of a run folder.
LIBRARIES = ("pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "torch.optim.")


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
        if status(run) == "finished":
            finished = finished or run
        elif any(run.glob("checkpoints/*.ckpt")) and not (main and is_training(run)):
            return run
    return finished


def status(run: Path) -> str:
    """finished, stopped by a signal, crashed, or unfinished: it is running, or was killed."""
    if (run / "error.txt").is_file():
        return "crashed"
    return read_summary(run).get("status", "unfinished")


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
    for change in OverridesParser.create().parse_overrides(list(overrides)):
        _apply(change, cfg)
    OmegaConf.resolve(cfg)  # an interpolation could make a _target_ too
    _check_targets(run, cfg, overrides)
    cfg.resume = str(run)
    return cfg


def _convert_old_settings(cfg: DictConfig) -> None:
    """Give settings of commit 33324f3 the form of today's conf/callbacks and conf/logger."""
    callbacks, logger = cfg.get("callbacks") or {}, cfg.get("logger") or {}
    if "half_life" in callbacks:
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


def _check_targets(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse settings that want to call what is not known.

    Args:
        overrides: what the user has given now.

    Raises:
        ConfigError: with the words that accept it, if it is the user's own code.
    """
    texts = [path.read_text(encoding="utf-8") for path in CONF.glob("**/*.yaml")]
    known = {target for text in texts for target in re.findall(r"(?m)^ *_target_: *(\S+)", text)}
    now = {override.lstrip("+") for override in overrides}
    first = {override.lstrip("+") for override in read_overrides(run)}
    for key, target in _targets(OmegaConf.to_container(cfg)):
        named = f"{key}={target}"
        if target in known or named in now:
            continue
        # To see what kind of class it is, its module has to be imported.
        trusted = target.startswith(LIBRARIES) or named in first
        if not (trusted and _fits(key, target)):
            raise ConfigError(
                f"resume={run}: its config.yaml wants to call {target}, which conf/ does not name. "
                f"If that is code of yours, say so: {named}"
            )


def _targets(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Each `_target_` in plain settings, which Hydra would import and call, and its key."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{place}_target_", str(value)
            yield from _targets(value, f"{place}{key}.")


def _fits(key: str, target: str) -> bool:
    """Whether a target is a class of the kind that belongs at this key. It is not called."""
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger
    from torch.optim import Optimizer

    kinds = {("callbacks", 3): Callback, ("logger", 3): Logger, ("optimizer", 2): Optimizer}
    parts = key.split(".")  # such as callbacks, panels, _target_
    try:
        return issubclass(get_class(target), kinds[parts[0], len(parts)])
    except Exception:  # no such place, no such class, or its module cannot be imported
        return False
