"""The frame that the four scripts and the commands share: short errors, paths of any spelling.

    if __name__ == "__main__":
        cli.run(main)

It knows Hydra, but not torch: `python train.py --help` must answer at once.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.errors import ConfigError, FCNError

CONF = Path(__file__).resolve().parents[1] / "conf"
# Errors that a user can mend on the command line, beside our own.
MENDABLE = (HydraException, OmegaConfBaseException)
# Settings whose values are paths, which may hold any character.
PATHS = ("ckpt", "input", "output", "data.root", "model.weights", "resume", "hydra.run.dir")
# Settings of earlier versions, with the names that they have now.
RENAMED = {
    "callbacks.half_life": "callbacks.loss_statistics.half_life",
    "callbacks.window": "callbacks.loss_statistics.window",
    "callbacks.average_decay": "callbacks.ema.decay",
    "callbacks.checkpoint_every_n_steps": "callbacks.last_checkpoint.every_n_steps",
    "callbacks.panel_images": "callbacks.panels.images",
    "logger.project": "logger.wandb.project",
    "logger.name": "logger.wandb.name",
    "logger.group": "logger.wandb.group",
    "logger.tags": "logger.wandb.tags",
    "logger.notes": "logger.wandb.notes",
    "logger.id": "logger.wandb.id",
}


def run(main: Callable[[], None]) -> None:
    """Call a script's main function as a user expects: paths as they are, errors in a line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands errors on, and we report them
    sys.argv[1:] = map(quoted, sys.argv[1:])
    with short_messages():
        main()


@contextmanager
def short_messages() -> Iterator[None]:
    """End the program with a line or two, not a traceback, where the user can mend what is wrong."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # `train.py --help | head` has read enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if not isinstance(error, (FCNError, *MENDABLE)) and not _raised_by_hydra(error):
            raise
        print(f"error: {short_message(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def short_message(error: BaseException) -> str:
    """What our own error says, if one is the cause, or the part of Hydra's that matters."""
    known = next((e for e in _causes(error) if isinstance(e, FCNError)), None)
    return str(known) if known is not None else _of_hydra(error)


def quoted(argument: str) -> str:
    """Keep Hydra's grammar out of the value of a path: any character may be in a file name."""
    key, _, value = argument.partition("=")
    if key not in PATHS or value in ("", "null"):
        return argument
    value = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + end[2].replace("'", "\\'"), value)
    return f"{key}='{value}'".replace("${", "\\${")


def compose(overrides: Sequence[str], config: str = "train") -> DictConfig:
    """The configuration that a script would compose of these arguments.

    Args:
        overrides: as on the command line.
        config: the script's name.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config, list(overrides))


def build(cfg: DictConfig, key: str, **more: Any) -> Any:
    """Call the `_target_` of one part of the configuration.

    Args:
        key: of the part, such as "data" or "callbacks.panels".
        more: further arguments.

    Raises:
        ConfigError: the target refuses a value. The message names the key in full.
        FCNError: any other of our own errors.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(f"{key}: this needs a _target_, the class or function to call")
    try:
        return instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        raise_named(key, error.__cause__ or error)


def raise_named(key: str, error: BaseException) -> NoReturn:
    """Raise what a constructor has refused, with the part of the configuration in front.

    `batch_size=0: must be ...` becomes `data.batch_size=0: must be ...`.

    Raises:
        ConfigError: for a value that was refused; else the error itself.
    """
    refused = ValueError | TypeError | ImportError | InstantiationException
    known = isinstance(error, refused) or type(error).__name__ == "MisconfigurationException"
    if not known or (isinstance(error, FCNError) and not isinstance(error, ConfigError)):
        raise error
    text = str(error).strip() or type(error).__name__
    if text.startswith(f"{key}.") or text.startswith(f"{key}="):
        raise ConfigError(text) from error
    raise ConfigError(f"{key}{'.' if re.match(r'[a-z_]+=', text) else ': '}{text}") from error


def _of_hydra(error: BaseException) -> str:
    """The two lines that matter of a message of Hydra's."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return str(error.__cause__).strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].replace("Could not override", "There is no setting")
    key = re.search(r"'([\w.]+)'", first)
    if key and key[1] in RENAMED:
        return f"{key[1]} has a new name: {RENAMED[key[1]]}"
    options: list[str] = []
    for number, line in enumerate(lines):
        if line.startswith("Available options"):
            end = next((i for i, x in enumerate(lines) if x.startswith("Config search path")), None)
            options = lines[number + 1 : end]
    if options:
        return f"{first}\nAvailable: {', '.join(options)}"
    return f"{first}\n`--cfg job` shows every setting, `--help` the groups."


def _raised_by_hydra(error: Exception) -> bool:
    """Hydra's own complaints are of any type (`data=1`: ValueError); those of what it calls not."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("hydra", "omegaconf")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
