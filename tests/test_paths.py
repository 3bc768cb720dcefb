"""Paths with characters that mean something to Hydra, OmegaConf or YAML: every script and command
takes them as they are, wherever a setting is a path."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROJECT, TINY
from hydra.core.hydra_config import HydraConfig
from PIL import Image

import evaluate
import export
import predict
import train
from fcn import cli, memory, stages, visualize
from fcn.datasets import check
from fcn.errors import ConfigError
from fcn.runs.folder import read_changes

Call = Callable[..., None]
# Windows allows no double quotes in a name.
NAME = "a=b, (c) [d] {e} $f it's %g" + ("" if sys.platform == "win32" else ' "h"')


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """A script's or a command's main function, called with a command line in `tmp_path`."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def call(main: Callable[[], None], *arguments: str) -> None:
        script = [f"--config-path={PROJECT / 'conf'}"] if hasattr(main, "__wrapped__") else []
        monkeypatch.setattr(sys, "argv", ["x.py", *script, *arguments])
        cli.run(main)

    monkeypatch.chdir(tmp_path)
    yield call
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    HydraConfig.instance().cfg = None


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Settings of a data set of four pairs; each file and folder of it has such a name."""
    root = tmp_path / f"{NAME} ${{x}}"
    for part in ("images", "masks"):
        (root / f"{part} {NAME}").mkdir(parents=True)
    for n in range(4):
        Image.effect_noise((48, 40), 90).convert("RGB").save(root / f"images {NAME}" / f"{n}.png")
        mask = Image.fromarray(np.arange(48 * 40, dtype=np.uint8).reshape(40, 48) // 200 % 2)
        mask.save(root / f"masks {NAME}" / f"{n}.png")
    (root / f"train {NAME}").write_text("0\n1\n2\n")
    (root / f"val {NAME}").write_text("3\n")
    parts = [f"data.dataset.{part}={part} {NAME}" for part in ("images", "masks", "train", "val")]
    return ["data=folder", f"data.root={root}", "data.dataset.classes=[a,b]", *parts]


SETTINGS = [o for o in TINY if not o.startswith(("data", "trainer.max_steps"))]
SETTINGS += ["data.num_workers=0", "data.crop_size=32", "trainer.max_steps=1"]
SETTINGS += ["callbacks.curves=null", "callbacks.panels=null"]


@pytest.mark.slow
def test_every_script_and_command(
    tmp_path: Path, call: Call, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / f"run {NAME}", tmp_path / f"other {NAME}"
    check.main([*data, f"output={tmp_path / 'check'} {NAME}"])
    assert (tmp_path / f"check {NAME}" / "data_check.png").is_file()
    logs = tmp_path / f"logs {NAME} ${{x}}"
    logger = ["+logger.csv._target_=pytorch_lightning.loggers.CSVLogger"]
    logger += [f"+logger.csv.save_dir={logs}"]
    call(train.main, *SETTINGS, *data, *logger, f"hydra.run.dir={run}")
    assert list(logs.rglob("metrics.csv"))
    call(train.main, f"resume={run}", "trainer.max_steps=2")
    ckpt = tmp_path / f"epoch=1-step=2 {NAME} ${{x}}.ckpt"
    ckpt.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    call(train.main, *SETTINGS, *data, f"model.weights={ckpt}", f"hydra.run.dir={other}")

    call(evaluate.main, f"ckpt={ckpt}", f"output={tmp_path / 'e'} {NAME}", "report.images=0")
    call(evaluate.main, f"compare=[{ckpt},{run}]", f"output={tmp_path / 'c'}", "report.images=0")
    assert (tmp_path / f"e {NAME}" / "metrics.json").is_file()
    image = f"{data[1].removeprefix('data.root=')}/images {NAME}/0.png"
    call(predict.main, f"ckpt={ckpt}", f"input={image}", f"output={tmp_path / 'p'} {NAME}")
    assert (tmp_path / f"p {NAME}" / "0.png").is_file()
    exported = f"{tmp_path / 'x'} {NAME}"
    call(export.main, f"ckpt={ckpt}", f"output={exported}", "format=safetensors")
    assert (Path(exported) / "model.safetensors").is_file()
    (row,) = memory.combinations([*SETTINGS, *data, f"model.weights={ckpt}"])
    assert memory.compose(row).data.dataset.train == f"train {NAME}"
    visualize.main([str(run), str(other), "--output", f"v {NAME}.png"])
    assert (tmp_path / f"v {NAME}.png").is_file()
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_sweeps(tmp_path: Path, call: Call, data: list[str]) -> None:
    """A comma separates the values of a sweep, but not where that path exists, or in quotes."""
    sweep = tmp_path / f"sweep {NAME}"
    weights = tmp_path / "epoch=1-step=2.ckpt"
    tiny = [*SETTINGS, *data[:2], *map(cli.quoted, data[2:])]
    call(train.main, *tiny, f"hydra.run.dir={tmp_path / 'first'}")
    weights.write_bytes((tmp_path / "first" / "checkpoints" / "best.ckpt").read_bytes())
    for _ in range(2):  # the second time, both jobs have finished
        command = ["-m", *tiny, f"hydra.sweep.dir={sweep}", f"model.weights={weights},null"]
        call(train.main, *command)
    found = [read_changes(sweep / n)["model.weights"].strip("'") for n in ("0", "1")]
    assert found == [str(weights), "null"]
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"0", "1"}


def test_stages(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's command line reads as it was meant."""
    started: list[list[str]] = []
    monkeypatch.setattr(stages, "run_train", lambda arguments: started.append(arguments) or 1)
    folder = tmp_path / f"stages {NAME}"
    monkeypatch.setattr(sys, "argv", ["stages.py", *data, f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit):
        stages.main()
    (arguments,) = started
    assert cli.quoted(f"hydra.run.dir={folder / 'fcn32s'}") == arguments[-1]
    cfg: Any = cli.compose([*arguments[:-1], "name=x"])
    assert cfg.data.root == data[1].removeprefix("data.root=")
    assert cfg.data.dataset.images == f"images {NAME}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [["hydra.run.dir=file/x"], ["-m", "hydra.sweep.dir=file/x"]])
def test_folders_that_hydra_cannot_make(
    command: list[str], call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit):
        call(train.main, *command, "data=shapes", "seed=0,1" if "-m" in command else "seed=0")
    message = "error: hydra.run.dir, or hydra.sweep.dir: file/x: Not a directory\n"
    assert capsys.readouterr().err == message


WORK = {
    "predict": "fcn.inference.predictor.predict_files",
    "export": "fcn.checkpoint.write_safetensors",
    "check": "fcn.datamodule.SegmentationDataModule.open",
}


@pytest.mark.parametrize(
    ("script", "output"),
    [
        *(("predict", "file"), ("predict", "file/out")),
        *(("export", "folder"), ("export", "file/a")),
        *(("check", "file"), ("check", "file/out"), ("check", ".")),
    ],
)
def test_output_is_refused_before_the_work(
    script: str, output: str, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For evaluate.py, tests/test_evaluate.py has this."""
    monkeypatch.setattr(WORK[script], lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder/model.safetensors").mkdir(parents=True)
    Path("data_check.png").mkdir()
    Image.new("RGB", (9, 9)).save("photo.png")
    calls: dict[str, Callable[[], Any]] = {
        "check": lambda: check.check(
            cli.build(cli.compose(["data=shapes", "name=x"]), "data"), Path(output)
        ),
        "predict": lambda: predict.predict(
            cli.compose([*given, "input=photo.png", "device=cpu"], "predict")
        ),
        "export": lambda: export.export(cli.compose([*given, "format=safetensors"], "export")),
    }
    given = [f"ckpt={finished_run}", f"output={output}"]
    with pytest.raises(ConfigError, match=rf"^output={output[:4]}.*: (there is|Not a|is a file)"):
        calls[script]()
