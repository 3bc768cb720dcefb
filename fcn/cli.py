"""What the four scripts and the commands share: short error messages, paths with any characters.

    if __name__ == "__main__":
        cli.run(main)                     # in train.py, evaluate.py, predict.py and export.py

    cfg = compose(["data=shapes"])        # the configuration that train.py would get
    data = build(cfg, "data")             # calls the _target_ of one of its parts

This file imports Hydra, but not torch, so that `python train.py --help` answers at once.
"""

import argparse
import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn, TypeGuard

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fcn.errors import ConfigError, FCNError, reason

CONF = Path(__file__).resolve().parents[1] / "conf"
# Errors of Hydra, OmegaConf and YAML, which a user can correct on the command line or in conf/.
USER_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
# Settings whose values are paths. A path may hold any character.
PATHS = re.compile(
    r"\+*(ckpt|input|output|resume|calibrate|model\.weights|data\.dataset\.(images|masks|train|val)"
    r"|logger\.\w+\.notes"  # not a path, but it may hold any character too
    r"|([\w.]+\.)?\w*(dir|path|root|folder|filename))"  # such as hydra.run.dir, callbacks.a.dirpath
)
# A value that Hydra takes as plain text: it is neither a number nor true or false, and holds no
# character that has a meaning in Hydra's grammar.
PLAIN = re.compile(r"(?!(true|false|inf|nan)$)([a-z_/]|\.\.?/)[\w./-]*", re.ASCII | re.IGNORECASE)
# The values of one setting in a sweep, between commas. A comma within quotes is a part of a value.
VALUES = re.compile(r"(?:'(?:\\.|[^'\\])*'|[^,])+")
RESUMED = re.compile(r"""resume=(?!(auto|null|'auto'|"auto")$)""")  # an argument that names a run
forced_arguments: dict[str, str] = {}  # what `forced` has returned, and what it was given
# Settings of earlier versions, with the names that they have now.
RENAMED = {
    "callbacks.half_life": "callbacks.loss_statistics.half_life",
    "callbacks.window": "callbacks.loss_statistics.window",
    "callbacks.average_decay": "callbacks.ema.decay",
    "callbacks.checkpoint_every_n_steps": "callbacks.last_checkpoint.every_n_steps",
    "callbacks.panel_images": "callbacks.panels.images",
} | {
    f"logger.{name}": f"logger.wandb.{name}"
    for name in ("project", "name", "group", "tags", "notes", "id")
}


def run(main: Callable[[], None]) -> None:
    """Call a script's main function: paths may hold any character, and errors are short."""
    # With this setting Hydra raises errors to its caller, and `short_messages` reports them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sweep = bool({"-m", "--multirun"} & set(sys.argv))
    with short_messages():
        if sweep and Path(sys.argv[0]).name in ("evaluate.py", "predict.py", "export.py"):
            raise ConfigError("-m: only train.py runs sweeps; start this once for each value")
        sys.argv[1:] = [quoted(argument, sweep=sweep) for argument in sys.argv[1:]]
        if resumed := [argument for argument in sys.argv[1:] if RESUMED.match(argument)]:
            if sweep:
                raise ConfigError(
                    f"{resumed[-1]}: a sweep cannot go on with one run. Let it begin with its "
                    "weights: model.weights=RUN/checkpoints/last.ckpt"
                )
            sys.argv[1:] = list(map(forced, sys.argv[1:]))
        # Hydra recognises -m only before the settings.
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
        main()


@contextmanager
def short_messages() -> Iterator[None]:
    """End the program with a line or two, not a traceback, where the user can fix what is wrong.

    An error that the user cannot fix keeps its traceback. Ctrl-C ends the program with code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # its encoding may lack a character of a file's name
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here an error can still be caught; when Python exits, it cannot
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        raise SystemExit(1) from None
    except Exception as error:
        user_error = isinstance(error, (FCNError, *USER_ERRORS)) or _raised_by_hydra(error)
        if not user_error and not _refused_path(error):
            raise
        print(f"error: {short_message(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def forced(argument: str) -> str:
    """Change key=value to ++key=value, which Hydra accepts whether it knows the key or not.

    A resumed run may have settings that the default configuration lacks, such as
    callbacks.ema.decay. `fcn.runs.resume.resumed_config` refuses those that the run lacks, too.
    Groups and Hydra's own settings stay as they are.
    """
    key, equals, _ = argument.partition("=")
    single = re.fullmatch(r"(?!hydra\.)[a-z]\w*(\.\w+)*", key) and not (CONF / key).is_dir()
    if not equals or not single or RESUMED.match(argument):
        return argument
    forced_arguments[f"++{argument}"] = argument
    return f"++{argument}"


def accept_data_changes() -> None:
    """Register `data=checkpoint`, the default of evaluate.py and export.py: a group for any key.

    The group is empty at first. A setting that the command line puts into it replaces the one of
    the same name among the data settings of the checkpoint.
    """
    changes = OmegaConf.create({}, flags={"struct": False})
    ConfigStore.instance().store(group="data", name="checkpoint", node=changes)


def read_settings(arguments: Sequence[str] | None, module: str, doc: str | None) -> list[str]:
    """The settings on the command line of `python -m MODULE`, whose --help shows `doc`.

    Args:
        arguments: the command line; None: that of this process.
        module: the name of the module.
        doc: the module's docstring.

    Returns:
        Arguments KEY=VALUE as they were given. `compose` takes them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of train.py")
    return list(parser.parse_args(arguments).settings)


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more, as after `python train.py --help | head -1`.

    If so, further output is thrown away, or Python would report the error again when it exits.
    """
    try:
        print(flush=True)  # writing is the one way to find out on every system
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def short_message(error: BaseException) -> str:
    """The message of the `FCNError` that caused an error, or else the useful part of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FCNError):
        cause = cause.__cause__
    if cause is None and _refused_path(error) and not _raised_by_hydra(error):
        return f"{error.filename}: {reason(error)}"
    return _of_hydra(error) if cause is None else str(cause)


def quoted(argument: str, *, sweep: bool = False) -> str:
    """An argument key=value in a form that Hydra's grammar reads as it is meant.

    A path may hold any character, so quotes are put around it: `input=a,b=(1).jpg` becomes
    `input='a,b=(1).jpg'`. `None`, which is how W&B's agent writes it, becomes `null`, and for
    the groups logger and scheduler their option `none`. All else stays as it is.

    Args:
        sweep: in a sweep, commas separate the values of a setting, which may be paths too.

    Raises:
        ConfigError: the argument is a setting with hyphens before it.
    """
    key, equals, value = argument.partition("=")
    if re.fullmatch(r"--\w+(\.\w+)+", key):  # as W&B's ${args} has it; Hydra would print its usage
        better = f"write {argument.lstrip('-')} (in a W&B sweep, use ${{args_no_hyphens}})"
        raise ConfigError(f"{argument}: a setting has no hyphens in front: {better}")
    if key == "resume" or key.startswith("hydra."):
        # Shells leave a "~" within a word as it is. Hydra would make a folder of that name.
        value = os.path.expanduser(value)
    if key == "compare":
        value = _quoted_pair(value)
    elif key.startswith("hydra.") and PATHS.fullmatch(key):
        # Hydra's own folders may be named after the time, ${now:...}, or after a setting, ${name}.
        value = _quoted_path(value).replace("\\${", "${")
    elif PATHS.fullmatch(key):
        swept = sweep and not os.path.exists(value)
        if not (swept and re.fullmatch(r"[a-z]+\(.*\)", value)):  # such as choice(a,b)
            values = VALUES.findall(value) if swept else [value]
            value = ",".join(map(_quoted_path, values))
    else:
        before = "[,{:" if value.startswith(("[", "{")) else ","
        value = re.sub(rf"(^|[{re.escape(before)}]) *None *(?=[\],}}]|$)", r"\1null", value)
        if key in ("logger", "scheduler"):  # groups with an option of that name
            value = re.sub(r"\bnull\b", "none", value)
    return f"{key}{equals}{value}"


def path_in(argument: str) -> str | None:
    """The path in an argument such as `output='a b'`, without Hydra's quotes; None for null.

    Raises:
        ConfigError: the argument has several values.
        HydraException: it cannot be read, such as `output='it's'`.
    """
    (override,) = OverridesParser.create().parse_overrides([quoted(argument)])
    if override.is_sweep_override():
        raise ConfigError(f"{argument}: these are several values, and one path is needed")
    value = override.value()
    return None if value is None else str(OmegaConf.create({"path": value}).path)


def _quoted_path(path: str) -> str:
    """A path in quotes, unless it has some already, or holds only characters that need none."""
    if path == "None":
        return "null"
    if PLAIN.fullmatch(path) or re.fullmatch(r"|'.*'|\".*\"", path):
        return path
    text = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + end[2].replace("'", "\\'"), path)
    return literal(f"'{text}'")


def _quoted_pair(value: str) -> str:
    """The value `[A,B]` of evaluate.py's setting compare, with quotes around A and B.

    Where a path holds a comma, the two parts that exist are taken.
    """
    inner = value.strip()[1:-1]
    commas = [place for place, character in enumerate(inner) if character == ","]
    pairs = [(inner[:place].strip(), inner[place + 1 :].strip()) for place in commas]
    found = [pair for pair in pairs if all(map(os.path.exists, pair))]
    if value.strip() != f"[{inner}]" or len(found or pairs) != 1:
        return value
    return f"[{','.join(map(_quoted_path, (found or pairs)[0]))}]"


def command_line(words: Sequence[str]) -> str:
    """Words as a line for the user's shell: those of Windows know double quotes only."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def literal(text: str) -> str:
    """A text in a form in which OmegaConf takes it as it is: "${" would stand for another value."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def resolved(cfg: DictConfig) -> DictConfig:
    """A copy of settings in which every ${...} is replaced by what it stands for."""
    return OmegaConf.create(_literals(plain(cfg)))


def _literals(value: Any) -> Any:
    """Plain settings with every text as `literal` gives it."""
    if isinstance(value, dict):
        return {key: _literals(v) for key, v in value.items()}
    if isinstance(value, list):
        return list(map(_literals, value))
    return literal(value) if isinstance(value, str) else value


def compose(overrides: Sequence[str], config: str = "train") -> DictConfig:
    """The configuration that a script would compose from these arguments.

    Args:
        overrides: as on the command line.
        config: the script's name: train, evaluate, predict or export.
    """
    if config in ("evaluate", "export"):
        accept_data_changes()  # as these scripts do
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config, list(map(quoted, overrides)))


def plain(cfg: DictConfig) -> Any:
    """Settings as plain Python: dicts, lists, numbers and texts."""
    return OmegaConf.to_container(cfg, resolve=True)


def build(cfg: DictConfig, key: str, **more: Any) -> Any:
    """Call the `_target_` of one part of the configuration.

    Args:
        cfg: the configuration.
        key: the part, such as "data" or "callbacks.panels".
        more: further arguments of the call.

    Raises:
        ConfigError: the target refuses a value. The message names the key in full.
        FCNError: any other of our own errors.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        if key in RENAMED:
            raise ConfigError(f"{key} has a new name: {RENAMED[key]}")
        raise ConfigError(f"{key}: this needs a _target_, the class or function to call")
    try:
        if "${" in str(plain(node)):  # within a text, such as a path; Hydra evaluates texts twice
            node = OmegaConf.create(_literals(_literals(plain(node))))
        return instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        part = re.search(r"full_key: (\S+)", str(error))  # such as data.dataset, within data
        raise_named(part[1] if part else key, error.__cause__ or error)


def build_each(cfg: DictConfig, group: str, kind: type) -> dict[str, Any]:
    """Call the `_target_` of each entry of a group such as "callbacks". Null entries are left out.

    Args:
        cfg: the configuration.
        group: the group.
        kind: the class that each result must be an instance of.

    Returns:
        For the name of each entry, what its `_target_` has made.

    Raises:
        ConfigError: an entry has no `_target_`, refuses a value, or makes something else than a
            `kind`. The message names the entry.
    """
    built = {}
    for name, entry in (cfg.get(group) or {}).items():
        if entry is not None:
            built[name] = build(cfg, f"{group}.{name}")
            if not isinstance(built[name], kind):
                made = f"{entry._target_} makes a {type(built[name]).__name__}"
                raise ConfigError(f"{group}.{name}: {made}, where a {kind.__name__} is needed")
    return built


def raise_named(key: str, error: BaseException) -> NoReturn:
    """Raise a constructor's error again, with the part of the configuration before its message.

    `batch_size=0: must be ...` becomes `data.batch_size=0: must be ...`.

    Raises:
        ConfigError: a value was refused, an argument is unknown or missing, or there is no such
            class. The user can fix these, so that the message is short.
        BaseException: any other error, as it is: with its traceback.
    """
    # A ConfigError of our own is a ValueError, too.
    user_error = isinstance(error, ValueError | ImportError | InstantiationException)
    user_error |= type(error).__name__ == "MisconfigurationException"  # Lightning's: slow to import
    user_error |= isinstance(error, TypeError) and "argument" in str(error)
    if not user_error:
        raise error
    text = " ".join(str(error).partition("\nfull_key:")[0].split()) or type(error).__name__
    unknown = re.search(r"(\w+)(\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown:
        raise ConfigError(f"{key}.{unknown[3]}: {unknown[1]} has no such argument") from error
    if text.startswith((f"{key}.", f"{key}=")):
        raise ConfigError(text) from error
    raise ConfigError(f"{key}{'.' if re.match(r'[a-z_0-9]+=', text) else ': '}{text}") from error


def _of_hydra(error: BaseException) -> str:
    """The one or two useful lines of a message of Hydra's, OmegaConf's or YAML's."""
    if isinstance(error, OSError) and error.filename:  # no error of Hydra's own has a file
        return f"hydra.run.dir, or hydra.sweep.dir: {error.filename}: {reason(error)}"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return str(error.__cause__).strip()
    if isinstance(error, YAMLError | UnicodeDecodeError):  # YAML's names the file and the line
        return f"a file of settings does not read as YAML: {' '.join(str(error).split())}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        why = lines[1] if lines[0].startswith("Error parsing override") else lines[0]
        given = forced_arguments.get(error.override, error.override)
        return (
            f"{given}: this does not read as setting=value ({why}). A text with = ( ) or "
            "[ ] in it needs quotes of its own: \"key='a text'\""
        )
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'", lines[0])
    if several:
        given, advice = forced_arguments.get(several[1], several[1]), "Give one of them"
        # The other scripts take no -m, and a sweep cannot go on with one run.
        if Path(sys.argv[0]).name == "train.py" and not any(map(RESUMED.match, sys.argv)):
            advice = "To train with each of them, add -m: python train.py -m ..."
        return (
            f"{given}: these are several values. {advice}; a list is written in brackets, key=[1,2]"
        )
    first = lines[0].replace("Could not override", "There is no setting")
    key = re.search(r"'([\w.]+)'", first)
    if key and key[1] in RENAMED:
        return f"{key[1]} has a new name: {RENAMED[key[1]]}"
    if first.startswith("Config group override must be"):  # such as data=1 or model=null
        return "A group such as data or model takes the name of a file in conf/; see --help"
    missing = re.fullmatch(r"Missing mandatory value: ([\w.]+)", first)
    if missing:
        return f"{missing[1]}=VALUE is missing; --help shows an example and says what it can be"
    options = re.search(r"(?s)Available options[^\n]*(.*?)(Config search path|$)", str(error))
    if options:
        return f"{first}\nAvailable: {', '.join(options[1].split())}"
    return f"{first}\n`--cfg job` shows every setting, `--help` the groups; +key=value adds one."


def _refused_path(error: BaseException) -> TypeGuard[OSError]:
    """Whether the system refuses a path: one in a folder of another user, or with too long a name.

    Most checks whether a file exists raise such an error.
    """
    refusals = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, OSError) and error.errno in refusals and error.filename is not None


def _raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra or OmegaConf raised the error themselves, and not a function that they called.

    Hydra's own errors may be of any type: `data=1` raises a ValueError, and a folder that it cannot
    make an OSError from Python's pathlib.
    """
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    modules = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    *_, last = (module for module in modules if module not in ("pathlib", "os", "codecs"))
    return last in ("hydra", "omegaconf")
