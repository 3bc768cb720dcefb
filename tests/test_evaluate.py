"""evaluate.py: its numbers are those of training, its files, what it refuses, comparisons."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, compose_config, train_tiny
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from evaluate import evaluate
from export import export
from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, DataError, FCNError, WeightsError
from fcn.evaluation.boundaries import WIDTHS
from fcn.evaluation.candidate import open_candidate
from fcn.inference.onnx_session import METADATA
from fcn.inference.tta import TestTime
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.precision import best_precision
from train import train


def evaluated(*arguments: str) -> dict[str, Any]:
    """What metrics.json holds, composed as the command line does."""
    return evaluate(compose_config("evaluate", *arguments, "accelerator=cpu"))


def evaluate_checkpoint(ckpt: Path, *overrides: str) -> dict[str, Any]:
    return evaluated(f"ckpt={ckpt}", *overrides)


def train_voc(run: Path, tiny_voc: Path, *overrides: str) -> dict[str, Any]:
    """A run on the tiny VOC tree; what summary.json holds."""
    tiny = [o for o in TINY if not o.startswith("data")]
    voc = ["data=voc2012", f"data.root={tiny_voc}", "data.download=false", "data.num_workers=0"]
    return train(compose_config("train", *tiny, *voc, "data.crop_size=64", *overrides), run)


@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_evaluation_agrees_with_training(tmp_path: Path, tiny_voc: Path, precision: str) -> None:
    run = tmp_path / "run"
    options = [f"trainer.precision={precision}", "model.stride=8", "optimizer.lr=0.05"]
    options += ["data.train_split=val", "data.val_split=train"]  # without split=, that is scored
    summary = train_voc(run, tiny_voc, "trainer.max_steps=2", *options)
    metrics = evaluate_checkpoint(last_checkpoint(run))
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss"):
        assert metrics[name] == summary[f"val/{name}"], name  # to the last digit
    for name, iou in metrics["iou"].items():
        trained = summary[f"val/iou/{name}"]
        assert iou == trained or (math.isnan(iou) and math.isnan(trained)), name
    assert metrics["precision"] == precision

    folder = run / "evaluation"
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "confusion.csv",
        "report.html",
        "images.csv",
    }
    written = json.loads((folder / "metrics.json").read_text())
    assert written["miou"] == metrics["miou"]
    assert list(written["iou"]) == list(VOC2012.classes)
    assert (written["split"], written["images"]) == ("train", 6)
    assert written["images_per_second"] > 0
    data = VOC2012(split="train", root=tiny_voc)
    masks = [data[i]["mask"].numpy() for i in range(len(data))]
    with (folder / "confusion.csv").open(newline="") as file:
        header, *table = csv.reader(file)
    assert header[1:] == [row[0] for row in table] == list(VOC2012.classes)
    confusion = np.array([row[1:] for row in table], dtype=np.int64)
    labels = np.concatenate([mask.ravel() for mask in masks])
    expected = np.bincount(labels[labels != 255], minlength=21)
    assert np.array_equal(confusion.sum(1), expected)
    assert metrics["pixel_acc"] == pytest.approx(np.trace(confusion) / confusion.sum())

    with (folder / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert [row["id"] for row in images] == data.ids
    counts = [(mask != 255).sum() for mask in masks]
    accuracies = [float(row["pixel_acc"]) for row in images]
    assert np.average(accuracies, weights=counts) == pytest.approx(metrics["pixel_acc"])
    assert all(0 <= float(row["miou"]) <= 1 for row in images)


def test_evaluation_elsewhere(tmp_path: Path, finished_run: Path) -> None:
    ckpt, output = best_checkpoint(finished_run), tmp_path / "new" / "folder"
    metrics = evaluate_checkpoint(ckpt, "split=train", f"output={output}", "data.limit=4")
    assert metrics["split"] == "train"
    assert metrics["images"] == 4
    assert (output / "images.csv").read_text().splitlines()[1].startswith("train_000000,")
    assert not (finished_run / "evaluation").exists()
    assert metrics["checkpoint"] == str(ckpt)
    # Shapes at 48 pixels: no pixel is farther than 40 from a boundary.
    assert metrics["boundary_miou"]["40"] == metrics["miou"]
    assert metrics["boundary_miou"]["1"] != metrics["miou"]
    written = json.loads((output / "metrics.json").read_text())
    assert written["boundary_miou"] == metrics["boundary_miou"]
    assert list(written["boundary_miou"]) == [str(w) for w in WIDTHS]


def test_evaluation_with_other_classes(tmp_path: Path, finished_run: Path, tiny_voc: Path) -> None:
    options = ["data=voc2012", f"data.root={tiny_voc}", f"output={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"the checkpoint has 8 classes, the data 21"):
        evaluate_checkpoint(last_checkpoint(finished_run), *options)
    others = ["data=folder", "data.dataset.classes=[a,b,c,d,e,f,g,h]"]
    with pytest.raises(ConfigError, match=r"^label 0 is 'background' for the checkpoint, but 'a' "):
        evaluate_checkpoint(last_checkpoint(finished_run), *others)
    with pytest.raises(DataError, match="no split 'test'"):
        evaluate_checkpoint(last_checkpoint(finished_run), "split=test")
    assert not (tmp_path / "out").exists()


CALL = {"_target_": "os.system", "_args_": ["touch hacked"], "command": "touch hacked"}
RESOLVER = "${oc.create:{_target_: os.system, _args_: [touch hacked]}}"
HOSTILE: dict[str, Any] = {
    "function": CALL,
    "nested": {"_target_": "fcn.datamodule.SegmentationDataModule", "dataset": CALL},
    "in a list": {"dataset": [1, CALL]},
    "in a tuple": {"dataset": (1, CALL)},
    "borrowed from our module": {"_target_": "fcn.runs.subprocess.call", "args": ["touch"]},
    "borrowed from a data set": {"dataset": {"_target_": "fcn.datasets.voc2012.Path"}},
    "our own, but no data": {"dataset": {"class": "fcn.files.write_text", "path": "hacked"}},
    "not for data": {"_target_": "fcn.training.metrics_csv.MetricsCSV", "path": "hacked"},
    "another group": {"defaults": [{"/logger@_here_": "wandb"}], "save_dir": "hacked"},
    "resolver": {"dataset": RESOLVER},
}


def hostile_checkpoint(ckpt: Path, finished_run: Path, data: Any) -> None:
    """A checkpoint whose data settings are these."""
    checkpoint = torch.load(last_checkpoint(finished_run), weights_only=True)
    torch.save(checkpoint | {"config": {"data": data}}, ckpt)


@pytest.mark.slow
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_settings_that_call_code_are_refused(
    tmp_path: Path, finished_run: Path, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt = tmp_path / "x.ckpt"
    hostile_checkpoint(ckpt, finished_run, data)
    with pytest.raises((WeightsError, DataError), match=r"choose the data with data=\.\.\."):
        evaluate_checkpoint(ckpt, "data.limit=1")
    assert list(tmp_path.iterdir()) == [ckpt]


@pytest.mark.slow
def test_other_hostile_settings(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks like code in an argument is only a text; other keys are refused."""
    monkeypatch.chdir(tmp_path)
    ckpt = tmp_path / "x.ckpt"
    shapes = {"_target_": "fcn.datasets.shapes.Shapes", "size": 48, "val_length": 1}
    for more in (
        {"root": CALL},
        {"defaults": [{"/logger@_here_": "wandb"}]},
        {"dataset": shapes | {"_convert_": "all"}},
        {"dataset": shapes | {"_args_": [RESOLVER]}},
    ):
        hostile_checkpoint(ckpt, finished_run, {"dataset": shapes} | more)
        with pytest.raises(ConfigError, match=r"^data"):
            evaluate_checkpoint(ckpt)
    assert list(tmp_path.iterdir()) == [ckpt]
    target = {"_target_": "os.system", "root": RESOLVER, "num_workers": 0}
    hostile_checkpoint(ckpt, finished_run, {"dataset": shapes} | target)
    assert evaluate_checkpoint(ckpt, "output=out", "report.images=0")["data"]["root"] == RESOLVER
    # As the messages say: with data=... the checkpoint's settings are not read.
    chosen = ["data=shapes", "data.dataset.size=48", "data.dataset.val_length=1"]
    metrics = evaluate_checkpoint(
        ckpt, *chosen, "data.num_workers=0", "output=out", "report.images=0"
    )
    assert metrics["data"]["dataset"]["class"] == "fcn.datasets.shapes.Shapes"
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt", "out"}


@pytest.mark.slow
def test_data_on_the_command_line(tmp_path: Path, finished_run: Path) -> None:
    """Without data=..., any key changes the checkpoint's own settings; with it, those are gone."""
    output = f"output={tmp_path / 'out'}"
    changes = ["data.limit=2", "data.dataset.val_length=5", "data.root='a = b'"]
    metrics = evaluate_checkpoint(finished_run, *changes, output)
    assert metrics["images"] == 2
    data = metrics["data"]
    assert data["dataset"]["val_length"] == 5
    assert data["root"] == "a = b"
    assert data["dataset"]["size"] == 48  # the checkpoint's own
    assert "_target_" not in data["dataset"]

    for wrong in ("data.limt", "data.dataset.sise"):
        name = wrong.rpartition(".")[2]
        with pytest.raises(ConfigError, match=f"^data: got an unexpected .*'{name}'$"):
            evaluate_checkpoint(finished_run, f"{wrong}=2", output)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("report.images=-1", "report.images=-1: must be"),
        ("precision=8-bit", "precision=8-bit: must be one of"),
        ("accelerator=abacus", "accelerator=abacus"),
        ("split=1", "split=1: must be"),
        ("output=''", "output=: must be"),
        ("data.batch_size=0", "data.batch_size=0: must be"),
    ],
)
def test_settings_that_cannot_work(finished_run: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        evaluate(compose_config("evaluate", f"ckpt={finished_run}", setting))
    assert len(str(error.value).splitlines()) == 1
    assert not (finished_run / "evaluation").exists()


def test_error_of_evaluation_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "ckpt=none.ckpt"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(PROJECT / "evaluate.py"), run_name="__main__")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: ckpt=none.ckpt: no such file\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_views_at_test_time(finished_run: Path, tmp_path: Path) -> None:
    """The scores are those of `TestTime`, counted here; without views, nothing changes."""
    ckpt = last_checkpoint(finished_run)
    metrics = evaluated(f"ckpt={ckpt}", f"output={tmp_path}", "tta.flip=true", "tta.scales=[1,0.5]")
    plain = evaluated(f"ckpt={ckpt}", f"output={tmp_path}")
    assert metrics["tta"] == {"flip": True, "scales": [1, 0.5]}
    assert metrics["loss"] != plain["loss"]
    module = SegmentationModule.load_from_checkpoint(ckpt).eval()
    for options, expected in (({}, plain), ({"flip": True, "scales": (1, 0.5)}, metrics)):
        network, confusion = TestTime(module.network, **options), torch.zeros(8, 8)  # type: ignore[arg-type]
        data = Shapes(split="val", size=48, val_length=3)
        for i in range(3):
            mask: Tensor = data[i]["mask"]
            with torch.inference_mode():
                prediction = network(data[i]["image"][None]).argmax(1)[0]
            confusion += multiclass_confusion_matrix(
                prediction, torch.Tensor(mask).long(), num_classes=8, ignore_index=255
            )
        assert segmentation_scores(confusion)["miou"] == expected["miou"]
        assert segmentation_scores(confusion)["pixel_acc"] == expected["pixel_acc"]


def test_precision_that_the_device_lacks(finished_run: Path, tmp_path: Path) -> None:
    """Lightning computes in bfloat16 on a CPU that is asked for float16."""
    with pytest.raises(ConfigError, match=r"precision=16-mixed: must be 32-true or bf16-mixed on"):
        evaluate_checkpoint(finished_run, "precision=16-mixed", f"output={tmp_path / 'out'}")
    content = torch.load(best_checkpoint(finished_run), weights_only=True)
    torch.save({**content, "precision": "16-mixed"}, tmp_path / "gpu.ckpt")
    candidate = open_candidate(tmp_path / "gpu.ckpt", accelerator="cpu")
    assert candidate.trainer.precision == best_precision("cpu")


@pytest.mark.xdist_group("onnx")
@pytest.mark.slow
def test_exported_files(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores are the checkpoint's within rounding, also at test time."""
    monkeypatch.setattr("fcn.inference.export.SIZES", ((1, 33, 50),))  # test_export has all
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    options = ["tta.flip=true", "report.images=1", f"output={tmp_path / 'out'}"]
    expected = evaluate_checkpoint(finished_run, *options)
    paths = {"safetensors": tmp_path / "x", "onnx": tmp_path / "x.onnx"}
    for format, path in paths.items():
        export(
            compose_config("export", f"ckpt={finished_run}", f"output={path}", f"format={format}")
        )
        metrics = evaluate_checkpoint(path, *options)
        for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3), (format, name)
        assert metrics["iou"].keys() == expected["iou"].keys()
        assert (metrics["step"], metrics["images"]) == (expected["step"], expected["images"])
        assert metrics["data"] == expected["data"]

    for setting in ("accelerator=gpu", "precision=bf16-mixed"):
        with pytest.raises(ConfigError, match=r"an ONNX file runs with accelerator=cpu precision"):
            evaluate(compose_config("evaluate", f"ckpt={paths['onnx']}", setting))


def test_onnx_file_of_others(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    info = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("image", "scores")]
    node = onnx.helper.make_node("Identity", ["image"], ["scores"])
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    model = onnx.helper.make_model(graph, ir_version=8)
    for about, message in (
        ({}, r"x\.onnx was not written by export\.py, or has lost its"),
        (dict.fromkeys(METADATA, "null"), r"x\.onnx: class_names=null: must be a list of"),
        (
            dict.fromkeys(METADATA, "null")
            | {"class_names": '["a", "b"]', "void": "255", "value_range": '"x"'},
            r"x\.onnx: data\.dataset\.value_range=x: must be null or two numbers",
        ),
    ):
        onnx.helper.set_model_props(model, about)
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(WeightsError, match=message):
            evaluate_checkpoint(tmp_path / "x.onnx")


def test_a_void_label_that_is_not_the_datas(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(best_checkpoint(finished_run), weights_only=True)
    checkpoint["hyper_parameters"]["void"] = 254
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"x\.ckpt has void=254, but the data 255"):
        evaluate_checkpoint(tmp_path / "x.ckpt", f"output={tmp_path / 'out'}")


def test_output_is_refused_before_the_work(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcn.evaluation.result.score", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    for output, message in (
        ("file", "is a file, not a folder"),
        ("file/x", "Not a dir"),
        ("out", "a folder of"),
    ):
        with pytest.raises(ConfigError, match=f"^output=.*{output}.*: .*{message}"):
            evaluate_checkpoint(finished_run, f"output={tmp_path / output}")


@pytest.mark.parametrize("setting", ["tta.scales=[]", "tta.scales=[0]", "tile=8"])
def test_impossible_views(finished_run: Path, tmp_path: Path, setting: str) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        evaluated(f"ckpt={finished_run}", f"output={output}", setting)
    assert not output.exists()


@pytest.mark.slow
def test_comparison(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder and a checkpoint; both as if judged alone, and the difference."""
    other = tmp_path / "other"
    train_tiny(other, "model.head_width=12", "optimizer.lr=0.01")
    pair = f"compare=[{finished_run},{last_checkpoint(other)}]"
    metrics = evaluated(pair, f"output={tmp_path / 'out'}")
    for key, run in (("a", best_checkpoint(finished_run)), ("b", last_checkpoint(other))):
        alone = evaluated(f"ckpt={run}", f"output={tmp_path / key}")
        assert metrics[key]["checkpoint"] == str(run)
        for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss", "boundary_miou"):
            assert metrics[key][name] == alone[name]
    difference = metrics["difference"]
    assert difference["miou"] == metrics["b"]["miou"] - metrics["a"]["miou"]
    assert list(difference["iou"]) == list(Shapes.classes)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"metrics.json", "report.html"}
    page = (tmp_path / "out" / "report.html").read_text("ascii")
    assert "B loses most" in page
    assert str(best_checkpoint(finished_run)) in page
    assert str(last_checkpoint(other)) in page

    evaluated(f"compare=[{other},{other}]", "report.images=0")
    assert (other / "comparison" / "report.html").is_file()  # in the run of A
    assert not (other / "evaluation").exists()


@pytest.mark.slow
def test_comparisons_that_cannot_be(finished_run: Path, tmp_path: Path, tiny_voc: Path) -> None:
    run = tmp_path / "voc"
    train_voc(run, tiny_voc, "trainer.max_steps=1")
    for arguments, message in (
        (
            (f"compare=[{finished_run},{run}]",),
            r"^A has 8 classes, B 21: they must be",
        ),
        ((f"compare=[{finished_run}]",), r"must be two"),
        ((f"compare={finished_run}",), r"must be two"),
        ((f"compare=[{finished_run},{tmp_path / 'none'}]",), r"none: no such file$"),
        ((f"compare=[{run},{run}]", f"ckpt={run}"), r"not both$"),
    ):
        with pytest.raises(FCNError, match=message) as error:
            evaluated(*arguments, f"output={tmp_path / 'out'}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
