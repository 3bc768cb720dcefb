"""The frame around the scripts: short errors for what a user can mend, paths of any spelling."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import PROJECT
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fcn import cli
from fcn.cli import (
    RENAMED,
    build,
    build_each,
    compose,
    quoted,
    raise_named,
    resolved,
    short_message,
    short_messages,
)
from fcn.errors import ConfigError, DataError, TrainingError, check_whole

HINT = "`--cfg job` shows every setting, `--help` the groups; +key=value adds one."


class Part:
    """What a `_target_` of these tests makes."""

    def __init__(self, size: int = 1, inner: Any = None, fail: str | None = None) -> None:
        check_whole("size", size, 1)
        errors: dict[str | None, Exception] = {
            "key": KeyError("a mistake in a user's own class"),
            "type": TypeError("unsupported operand type(s) for +: 'int' and 'str'"),
            "data": DataError("a.jpg is broken"),
            "value": ValueError("Invalid learning rate: -1"),
            "lightning": MisconfigurationException("`monitor` is required"),
        }
        if fail in errors:
            raise errors[fail]
        self.size, self.inner = size, inner


def config(**parts: Any) -> DictConfig:
    """Parts of which each calls `Part`."""
    target = {"_target_": f"{__name__}.Part"}
    return OmegaConf.create({name: target | options for name, options in parts.items()})


# ---- what a script prints where something is wrong


def printed(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    """On stderr, where a script raises this error; the exit code is 1."""
    with pytest.raises(SystemExit) as stopped, short_messages():
        raise error
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_our_own_errors_also_in_one_of_hydras(capsys: pytest.CaptureFixture[str]) -> None:
    own = ConfigError("optimizer.lr=0: must be a number above 0")
    assert printed(own, capsys) == "error: optimizer.lr=0: must be a number above 0\n"
    error = InstantiationException("Error in call to target 'fcn.datasets.folder.Folder'")
    error.__cause__ = DataError("a.jpg is broken")
    assert printed(error, capsys) == "error: a.jpg is broken\n"
    error.__cause__ = KeyError("a")
    assert printed(error, capsys) == "error: 'a'\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), short_messages():
        print(1 / 0)
    with pytest.raises(BrokenPipeError), short_messages():  # not that of our own output
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(KeyboardInterrupt(), 130, "\nstopped\n"), (SystemExit(143), 143, "")],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, short_messages():
        raise error
    assert stopped.value.code == code
    assert capsys.readouterr().err == text


@pytest.mark.slow
def test_output_that_nobody_reads() -> None:
    """python train.py --help | head -1"""
    command = [sys.executable, "train.py", "--help"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, **pipes) as script:
        assert script.stdout is not None
        assert script.stderr is not None
        script.stdout.close()
        assert script.stderr.read() == b""
    assert script.returncode == 1


# ---- each kind of Hydra's own errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data=nope",
            "In 'train': Could not find 'data/nope'\nAvailable: ade20k, camvid, ",
        ),
        ("data.bach_size=2", f"There is no setting 'data.bach_size'.\n{HINT}"),
        ("+data.batch_size=2", "Could not append to config. An item is already at 'data.batch_s"),
        ("~data.nope", "Could not delete from config. 'data.nope' does not exist."),
        ("data=1", "A group such as data or model takes the name of a file in conf/; see --help"),
        ("model=None", "A group such as data or model takes the name of a file in conf/; see "),
        ("optimizer.lr=1,2", "optimizer.lr=1,2: these are several values. To train with each of"),
        ("data.limit=choice(1,2)", "data.limit=choice(1,2): these are several values. To train"),
        ("name=a(b)=c", "name=a(b)=c: this does not read as setting=value ("),
        ("+nope@x=1", "Override +nope@x=1 looks like a config group override, but config group"),
        ("epochs", "epochs: this does not read as setting=value (missing EQUAL at '<EOF>')"),
        ("data.crop_size=[1", "data.crop_size=[1: this does not read as setting=value (no viable "),
        (
            "--optimizer.lr=1",
            "--optimizer.lr=1: a setting has no hyphens in front: write optimizer.",
        ),
        ("--epochs=1", "--epochs=1: this does not read as setting=value (LexerNoViable"),
    ],
)
def test_mistakes_on_the_command_line(
    override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), short_messages():
        compose([override])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) <= 2
    assert "_loaders" not in error  # a part of others, no choice


def test_missing_values_and_interpolations() -> None:
    cfg = config(a={"size": "???"}, b={"size": "${nope}"})
    for key, message in (
        ("a", "a.size=VALUE is missing; --help shows an example"),
        ("b", "Interpolation key 'nope'"),
    ):
        with pytest.raises(cli.MENDABLE) as caught:
            build(cfg, key)
        assert short_message(caught.value).startswith(message)


@pytest.fixture
def new_names(tmp_path: Path) -> Iterator[None]:
    """A configuration whose settings have today's names only."""
    text = "callbacks: {panels: {images: 4}}\nlogger: {wandb: {project: fcn}}\n"
    (tmp_path / "train.yaml").write_text(text)
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_lead_to_the_new(old: str, new_names: None) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        hydra.compose("train", [f"{old}=0"])
    assert short_message(caught.value) == f"{old} has a new name: {RENAMED[old]}"


def test_new_names_are_settings() -> None:
    cfg = compose(["callbacks=[default,ema]", "logger=wandb"])
    for new in RENAMED.values():
        group, name, argument = new.split(".")
        assert "_target_" in cfg[group][name]
        if argument != "id":  # only a run that goes on has one
            assert argument in cfg[group][name], new


# ---- paths


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("input=a,b=(1).jpg", "input='a,b=(1).jpg'"),
        ("input=[a]*.jpg", "input='[a]*.jpg'"),
        ("ckpt=it's.ckpt", r"ckpt='it\'s.ckpt'"),
        ("ckpt=C:\\runs\\", "ckpt='C:\\runs\\\\'"),
        ("output=${x}", "output='\\${x}'"),
        ("input=2024", "input='2024'"),
        ("input=true", "input='true'"),
        ("input=Straße 1", "input='Straße 1'"),
        ("input=", "input="),
        ("resume=null", "resume=null"),
        ("resume=auto", "resume=auto"),
        ("ckpt=runs/a/last.ckpt", "ckpt=runs/a/last.ckpt"),
        ("ckpt=../a", "ckpt=../a"),
        ("ckpt='a b'", "ckpt='a b'"),
        ("+callbacks.a.dirpath=a (b)", "+callbacks.a.dirpath='a (b)'"),
        ("logger.csv.save_dir={a}", "logger.csv.save_dir='{a}'"),
        ("data.dataset.train=a,b", "data.dataset.train='a,b'"),
        ("callbacks.panels.images=2", "callbacks.panels.images=2"),
        ("hydra.run.dir=runs/${now:%Y} (a)", "hydra.run.dir='runs/${now:%Y} (a)'"),
        ("logger.wandb.notes=lr=1, then (2)", "logger.wandb.notes='lr=1, then (2)'"),
        ("compare=[a=1,b (2)]", "compare=['a=1','b (2)']"),
        ("compare=['a=1', b]", "compare=['a=1',b]"),
        ("compare=[a,b,c]", "compare=[a,b,c]"),
        ("compare=null", "compare=null"),
        ("data.crop_size=None", "data.crop_size=null"),
        ("model.weights=None", "model.weights=null"),
        ("data.scale=[None, 1.5]", "data.scale=[null, 1.5]"),
        ("+x={a: None, b: [None], c:None}", "+x={a:null, b: [null], c:null}"),
        ("name=a:None", "name=a:None"),
        ("logger=None", "logger=none"),
        ("scheduler=null,poly", "scheduler=none,poly"),
        ("name=NoneSuch", "name=NoneSuch"),
        ("data.batch_size=[1,2]", "data.batch_size=[1,2]"),
        ("--help", "--help"),
    ],
)
def test_paths_are_quoted(argument: str, expected: str) -> None:
    assert quoted(argument) == expected


@pytest.mark.parametrize(
    "path", ["a,b=(1).jpg", "it's\\", "C:\\a\\", "${x}", "1e5", "a'b\"c", "東 京"]
)
def test_hydra_reads_a_quoted_path_as_it_is(path: str) -> None:
    cfg = compose([quoted(f"input={path}"), "ckpt=x"], "predict")
    assert cfg.input == path


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("ckpt=a,b", "ckpt=a,b"),
        ("model.weights=e=1.ckpt,None", "model.weights='e=1.ckpt',null"),
        ("model.weights='a,b',null", "model.weights='a,b',null"),
        ("model.weights=choice(a,b)", "model.weights=choice(a,b)"),
        ("data.root=there, it is", "data.root='there, it is'"),
        ("hydra.sweep.dir=a,b", "hydra.sweep.dir='a,b'"),
        ("model=fcn8s,fcn32s", "model=fcn8s,fcn32s"),
    ],
)
def test_paths_in_a_sweep(
    argument: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comma separates values, unless there is a file or folder of that name."""
    monkeypatch.chdir(tmp_path)
    Path("there, it is").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "-m", argument])
    cli.run(lambda: None)
    assert sys.argv == ["train.py", "-m", "seed=1", expected]


def test_pair_of_paths_with_commas(tmp_path: Path) -> None:
    """Those two parts are taken that exist."""
    a, b = tmp_path / "a, 1", tmp_path / "b, 2"
    a.mkdir()
    b.mkdir()
    assert quoted(f"compare=[{a}, {b}]") == f"compare=['{a}','{b}']"


def test_resolved_settings_keep_texts() -> None:
    """What stands for another value is replaced, and "${" in a path stays, however often."""
    cfg = compose([r"data.root=/a/\${x}/${y}", "data=shapes", "name=x", "logger=none"])
    again = OmegaConf.create(OmegaConf.to_yaml(resolved(resolved(cfg))))
    assert again.data.root == cli.plain(again)["data"]["root"] == r"/a/\${x}/${y}"
    assert again.data.seed == 0
    assert build(again, "data").root == r"/a/\${x}/${y}"


def test_values_that_wandbs_agent_passes() -> None:
    """It writes each value as Python does, whatever its type."""
    values = {"data.crop_size": None, "data.scale": [0.5, 1.5], "model.learn_upsampling": True}
    values |= {"data.download": False, "optimizer.lr": 1e-5, "model.backbone": "vgg16"}
    values |= {"trainer.gradient_clip_val": None, "data.jitter": "0.2", "data.limit": "None"}
    values |= {"model.weights": None}
    cfg = compose([*(f"{key}={value}" for key, value in values.items()), "name=x"])
    for key, value in (values | {"data.jitter": 0.2, "data.limit": None}).items():
        assert OmegaConf.select(cfg, key) == value, key


# ---- parts of the configuration


def test_build() -> None:
    part = build(config(data={"size": 3}), "data", inner=[1])
    assert (part.size, part.inner) == (3, [1])
    assert type(build(config(a={"inner": {"b": [1]}}), "a").inner) is dict
    cfg = OmegaConf.create({"callbacks": config(a={"size": 2}), "half_life": 3})
    assert build(cfg, "callbacks.a").size == 2
    for key in ("callbacks", "half_life", "nowhere"):
        with pytest.raises(ConfigError, match=f"^{key}: this needs a _target_"):
            build(cfg, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"data\.size=0: must be a whole number from 1 up"),
        ({"fail": "value"}, "data: Invalid learning rate: -1"),
        ({"fail": "lightning"}, "data: `monitor` is required"),
        ({"sise": 1}, r"data\.sise: Part has no such argument"),
        ({"_target_": "nowhere.Nothing"}, "data: Error loading 'nowhere.Nothing': .* installed.*"),
        ({"_target_": 3}, "data: Expected a callable target, got '3' of type 'int'"),
        (
            {"inner": {"_target_": f"{__name__}.Part", "size": 0}},
            r"data\.inner\.size=0: must be .*",
        ),
    ],
)
def test_what_a_constructor_refuses_has_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$") as caught:
        build(config(data=options), "data")
    assert len(str(caught.value).splitlines()) == 1


def test_errors_in_a_constructor_that_no_setting_can_mend() -> None:
    with pytest.raises(DataError, match=r"^a\.jpg is broken$"):
        build(config(data={"fail": "data"}), "data")
    for kind, error in (("key", KeyError), ("type", TypeError)):
        with pytest.raises(error) as caught, short_messages():  # with its traceback
            build(config(data={"fail": kind}), "data")
        assert caught.traceback[-1].name == "__init__"


def test_build_each() -> None:
    cfg = OmegaConf.create(
        {"callbacks": {**config(a={"size": 2}, b={}), "c": None}, "logger": None}
    )
    built = build_each(cfg, "callbacks", Part)
    assert {name: part.size for name, part in built.items()} == {"a": 2, "b": 1}
    assert build_each(cfg, "logger", Part) == build_each(cfg, "nowhere", Part) == {}
    with pytest.raises(ConfigError, match=r"^callbacks\.a: .*Part makes no str$"):
        build_each(cfg, "callbacks", str)
    cfg.callbacks.panel_images = 4  # an old name, from a user's own file
    with pytest.raises(ConfigError, match=r"panel_images has a new name: callbacks\.panels"):
        build_each(cfg, "callbacks", Part)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("size=0: must be 1"), "data.size=0: must be 1"),
        (ValueError("data.size=0: must be 1"), "data.size=0: must be 1"),
        (ValueError("data=0: must be 1"), "data=0: must be 1"),
        (ValueError("Size=0 is\nnothing"), "data: Size=0 is nothing"),
        (ConfigError("no such file"), "data: no such file"),
        (ImportError(), "data: ImportError"),
    ],
)
def test_names_of_what_was_refused(error: Exception, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        raise_named("data", error)
    assert str(caught.value) == message
    assert caught.value.__cause__ is error


def test_other_errors_are_raised_as_they_are() -> None:
    for error in (TrainingError("the loss is NaN"), KeyError("a"), MemoryError()):
        with pytest.raises(type(error)) as caught:
            raise_named("data", error)
        assert caught.value is error


@pytest.mark.parametrize(
    ("script", "argument", "shown"),
    [
        ("train.py", "--cfg=job", "data:"),
        ("evaluate.py", "--help", "data:"),
        pytest.param("predict.py", "--help", "ckpt:", marks=pytest.mark.slow),
        pytest.param("export.py", "--help", "ckpt:", marks=pytest.mark.slow),
    ],
)
def test_help_needs_no_torch(tmp_path: Path, script: str, argument: str, shown: str) -> None:
    """Each script in an interpreter of its own: it answers at once, and writes nothing."""
    command = [sys.executable, "-X", "importtime", str(PROJECT / script), *argument.split("=")]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=100
    )
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported  # so the list is there
    slow = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "numpy", "PIL"}
    assert not imported & slow
    assert shown in result.stdout
    assert list(tmp_path.iterdir()) == []
