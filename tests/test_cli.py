"""The frame around the scripts: short errors for what a user can fix, paths of any spelling."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fcn import cli
from fcn.cli import build, build_each, compose, path_in, quoted, resolved, short_messages
from fcn.errors import ConfigError, DataError, TrainingError, check_whole


class Part:
    """What a `_target_` of these tests makes."""

    def __init__(self, size: int = 1, inner: Any = None) -> None:
        check_whole("size", size, 1)
        self.size, self.inner = size, inner


def broken() -> None:
    """A function of a user's own, with a mistake in it."""
    raise KeyError("a")


TARGET = {"_target_": f"{__name__}.Part"}
Capture = pytest.CaptureFixture[str]


def config(**parts: dict[str, Any]) -> DictConfig:
    """Parts of which each calls `Part`."""
    return OmegaConf.create({name: TARGET | options for name, options in parts.items()})


# ---- what a script prints where something is wrong


def of_hydra(cause: Exception) -> Exception:
    error = InstantiationException("Error in call to target 'fcn.datasets.folder.Folder'")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("lr=0: must be a number above 0"), 1, "error: lr=0: must be a number above 0"),
        (of_hydra(DataError("a.jpg is broken")), 1, "error: a.jpg is broken"),
        (of_hydra(KeyError("a")), 1, "error: 'a'"),
        (PermissionError(13, "Permission denied", "a/b"), 1, "error: a/b: Permission denied"),
        (KeyboardInterrupt(), 130, "\nstopped"),
        (SystemExit(143), 143, ""),
    ],
)
def test_what_a_script_prints_and_its_exit_code(
    error: BaseException, code: int, text: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped, short_messages():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == (text and f"{text}\n")


def test_other_errors_keep_their_traceback() -> None:
    """A broken pipe too, if it is not that of our own output."""
    for error in (ZeroDivisionError, BrokenPipeError, PermissionError, IsADirectoryError):
        with pytest.raises(error), short_messages():
            raise error
    with pytest.raises(KeyError) as caught, short_messages():
        build(OmegaConf.create({"data": {"_target_": f"{__name__}.broken"}}), "data")
    assert caught.traceback[-1].name == "broken"


@pytest.mark.slow
def test_output_that_nobody_reads() -> None:
    """python train.py --help | head -1"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


SEVERAL = "these are several values. To train with each of"
GRAMMAR = "this does not read as setting=value ("


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=nope", "In 'train': Could not find 'data/nope'\nAvailable: ade20k, camvid, "),
        ("data.bach_size=2", "There is no setting 'data.bach_size'.\n`--cfg job` shows every sett"),
        ("+data.batch_size=2", "Could not append to config. An item is already at 'data.batch_s"),
        ("model=None", "A group such as data or model takes the name of a file in conf/; see "),
        ("optimizer.lr=1,2", f"optimizer.lr=1,2: {SEVERAL}"),
        ("data.limit=choice(1,2)", f"data.limit=choice(1,2): {SEVERAL}"),
        ("name=a(b)=c", f"name=a(b)=c: {GRAMMAR}"),
        ("epochs", f"epochs: {GRAMMAR}missing EQUAL at '<EOF>')"),
        ("callbacks.half_life=9", "callbacks.half_life has a new name: callbacks.loss_statistics."),
        ("logger.notes=a", "logger.notes has a new name: logger.wandb.notes"),
        ("--optimizer.lr=1", "--optimizer.lr=1: a setting has no hyphens in front: write optim"),
        ("--epochs=1", f"--epochs=1: {GRAMMAR}LexerNoViable"),
    ],
)
def test_mistakes_on_the_command_line(
    override: str, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", override])
    with pytest.raises(SystemExit), short_messages():
        compose([override])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) <= 2
    assert "_loaders" not in error  # a part of others, no choice


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "predict.py tta.scales=0.75,1",
            "tta.scales=0.75,1: these are several values. Give one",
        ),
        ("train.py resume=r seed=1,2", "seed=1,2: these are several values. Give one of them; a"),
        ("train.py resume=r seed=[1,", f"seed=[1,: {GRAMMAR}"),
    ],
)
def test_mistakes_where_there_is_no_sweep(
    command: str, message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice does not mention -m, and the setting is shown as it was given."""
    script, *settings = command.split()
    monkeypatch.setattr(sys, "argv", [script, *settings])
    with pytest.raises(SystemExit):
        cli.run(lambda: compose(sys.argv[1:], script.removesuffix(".py")))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert " -m" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nclasses: [road, sky\nb: 2", "line 3, column 2"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a: 1\na: 2", "duplicate key a"),
        ("a: \0", "position 3"),
    ],
)
def test_mistakes_in_a_file_of_settings(
    text: str, message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.yaml").write_text(text)
    monkeypatch.setattr(cli, "CONF", tmp_path)
    with pytest.raises(SystemExit), short_messages():
        compose([])
    error = capsys.readouterr().err
    assert error.startswith("error: a file of settings does not read as YAML: ")
    assert str(tmp_path / "train.yaml") in error
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_file_of_settings_that_is_not_utf8(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.yaml").write_bytes("name: Äcker".encode("latin-1"))
    monkeypatch.setattr(cli, "CONF", tmp_path)
    with pytest.raises(SystemExit), short_messages():
        compose([])
    assert "does not read as YAML: 'utf-8' codec" in capsys.readouterr().err


def test_a_path_that_is_too_long(capsys: Capture) -> None:
    with pytest.raises(SystemExit), short_messages():
        Path("x" * 300).is_dir()
    assert capsys.readouterr().err == f"error: {'x' * 300}: File name too long\n"


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py", "export.py"])
def test_only_training_has_sweeps(
    script: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "ckpt=x", "-m"])
    with pytest.raises(SystemExit):
        cli.run(lambda: pytest.fail("it has begun"))
    assert capsys.readouterr().err.startswith("error: -m: only train.py runs sweeps")


def test_missing_values() -> None:
    with pytest.raises(cli.USER_ERRORS) as caught:
        build(config(a={"size": "???"}), "a")
    message = "a.size=VALUE is missing; --help shows an example"
    assert cli.short_message(caught.value).startswith(message)


# ---- paths


UNCHANGED = ["input=", "resume=null", "ckpt=../a", "ckpt='a b'", "callbacks.panels.images=2"]
UNCHANGED += ["ckpt=runs/a/last.ckpt", "compare=[a,b,c]", "compare=null", "name=a:None"]
UNCHANGED += ["name=NoneSuch", "data.batch_size=[1,2]", "--help"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        *((argument, argument) for argument in UNCHANGED),
        ("input=a,b=(1).jpg", "input='a,b=(1).jpg'"),
        ("input=true", "input='true'"),
        ("+callbacks.a.dirpath=a (b)", "+callbacks.a.dirpath='a (b)'"),
        ("hydra.run.dir=runs/${now:%Y} (a)", "hydra.run.dir='runs/${now:%Y} (a)'"),
        ("logger.wandb.notes=lr=1, then (2)", "logger.wandb.notes='lr=1, then (2)'"),
        ("compare=[a=1,b (2)]", "compare=['a=1','b (2)']"),
        ("compare=['a=1', b]", "compare=['a=1',b]"),
        ("data.crop_size=None", "data.crop_size=null"),
        ("data.scale=[None, 1.5]", "data.scale=[null, 1.5]"),
        ("+x={a: None, b: [None], c:None}", "+x={a:null, b: [null], c:null}"),
        ("logger=None", "logger=none"),
        ("scheduler=null,poly", "scheduler=none,poly"),
    ],
)
def test_paths_are_quoted(argument: str, expected: str) -> None:
    assert quoted(argument) == expected


def test_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not replace a "~" within a word; Hydra would make a folder of that name."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path.replace("~", "/home/me"))
    for key in ("hydra.run.dir", "hydra.sweep.dir", "resume"):
        assert quoted(f"{key}=~/x") == f"{key}=/home/me/x"


@pytest.mark.slow
def test_hydra_reads_a_quoted_path_as_it_is() -> None:
    paths = ["a,b=(1)[d]{e}.jpg", "it's\\", "C:\\a\\", "${x}", "1e5", "2024", "a'b\"c", "東 京"]
    for path in paths:
        assert compose([quoted(f"input={path}"), "ckpt=x"], "predict").input == path
        assert path_in(f"input={path}") == path
    assert path_in("input='a b'") == "a b"
    assert path_in("output=null") is None
    with pytest.raises(ConfigError, match="several values, and one path"):
        path_in("output='a','b'")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        *((o, o) for o in ("ckpt=a,b", "model=fcn8s,fcn32s", "model.weights=choice(a,b)")),
        ("model.weights='a,b',e=1.ckpt,None", "model.weights='a,b','e=1.ckpt',null"),
        ("data.root=there, it is", "data.root='there, it is'"),
        ("hydra.sweep.dir=a,b", "hydra.sweep.dir='a,b'"),
        # Of a pair of paths, those two parts are taken that exist.
        ("compare=[there, it is, there, it is]", "compare=['there, it is','there, it is']"),
    ],
)
def test_paths_with_commas(
    argument: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep, a comma separates values, unless there is a file or folder of that name."""
    monkeypatch.chdir(tmp_path)
    Path("there, it is").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "-m", argument])
    cli.run(lambda: None)
    assert sys.argv == ["train.py", "-m", "seed=1", expected]


def test_resolved_settings_keep_texts() -> None:
    """What stands for another value is replaced, and "${" in a path stays, however often."""
    cfg = compose([r"data.root=/a/\${x}/${y}", "data=shapes", "name=x", "logger=none"])
    again = OmegaConf.create(OmegaConf.to_yaml(resolved(resolved(cfg))))
    assert again.data.root == cli.plain(again)["data"]["root"] == r"/a/\${x}/${y}"
    assert again.data.seed == 0
    assert build(again, "data").root == r"/a/\${x}/${y}"


# ---- parts of the configuration


def test_build() -> None:
    part = build(config(data={"size": 3}), "data", inner=[1])
    assert (part.size, part.inner) == (3, [1])
    assert type(build(config(a={"inner": {"b": [1]}}), "a").inner) is dict
    cfg = OmegaConf.create({"callbacks": config(a={"size": 2}, b={}), "half_life": 3})
    assert build(cfg, "callbacks.a").size == 2
    for key in ("callbacks", "half_life", "nowhere"):
        with pytest.raises(ConfigError, match=f"^{key}: this needs a _target_"):
            build(cfg, key)

    cfg.callbacks.c = cfg.logger = None
    built = build_each(cfg, "callbacks", Part)
    assert {name: part.size for name, part in built.items()} == {"a": 2, "b": 1}
    assert build_each(cfg, "logger", Part) == build_each(cfg, "nowhere", Part) == {}
    with pytest.raises(
        ConfigError, match=r"^callbacks\.a: .*Part makes a Part, where a str is needed$"
    ):
        build_each(cfg, "callbacks", str)
    cfg.callbacks.panel_images = 4  # an old name, from a user's own file
    with pytest.raises(ConfigError, match=r"panel_images has a new name: callbacks\.panels"):
        build_each(cfg, "callbacks", Part)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"data\.size=0: must be a whole number from 1 up"),
        ({"sise": 1}, r"data\.sise: Part has no such argument"),
        ({"_target_": "nowhere.Nothing"}, "data: Error loading 'nowhere.Nothing': .* installed.*"),
        ({"_target_": 3}, "data: Expected a callable target, got '3' of type 'int'"),
        ({"inner": TARGET | {"size": 0}}, r"data\.inner\.size=0: must be .*"),
    ],
)
def test_what_a_constructor_refuses_has_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        build(config(data=options), "data")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("size=0: must be 1"), "data.size=0: must be 1"),
        (ValueError("data.size=0: must be 1"), "data.size=0: must be 1"),
        (ValueError("data=0: must be 1"), "data=0: must be 1"),
        (ValueError("Size=0 is\nnothing"), "data: Size=0 is nothing"),
        (MisconfigurationException("`monitor` is required"), "data: `monitor` is required"),
        (ConfigError("no such file"), "data: no such file"),
        (ImportError(), "data: ImportError"),
        # These are raised as they are.
        (TrainingError("the loss is NaN"), None),
        (DataError("a.jpg is broken"), None),
        (TypeError("unsupported operand type(s) for +: 'int' and 'str'"), None),
        (KeyError("a"), None),
    ],
)
def test_names_of_what_was_refused(error: Exception, message: str | None) -> None:
    with pytest.raises(ConfigError if message else type(error)) as caught:
        cli.raise_named("data", error)
    assert (caught.value is error) == (message is None)
    assert message is None or str(caught.value) == message
    assert message is None or caught.value.__cause__ is error


HELP = """
import runpy, sys
*commands, project = sys.argv[1:]
sys.path.append(project)
for command in commands:
    sys.argv = command.split()
    try:
        runpy.run_path(f"{project}/{sys.argv[0]}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
    print("==")
print(*sys.modules)
"""


@pytest.mark.slow
def test_help_needs_no_torch(tmp_path: Path) -> None:
    """Each script answers at once, and writes nothing."""
    scripts = ["train.py --cfg job", *(f"{name}.py --help" for name in ("evaluate", "predict"))]
    command = [sys.executable, "-c", HELP, *scripts, "export.py --help", str(PROJECT)]
    output = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    *shown, modules = output.stdout.split("==\n")
    for text, part in zip(shown, ("data:", "data:", "ckpt:", "ckpt:"), strict=True):
        assert part in text
    slow = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "numpy", "PIL"}
    assert "hydra" in modules.split()  # so the list is there
    assert not slow & set(modules.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["evaluate", "export"])
def test_compose_without_the_script(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, evaluate.py and export.py may not have been imported."""
    store = ConfigStore.instance().repo
    monkeypatch.setitem(store, "data", {})
    assert compose(["ckpt=a.ckpt", "data.root=/data"], script).data == {"root": "/data"}
