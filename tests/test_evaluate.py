"""evaluate.py: its numbers are those of training, its files, what it refuses, comparisons."""

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, compose_config, write_onnx
from torchmetrics.functional.classification import multiclass_confusion_matrix

from evaluate import evaluate
from fcn.checkpoint import best_checkpoint, last_checkpoint, read_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import FCNError
from fcn.evaluation.boundaries import WIDTHS
from fcn.evaluation.candidate import open_candidate
from fcn.inference.tta import TestTime
from fcn.metrics import segmentation_scores
from fcn.module import SegmentationModule
from fcn.precision import best_precision
from train import train

SHAPES = {"class": "fcn.datasets.shapes.Shapes", "size": 48, "val_length": 3}
SCORES = ("miou", "pixel_acc", "mean_acc", "fwiou", "loss")


def evaluated(*arguments: str) -> dict[str, Any]:
    """What metrics.json holds, composed as the command line does."""
    return evaluate(compose_config("evaluate", "accelerator=cpu", *arguments))


def evaluate_checkpoint(ckpt: Path, *overrides: str) -> dict[str, Any]:
    return evaluated(f"ckpt={ckpt}", *overrides)


def changed_checkpoint(run: Path, path: Path, **changes: Any) -> Path:
    """A run's best checkpoint, written to `path` with other entries."""
    content = torch.load(best_checkpoint(run), weights_only=True)
    for name, change in changes.items():
        content[name] = content[name] | change if isinstance(change, dict) else change
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.slow
def test_evaluation_agrees_with_training(tmp_path: Path, tiny_voc: Path) -> None:
    """To the last digit, and in the precision of the training."""
    run = tmp_path / "run"
    settings = [setting for setting in TINY if not setting.startswith("data")]
    settings += ["data=voc2012", f"data.root={tiny_voc}", "data.download=false"]
    settings += ["data.num_workers=0", "data.crop_size=64", "callbacks.curves=null"]
    settings += ["trainer.precision=bf16-mixed", "model.stride=8", "optimizer.lr=0.05"]
    settings += ["data.train_split=val", "data.val_split=train"]  # without split=, that is scored
    summary = train(compose_config("train", *settings, "trainer.max_steps=2"), run)
    metrics = evaluate_checkpoint(last_checkpoint(run))
    for name in SCORES:
        assert metrics[name] == summary[f"val/{name}"], name
    trained = {name: summary[f"val/iou/{name}"] for name in VOC2012.classes}
    assert metrics["iou"] == pytest.approx(trained, rel=0, abs=0, nan_ok=True)
    assert metrics["precision"] == "bf16-mixed"

    folder = run / "evaluation"
    names = ["confusion.csv", "images.csv", "metrics.json", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == names
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
    """On another split, in another folder, with some of the checkpoint's data settings changed."""
    ckpt, output = best_checkpoint(finished_run), tmp_path / "new" / "folder"
    changes = ["data.limit=4", "data.dataset.train_length=5", "data.root='a = b'"]
    metrics = evaluate_checkpoint(ckpt, "split=train", f"output={output}", *changes)
    assert (metrics["split"], metrics["images"]) == ("train", 4)
    assert (output / "images.csv").read_text().splitlines()[1].startswith("train_000000,")
    assert not (finished_run / "evaluation").exists()
    assert metrics["checkpoint"] == str(ckpt)
    data = metrics["data"]
    assert (data["root"], data["dataset"]["train_length"]) == ("a = b", 5)
    assert data["dataset"]["size"] == 48  # the checkpoint's own
    assert "_target_" not in data["dataset"]
    # Shapes at 48 pixels: no pixel is farther than 40 from a boundary.
    assert metrics["boundary_miou"]["40"] == metrics["miou"]
    assert metrics["boundary_miou"]["1"] != metrics["miou"]
    written = json.loads((output / "metrics.json").read_text())
    assert written["boundary_miou"] == metrics["boundary_miou"]
    assert list(written["boundary_miou"]) == [str(w) for w in WIDTHS]


def test_evaluation_needs_no_other_split(tmp_path: Path, finished_run: Path) -> None:
    """As where only CamVid's test frames are, and the run was validated on val."""
    ckpt, output = best_checkpoint(finished_run), f"output={tmp_path / 'output'}"
    absent = ["split=train", "data.val_split=absent", "data.limit=1"]
    metrics = evaluate_checkpoint(ckpt, *absent, output)
    assert (metrics["split"], metrics["images"]) == ("train", 1)


def test_a_checkpoint_replaced_while_it_is_opened(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a run that still trains: weights and settings must be of the same one."""
    ckpt = changed_checkpoint(finished_run, tmp_path / "last.ckpt", global_step=1)
    old = read_checkpoint(ckpt)["state_dict"]["network.score.bias"]

    def replace(path: Path) -> str:
        new = {"network.score.bias": old + 1}
        other = changed_checkpoint(finished_run, tmp_path / "new", global_step=2, state_dict=new)
        other.replace(path)
        return "its checksum"

    monkeypatch.setattr("fcn.evaluation.candidate.sha256", replace)
    candidate = open_candidate(ckpt, accelerator="cpu", precision="32-true")
    assert candidate.checkpoint["global_step"] == 1
    assert torch.equal(candidate.module.network.score.bias, old)


@pytest.fixture(scope="module")
def unlike(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with another label of void pixels, and with other names of classes."""
    folder = tmp_path_factory.mktemp("unlike")
    changes = {"void": {"void": 254}, "names": {"class_names": list("abcdefgh")}}
    return {
        name: changed_checkpoint(finished_run, folder / f"{name}.ckpt", hyper_parameters=change)
        for name, change in changes.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("report.images=-1", "report.images=-1: must be"),
        ("precision=8-bit", "precision=8-bit: must be one of"),
        # Lightning would compute in bfloat16 on a CPU that is asked for float16.
        ("precision=16-mixed", "precision=16-mixed: must be 32-true or bf16-mixed on"),
        ("accelerator=abacus", "accelerator=abacus"),
        ("accelerator=tpu", "accelerator=tpu precision="),  # its package is missing
        ("split=test", ".*no split 'test'"),
        ("tile=8", "tile=8"),
        ("+tta.tile=512", r"tta\.tile=512: must be .*; .* is tile=512$"),
        ("+tta.foo=1", r"tta\.foo=1: must be tta\.flip or tta\.scales"),
        ("data.batch_size=0", "data.batch_size=0: must be"),
        ("data.limt=2", "data: got an unexpected .*'limt'$"),
        ("data.dataset.sise=2", "data: got an unexpected .*'sise'$"),
        ("data=voc2012 data.root={voc}", "the checkpoint has 8 classes, the data 21"),
        ("ckpt={names}", "label 0 is 'a' for the checkpoint, but 'background' for the data"),
        ("ckpt={void}", r".*void\.ckpt has void=254, but all data has 255"),
        ("output=''", "output=: must be"),
        ("output={tmp}/file", "output=.*file: .*is a file, not a folder"),
        ("output={tmp}/taken", "output=.*taken.*: .*a folder of"),
        ("compare=[{run},{names}]", "label 0 is 'background' for A, but 'a' for B"),
        ("compare=[{run}]", ".*must be two"),
        ("compare=[{run},{tmp}/none]", "compare=.*none: no such file$"),
        ("compare=[{run},{run}] ckpt={run}", ".*not both$"),
    ],
)
def test_refused_before_the_work(
    arguments: str,
    message: str,
    finished_run: Path,
    unlike: dict[str, Path],
    tiny_voc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fcn.evaluation.result.score", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    given = [f"output={tmp_path / 'out'}"]
    given += [] if "compare" in arguments else [f"ckpt={finished_run}"]
    paths = {"run": finished_run, "voc": tiny_voc, "tmp": tmp_path, **unlike}
    with pytest.raises(FCNError, match=f"^{message}") as error:
        evaluated(*given, *arguments.format(**paths).split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


CALL = {"_target_": "os.system", "_args_": ["touch hacked"], "command": "touch hacked"}
RESOLVER = "${oc.create:{_target_: os.system, _args_: [touch hacked]}}"
CHOOSE = r"choose the data with data=\.\.\."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (CALL, CHOOSE),
        ({"dataset": RESOLVER}, CHOOSE),
        ({"_target_": "fcn.datamodule.SegmentationDataModule", "dataset": CALL}, CHOOSE),
        ({"dataset": {"_target_": "fcn.datasets.voc2012.Path"}}, CHOOSE),  # it only imports this
        ({"dataset": {"class": "fcn.files.write_text", "path": "hacked"}}, CHOOSE),
        ({"dataset": SHAPES, "root": CALL}, "^data"),
        ({"dataset": SHAPES, "defaults": [{"/logger@_here_": "wandb"}]}, "^data"),
        ({"dataset": SHAPES | {"_args_": [RESOLVER]}}, "^data"),
    ],
)
def test_settings_that_call_code_are_refused(
    data: Any, message: str, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt = changed_checkpoint(finished_run, tmp_path / "x.ckpt", config={"data": data})
    with pytest.raises(FCNError, match=message):
        evaluate_checkpoint(ckpt, "data.limit=1")
    assert list(tmp_path.iterdir()) == [ckpt]


def test_settings_that_look_like_code_are_text(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"dataset": SHAPES, "_target_": "os.system", "root": RESOLVER, "num_workers": 0}
    ckpt = changed_checkpoint(finished_run, tmp_path / "x.ckpt", config={"data": data})
    options = ["output=out", "report.images=0"]
    assert evaluate_checkpoint(ckpt, *options)["data"]["root"] == RESOLVER
    # As the messages of errors say: with data=... the checkpoint's settings are not read.
    options += ["data=shapes", "data.dataset.size=48", "data.dataset.val_length=1"]
    metrics = evaluate_checkpoint(ckpt, *options, "data.num_workers=0")
    assert metrics["data"]["dataset"]["class"] == "fcn.datasets.shapes.Shapes"
    assert metrics["data"]["root"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"x.ckpt", "out"}


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


def test_settings_of_another_program(finished_run: Path, tmp_path: Path) -> None:
    """A checkpoint's data settings need not name everything, such as the data root."""
    data = {"dataset": SHAPES, "num_workers": 0}
    ckpt = changed_checkpoint(finished_run, tmp_path / "x.ckpt", config={"data": data})
    evaluate_checkpoint(ckpt, f"output={tmp_path}", "report.images=0")
    assert "root <code>None</code>" in (tmp_path / "report.html").read_text("ascii")


def test_views_at_test_time(finished_run: Path, tmp_path: Path) -> None:
    """The scores are those of `TestTime`, counted here; without views, nothing changes."""
    ckpt, data = last_checkpoint(finished_run), Shapes(split="val", size=48, val_length=3)
    given = [f"ckpt={ckpt}", f"output={tmp_path}", "report.images=0"]
    metrics, plain = evaluated(*given, "tta.flip=true", "tta.scales=[1,0.5]"), evaluated(*given)
    assert metrics["tta"] == {"flip": True, "scales": [1, 0.5]}
    assert metrics["loss"] != plain["loss"]
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    views = TestTime(network, flip=True, scales=(1, 0.5))
    for found, judged in ((plain, network), (metrics, views)):
        confusion = torch.zeros(8, 8)
        for sample in (data[i] for i in range(3)):
            with torch.inference_mode():
                prediction = judged(sample["image"][None]).argmax(1)[0]
            label = torch.Tensor(sample["mask"]).long()
            confusion += multiclass_confusion_matrix(prediction, label, 8, ignore_index=255)
        expected = segmentation_scores(confusion)
        for name in ("miou", "pixel_acc"):
            assert found[name] == expected[name]


def test_precision_of_a_gpu(finished_run: Path, tmp_path: Path) -> None:
    """On a CPU, a network that was trained in float16 is scored in what this CPU is fast at."""
    ckpt = changed_checkpoint(finished_run, tmp_path / "gpu.ckpt", precision="16-mixed")
    candidate = open_candidate(ckpt, accelerator="cpu")
    assert candidate.trainer.precision == best_precision("cpu")


def test_onnx_files_that_are_refused(tmp_path: Path) -> None:
    """test_export.py has the scores of those that export.py writes."""
    path = tmp_path / "x.onnx"
    wanted = "an ONNX file runs with accelerator=cpu precision"
    for metadata, setting, message in (
        ({}, "accelerator=gpu", wanted),
        ({}, "precision=bf16-mixed", wanted),
        (
            {"value_range": '"x"'},
            "split=val",
            r"x\.onnx: data\.dataset\.value_range=x: must",
        ),
        (None, "split=val", r"x\.onnx was not written by export\.py, or has lost its metadata"),
    ):
        write_onnx(path, metadata)
        with pytest.raises(FCNError, match=message):
            evaluate_checkpoint(path, setting)


@pytest.mark.slow
def test_comparison(finished_run: Path, tmp_path: Path) -> None:
    """A run folder and a checkpoint; both as if judged alone, and the difference."""
    first, other = best_checkpoint(finished_run), tmp_path / "other"
    torch.manual_seed(0)
    weights = {"network.score.weight": torch.randn(8, 8, 1, 1)}
    second = changed_checkpoint(finished_run, last_checkpoint(other), state_dict=weights)
    out = tmp_path / "out"
    out.mkdir()
    evaluated(f"ckpt={first}", f"output={out}", "report.images=0")
    assert (out / "images.csv").is_file()
    metrics = evaluated(f"compare=[{finished_run},{second}]", f"output={out}")
    for key, ckpt in (("a", first), ("b", second)):
        alone = evaluated(f"ckpt={ckpt}", f"output={tmp_path / key}", "report.images=0")
        assert metrics[key]["checkpoint"] == str(ckpt)
        for name in (*SCORES, "boundary_miou"):
            assert metrics[key][name] == alone[name]
    difference = metrics["difference"]
    assert difference["miou"] == metrics["b"]["miou"] - metrics["a"]["miou"] != 0
    assert list(difference["iou"]) == list(Shapes.classes)
    assert {path.name for path in out.iterdir()} == {"metrics.json", "report.html"}
    page = (out / "report.html").read_text("ascii")
    for text in ("B loses most", str(first), str(second)):
        assert text in page

    evaluated(f"compare=[{second},{second}]", "report.images=0")
    assert (other / "comparison" / "report.html").is_file()  # in the run of A
    assert not (other / "evaluation").exists()
