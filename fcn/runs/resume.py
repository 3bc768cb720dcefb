"""Resuming a run: finding the run, and reading the settings that it goes on with.

    cfg = resumed_config(Path("runs/fcn8s/2026-01-31_12-00-00"), ["trainer.max_steps=80000"])

A run folder may come from somebody else, and its config.yaml names classes that Hydra would import
and call. A name is accepted only if at least one of these is true:
- a file in conf/ has the same `_target_`;
- the user has given it again on the command line now;
- it is a callback, a logger or an optimizer, it stands where one belongs, and it comes from
  Lightning, from torch, or was named on a command line with which the run was started before.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError
from yaml import YAMLError

from fcn.checkpoint import last_checkpoint
from fcn.cli import CONF, PATHS, RENAMED, literal, plain, quoted, resolved
from fcn.errors import ConfigError, reason, shown
from fcn.runs.folder import is_training, newest_first, read_overrides, started_with

# To import a module of these packages runs none of the code that a run folder could hold.
LIBRARIES = ("pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "torch.optim.")
# Settings of conf/model, conf/optimizer and data.dataset that a resumed run may change, because no
# state in its checkpoint depends on them.
CHANGEABLE = {"dropout", "checkpoint_stages", "channels_last", "fused", "max_pixels"}
# These may change too, but only with a schedule of fcn/schedules.py: the state of any other
# schedule may hold rates of its own.
RATES = {"lr", "momentum", "dampening", "nesterov", "betas", "eps", "weight_decay"}
RATES |= {"head_lr_multiplier", "bias_lr_multiplier"}
# Settings that fix which image comes when. The position in the stream is counted in batches.
ORDER = ["seed", "data.seed", "data.train_split", "data.limit", "data.batch_size"]
ORDER += ["trainer.accumulate_grad_batches"]
# Settings that fix the images of a validation. Scores on other images could not be compared with
# that of best.ckpt.
SCORED = ["data.val_split", "trainer.limit_val_batches"]


def find_run(new: Path, overrides: Sequence[str], *, named: bool, main: bool) -> Path | None:
    """The run that `resume=auto` means: the newest unfinished run with this command line.

    A run without a checkpoint cannot be resumed, and a run that is being trained must not be. Both
    are ignored.

    Args:
        new: the folder that a new run would get.
        overrides: the settings on the command line.
        named: whether the user has chosen the name of this folder. The run must then have that
            name, perhaps with a number added. Otherwise any run in the same parent folder will do.
        main: whether this is the main process, which will hold the run's lock. The other processes
            of a distributed run must choose the same run, so they do not look at the lock.

    Returns:
        The folder of that run. If there is none, the newest finished run with this command line; if
        there is none either, None.
    """
    name = re.escape(new.name) + r"(_\d+)?" if named else ".*"
    finished = None
    for run in newest_first(new.parent):
        if not re.fullmatch(name, run.name) or not started_with(run, overrides):
            continue
        if status(run) == "finished":
            finished = finished or run
        elif any(run.glob("checkpoints/*.ckpt")) and not (main and is_training(run)):
            return run
    return finished


def status(run: Path) -> str:
    """How a run ended: "finished", "stopped" by a signal, "crashed" in a sweep, or "unfinished".

    An unfinished run is still being trained, or its process was killed or ended with an error.
    """
    if (run / "error.txt").is_file():
        return "crashed"
    return read_summary(run).get("status", "unfinished")


def read_summary(run: Path) -> dict[str, Any]:
    """The content of summary.json; empty if the run has not ended yet, or was killed."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def best_score(summary: Mapping[str, Any]) -> float | None:
    """The highest val/miou of a run, from what its summary.json holds; None if it has none."""
    return summary.get("best/val/miou")


def resumed_config(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The settings of a run, with changes such as a later last step.

    Args:
        run: its folder. The settings of runs that were made before callbacks and loggers had
            entries of their own (commit 33324f3) are converted.
        overrides: changes of single settings, as on the command line.

    Raises:
        ConfigError: this is no run folder, a change is not possible, or config.yaml names something
            to call that is not accepted (see the head of this file).
    """
    path = run / "config.yaml"
    try:
        cfg = OmegaConf.load(path) if path.is_file() else None
    except (OSError, YAMLError, UnicodeDecodeError) as error:  # or belongs to another user
        why = " ".join(reason(error).split())
        raise ConfigError(f"resume={run}: its config.yaml cannot be read: {why}") from error
    if cfg is None:
        raise ConfigError(f"resume={run}: no run folder (it has no config.yaml)")
    if not isinstance(cfg, DictConfig) or "resume" not in cfg:
        raise ConfigError(f"resume={run}: its config.yaml does not hold the settings of a run")
    _convert_old_settings(cfg)
    before = cfg.copy()
    OmegaConf.set_struct(cfg, True)  # refuses names that are not there
    changes = OverridesParser.create().parse_overrides(list(map(quoted, overrides)))
    # As Hydra does, choose a group before its settings are changed.
    for change in sorted(changes, key=lambda change: change.key_or_group != "scheduler"):
        _apply(change, cfg)
    cfg = resolved(cfg)  # before the check, because a ${...} can stand for a _target_ too
    _check_targets(run, cfg, overrides)
    _check_kept(run, before, cfg)
    cfg.resume = literal(str(run))
    return cfg


def _convert_old_settings(cfg: DictConfig) -> None:
    """Convert settings of commit 33324f3 to the form of today's conf/callbacks and conf/logger."""
    callbacks, logger = cfg.get("callbacks") or {}, cfg.get("logger") or {}
    if "half_life" in callbacks:
        cfg.callbacks = OmegaConf.load(CONF / "callbacks" / "default.yaml")
        if callbacks.get("average_decay") is not None:
            cfg.callbacks.ema = OmegaConf.load(CONF / "callbacks" / "ema.yaml").ema
        for name, value in callbacks.items():
            if value is not None:  # average_decay may be: there is no callback `ema` then
                OmegaConf.update(cfg, RENAMED[f"callbacks.{name}"], value)
    if "_target_" in logger:
        cfg.logger = OmegaConf.load(CONF / "logger" / "wandb.yaml")
        cfg.logger.wandb.merge_with({k: v for k, v in logger.items() if k != "_target_"})


def _apply(change: Override, cfg: DictConfig) -> None:
    """Change one setting; `+key=value` adds one, and null removes a callback or a logger.

    Raises:
        ConfigError: the key is a group or has a new name, or the change is not a single value.
    """
    key, text = change.key_or_group, change.input_line
    if key in RENAMED:
        raise ConfigError(f"{key} has a new name: {RENAMED[key]}")
    option = CONF / key / f"{change.value()}.yaml"
    if key == "scheduler" and option.is_file():  # the one group that may change
        cfg.scheduler = OmegaConf.load(option)
        return
    is_table = OmegaConf.is_dict(OmegaConf.select(cfg, key, default=None))
    removed = key.startswith(("callbacks.", "logger.")) and change.value() is None
    if key == "experiment" or (is_table and not removed):
        raise ConfigError(f"{text}: a resumed run keeps its groups; change single settings")
    if change.is_delete() or change.is_sweep_override():
        raise ConfigError(
            f"{text}: a resumed run takes only key=value, or +key=value for a new key"
        )
    new = change.is_add() or change.is_force_add()
    try:
        OmegaConf.update(cfg, key, change.value(), force_add=new)
    except ConfigAttributeError as error:
        group = key.rpartition(".")[0]
        names = map(str, OmegaConf.select(cfg, group) if group else cfg)
        known = ", ".join(name for name in names if not name.startswith("_"))
        missing = f"{text}: {group or 'this run'} has no such setting, only {known}"
        raise ConfigError(f"{missing}; + in front adds one") from error


def check_steps_left(run: Path, cfg: DictConfig, step: int) -> None:
    """Refuse changes of a run that has no steps left: its config.yaml would claim them.

    Args:
        run: its folder.
        cfg: its settings, with today's changes, as they would be written to config.yaml.
        step: the optimizer step that it goes on from.

    Raises:
        ConfigError: the message says how to get more steps.
    """
    most = cfg.trainer.max_steps
    if most != -1 and most < step:
        raise ConfigError(f"trainer.max_steps={most}: the run is at step {step} already")
    before = OmegaConf.load(run / "config.yaml")
    assert isinstance(before, DictConfig)
    _convert_old_settings(before)
    before.resume = literal(str(run))
    # These change no weights, and may be needed for a last validation that is still due, for
    # example because memory ran out in it.
    for key in ("data.num_workers", "data.eval_batch_size", "trainer.precision"):
        OmegaConf.update(before, key, OmegaConf.select(cfg, key), force_add=True)
    if plain(before) == plain(cfg):
        return
    if step == most:
        raise ConfigError(f"no steps are left: set trainer.max_steps above {most}")
    # The run may have ended later than at `step`, the step of the newest checkpoint that is left.
    if status(run) != "finished" or read_summary(run).get("steps") == before.trainer.max_steps:
        return
    # The run was ended by trainer.max_time, early stopping, or a callback of the user's own.
    if (before.trainer.max_time, before.callbacks) == (cfg.trainer.max_time, cfg.callbacks):
        raise ConfigError(
            f"no steps are left: the run has finished at step {step}. Change what has ended it, "
            "trainer.max_time or callbacks.early_stopping.patience"
        )


def _check_kept(run: Path, before: DictConfig, after: DictConfig) -> None:
    """Refuse changes that the run's checkpoint could not follow.

    Rates, momentum, weight decay, schedule and length may change, and most settings of data,
    trainer, callbacks and loggers. The data set may lie elsewhere, but must be the same.

    Raises:
        ConfigError: the message names the setting, and what it was.
    """
    kept, groups, free = [*ORDER, *SCORED], ["model", "optimizer"], CHANGEABLE | RATES
    schedules = [OmegaConf.select(cfg, "scheduler._target_") for cfg in (before, after)]
    if not all(str(schedule).startswith("fcn.schedules.") for schedule in schedules):
        groups, free = [*groups, "scheduler"], CHANGEABLE
    for group in [*groups, "data.dataset"]:
        parts = [OmegaConf.select(cfg, group) or () for cfg in (before, after)]
        names = {name for part in parts for name in part} - free
        keys = [f"{group}.{name}" for name in sorted(names)]
        kept += [key for key in keys if not PATHS.fullmatch(key) or key == "model.weights"]
    for key in kept:
        old, new = (OmegaConf.select(cfg, key) for cfg in (before, after))
        if old != new:
            raise ConfigError(
                f"{key}={shown(new)}: a resumed run keeps this setting, which was {shown(old)}. To "
                "change it, start a new run. If its layers have the same shapes or its stride is "
                f"finer, it can begin with these weights: model.weights={last_checkpoint(run)}"
            )


def _check_targets(run: Path, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse settings that name something to call that is not accepted (see the file's head).

    Args:
        run: the run folder.
        cfg: its settings, with today's changes.
        overrides: the settings that the user has given on the command line now.

    Raises:
        ConfigError: there is such a name. The message says how to accept it if it is the user's
            own code.
    """
    texts = [path.read_text(encoding="utf-8") for path in CONF.glob("**/*.yaml")]
    known = {target for text in texts for target in re.findall(r"(?m)^ *_target_: *(\S+)", text)}
    now = {override.lstrip("+") for override in overrides}
    before = {override.lstrip("+") for part in read_overrides(run) for override in part}
    for key, target in _targets(plain(cfg)):
        named = f"{key}={target}"
        if target in known or named in now:
            continue
        # `_fits` imports the module, to see what kind of class this is. So trust comes first.
        trusted = target.startswith(LIBRARIES) or named in before
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
    """Whether a target is a class of the kind that belongs at this key. It is imported, not called.

    Args:
        key: of the `_target_`, such as "callbacks.panels._target_".
        target: the import path.
    """
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger
    from torch.optim import Optimizer

    kinds = {("callbacks", 3): Callback, ("logger", 3): Logger, ("optimizer", 2): Optimizer}
    parts = key.split(".")  # such as callbacks, panels, _target_
    try:
        return issubclass(get_class(target), kinds[parts[0], len(parts)])
    except Exception:  # no such place, no such class, or its module cannot be imported
        return False
