"""Paths with characters that mean something to Hydra, OmegaConf or YAML: every script and command
takes them as they are, wherever a setting is a path."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from test_runs_launch import Recorder, call

import evaluate
import export
import predict
import train
from fcn import cli, memory, stages, visualize
from fcn.datasets import check
from fcn.errors import ConfigError

# Windows allows no double quotes in a name.
NAME = "a=b, (c) [d] {e} $f it's %g" + ("" if sys.platform == "win32" else ' "h"')


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a data set of four pairs; each file and folder of it has such a name."""
    monkeypatch.chdir(tmp_path)
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
def test_every_script_and_command(tmp_path: Path, data: list[str]) -> None:
    def script(main: Callable[[], None], *arguments: str) -> None:
        assert call(main, *arguments) == 0

    run, other, logs = (tmp_path / f"{part} {NAME}" for part in ("run", "other", "logs"))
    check.main([*data, f"output={tmp_path / 'check'} {NAME}"])
    logger = ["+logger.csv._target_=pytorch_lightning.loggers.CSVLogger"]
    logger += [f"+logger.csv.save_dir={logs} ${{x}}"]
    script(train.main, *SETTINGS, *data, *logger, f"hydra.run.dir={run}")
    script(train.main, f"resume={run}", "trainer.max_steps=2")
    ckpt = tmp_path / f"epoch=1-step=2 {NAME} ${{x}}.ckpt"
    ckpt.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    script(train.main, *SETTINGS, *data, f"model.weights={ckpt}", f"hydra.run.dir={other}")

    script(evaluate.main, f"ckpt={ckpt}", f"output={tmp_path / 'e'} {NAME}", "report.images=0")
    script(evaluate.main, f"compare=[{ckpt},{run}]", f"output={tmp_path / 'c'}", "report.images=0")
    image = f"{data[1].removeprefix('data.root=')}/images {NAME}/0.png"
    script(predict.main, f"ckpt={ckpt}", f"input={image}", f"output={tmp_path / 'p'} {NAME}")
    output = f"output={tmp_path / 'x'} {NAME}"
    script(export.main, f"ckpt={ckpt}", output, "format=safetensors")
    visualize.main([str(run), str(other), "--output", f"v {NAME}.png"])
    results = ["check/data_check.png", "e/metrics.json", "p/0.png", "x/model.safetensors"]
    for folder, name in (result.split("/") for result in results):
        assert (tmp_path / f"{folder} {NAME}" / name).is_file(), name
    assert (tmp_path / f"v {NAME}.png").is_file()
    assert list(Path(f"{logs} ${{x}}").rglob("metrics.csv"))
    (row,) = memory.combinations([*SETTINGS, *data, f"model.weights={ckpt}"])
    assert memory.compose(row).data.dataset.train == f"train {NAME}"


@pytest.mark.slow
def test_sweeps(tmp_path: Path, data: list[str]) -> None:
    """A comma separates the values of a sweep, but not where that path exists, or in quotes."""
    recorder, sweep, weights = Recorder(), tmp_path / f"sweep {NAME}", tmp_path / "step=2.ckpt"
    settings = [*data[:2], *map(cli.quoted, data[2:]), "name=x", f"hydra.sweep.dir={sweep}"]
    assert recorder.start("-m", *settings, f"model.weights={weights},null") == 0
    assert [run for _, run, _ in recorder.calls] == [sweep / "0", sweep / "1"]
    configs = [cfg for cfg, _, _ in recorder.calls]
    assert [cfg.model.weights for cfg in configs] == [str(weights), None]
    assert {cfg.data.dataset.images for cfg in configs} == {f"images {NAME}"}
    assert {f"data.root={cfg.data.root}" for cfg in configs} == {data[1]}


def test_stages(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage's command line reads as it was meant."""
    started: list[list[str]] = []
    monkeypatch.setattr(stages, "run_train", lambda arguments: started.append(arguments) or 1)
    folder = tmp_path / f"stages {NAME}"
    monkeypatch.setattr(sys, "argv", ["stages.py", *data, f"hydra.run.dir={folder}"])
    with pytest.raises(SystemExit):
        stages.main()
    ((*arguments, last),) = started
    assert last == cli.quoted(f"hydra.run.dir={folder / 'fcn32s'}")
    cfg: Any = cli.compose([*arguments, "name=x"])
    assert f"data.root={cfg.data.root}" == data[1]
    assert cfg.data.dataset.images == f"images {NAME}"


@pytest.mark.slow
def test_folders_that_hydra_cannot_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for command in (["hydra.run.dir=file/x"], ["-m", "hydra.sweep.dir=file/x", "seed=0,1"]):
        assert call(train.main, *command, "data=shapes") == 1
        message = "error: hydra.run.dir, or hydra.sweep.dir: file/x: Not a directory\n"
        assert capsys.readouterr().err == message


@pytest.mark.slow
def test_output_is_refused_before_the_work(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For evaluate.py, tests/test_evaluate.py has this."""
    works = ["inference.predictor.predict_files", "checkpoint.write_safetensors"]
    for work in (*works, "datamodule.SegmentationDataModule.open"):
        monkeypatch.setattr(f"fcn.{work}", lambda *_, **__: pytest.fail("the work has begun"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder/model.safetensors").mkdir(parents=True)
    Path("data_check.png").mkdir()
    Image.new("RGB", (9, 9)).save("photo.png")
    ckpt, data = f"ckpt={finished_run}", cli.build(cli.compose(["data=shapes", "name=x"]), "data")
    for script, output, options in (
        *((predict.predict, o, ["input=photo.png", "device=cpu"]) for o in ("file", "file/out")),
        *((export.export, o, ["format=safetensors"]) for o in ("folder", "file/a")),
    ):
        message = rf"^output={output[:4]}.*: (there is|Not a|is a file)"
        with pytest.raises(ConfigError, match=message):
            script(cli.compose([ckpt, f"output={output}", *options], script.__name__))
    for output in ("file/out", "."):
        with pytest.raises(ConfigError, match=rf"^output={output[:4]}.*: (there is|Not a)"):
            check.check(data, Path(output))
