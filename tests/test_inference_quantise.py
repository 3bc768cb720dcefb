"""export.py int8=true: the file, what it is compared with, and where its images come from."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image
from test_predict import noise, write_checkpoint

import fcn.inference.quantise as quantising
from evaluate import evaluate
from export import export
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError
from fcn.inference.export import ExportError
from fcn.inference.quantise import Images, folder_images, quantise
from predict import predict

pytestmark = pytest.mark.xdist_group("onnx")  # one worker imports onnxscript and has the fixtures
SHAPES = {"class": "fcn.datasets.shapes.Shapes", "size": 64, "train_length": 6, "val_length": 3}
ADVICE = r"calibrate=FOLDER, or say with data\.root=FOLDER"


def run(ckpt: Path, output: Path, *overrides: str) -> Path:
    return export(compose_config("export", f"ckpt={ckpt}", f"output={output}", *overrides))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network with random scores, whose run was on generated pictures."""
    data = {"dataset": SHAPES, "num_workers": 0}
    return write_checkpoint(tmp_path_factory.mktemp("quantise") / "best.ckpt", data=data)


@pytest.fixture(scope="module")
def exact(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float file."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = tmp_path_factory.mktemp("exact") / "float.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcn.inference.export.SIZES", ((1, 33, 50),))  # test_export.py has all
        return run(ckpt, path, "argmax=true")


def shapes(split: str, count: int) -> list[torch.Tensor]:
    data = Shapes(split=split, size=64, train_length=count, val_length=count)
    return [data[i]["image"] for i in range(count)]


@pytest.fixture(scope="module")
def int8(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "NEEDED", 0.8)  # random scores are nearly equal at many pixels
        quantise(exact, path, Images(shapes("train", 4), shapes("val", 2)))
    return path


@pytest.mark.slow
def test_file(exact: Path, int8: Path) -> None:
    """It takes any size, keeps what export.py has written beside the network, and has the right
    layers in int8, with weights of 7 bits."""
    import onnx
    import onnxruntime

    sessions = [onnxruntime.InferenceSession(path) for path in (exact, int8)]
    (given,), outputs = sessions[1].get_inputs(), sessions[1].get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 3, "height", "width"])
    assert [output.name for output in outputs] == ["scores", "mask"]
    exact_about, about = (session.get_modelmeta().custom_metadata_map for session in sessions)
    assert exact_about.items() <= about.items()
    picture = np.tile(shapes("val", 1)[0].numpy(), (3, 1, 3, 2))  # (3, 3, 192, 128)
    for n, height, width in ((1, 1, 1), (3, 45, 20), (1, 130, 33), (2, 128, 64)):
        image = np.ascontiguousarray(picture[:n, :, :height, :width])
        (expected, _), (scores, mask) = (s.run(None, {"image": image}) for s in sessions)
        assert scores.shape == (n, 8, height, width)
        assert np.array_equal(mask, scores.argmax(1))
    assert np.abs(scores - expected).mean() < 0.2 * np.abs(expected).mean()

    graph = onnx.load(int8).graph
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    whole = {name for name in weights if name.endswith("weight_quantized")}
    assert all(name.startswith(quantising.INT8_LAYERS) for name in whole)
    assert len(whole) == 8 + 2  # the convolutions of a VGG-11; conv6 and conv7
    assert max(np.abs(weights[name].astype(int)).max() for name in whole) == 64
    in_float = {name for name, value in weights.items() if value.ndim == 4} - whole
    assert {name.split(".")[1] for name in in_float} == {"score", "skips", "upsample"}


@pytest.mark.slow
def test_every_cpu_computes_the_same(int8: Path) -> None:
    """Without optimisation, onnxruntime computes the layers in float, from the same weights. In its
    fast integers, sums may stop at 32767 on some CPUs; with weights of 7 bits, they never do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    fast, slow = (onnxruntime.InferenceSession(int8, o) for o in (None, options))
    for image in [*shapes("val", 2), torch.full((3, 64, 64), 255, dtype=torch.uint8)]:
        inputs = {"image": image[None].numpy()}
        one, two = (session.run(["scores"], inputs)[0] for session in (fast, slow))
        assert np.abs(one - two).max() < 0.02 * np.abs(two).max()


@pytest.mark.slow
def test_command(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed, and that evaluate.py and predict.py take the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcn.inference.export.SIZES", ((1, 33, 50),))
        arguments = ["int8=true", "calibrate=4", "data.dataset.val_length=2"]
        path = run(finished_run, tmp_path / "x.onnx", *arguments)
    assert list(tmp_path.iterdir()) == [path]
    printed = capsys.readouterr().out
    assert "of the float file's size; " in printed
    assert " times as fast (" in printed
    assert "of the pixels of 2 other images keep their class" in printed
    options = ["report.images=0", f"output={tmp_path / 'out'}", "accelerator=cpu"]
    expected, found = (
        evaluate(compose_config("evaluate", f"ckpt={file}", *options))
        for file in (finished_run, path)
    )
    assert found["miou"] == pytest.approx(expected["miou"], abs=0.005)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.01)
    assert found["loss"] != expected["loss"]
    Image.fromarray(noise(40, 50)).save(tmp_path / "x.png")
    results = f"output={tmp_path / 'results'}"
    predict(compose_config("predict", f"ckpt={path}", f"input={tmp_path / 'x.png'}", results))
    assert (tmp_path / "results" / "x.png").is_file()


@pytest.mark.slow
def test_file_that_loses_pixels(exact: Path, tmp_path: Path) -> None:
    """It was calibrated with black images, so that no activation of others fits its range."""
    black = [torch.zeros(3, 64, 64, dtype=torch.uint8)]
    with pytest.raises(ExportError, match=r"of the pixels of 2 images keep the class .* 97% are"):
        quantise(exact, tmp_path / "new" / "x.onnx", Images(black, shapes("val", 2)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_size(tmp_path: Path) -> None:
    """Where weights take most of the file, it is a quarter as large."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from fcn.inference.export import export_program
    from fcn.module import SegmentationModule

    module = SegmentationModule(class_names=["a", "b"], backbone="vgg_tiny", head_width=512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcn.inference.export.SIZES", ((1, 33, 50),))
        export_program(module, tmp_path / "float.onnx")
    images = Images(shapes("train", 1), shapes("val", 1))
    found = quantise(tmp_path / "float.onnx", tmp_path / "int8.onnx", images)
    assert found.size == pytest.approx(0.25, abs=0.05)
    assert found.equal == 1  # its scores are still zero
    assert found.images == 1


def test_images_of_a_folder(tmp_path: Path) -> None:
    """They are read as in training; a fifth of them judges, and memory does not depend on sizes."""
    for number in range(6):
        image = Image.fromarray(np.full((4, 5 + number), number * 16 * 256 // 255, np.uint16))
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    calibrating, judging = map(list, folder_images(tmp_path, [0, 4095], "16-bit"))
    assert [image.shape[-1] for image in judging] == [5, 10]
    assert [image.shape[-1] for image in calibrating] == [6, 7, 8, 9]
    assert [int(image.max()) for image in calibrating] == [1, 2, 3, 4]
    assert quantising._batch(torch.zeros(3, 50, 2000)).shape == (1, 3, 50, quantising.SIDE)
    for number in range(1, 6):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(ConfigError, match="1 images in this folder; at least 2 are needed, 40 are"):
        folder_images(tmp_path, None, None)


@pytest.mark.slow
def test_settings_that_cannot_work(tmp_path: Path, ckpt: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    output = tmp_path / "x.onnx"
    for overrides, message in (
        (["format=safetensors"], "int8=true: only format=onnx has it, and this is format=safet"),
        (["format=torch"], "int8=true: only format=onnx has it, and this is format=torch"),
        (["calibrate=0"], "calibrate=0: must be a whole number from 1"),
        (["calibrate=null"], "calibrate=null: must be a whole number from 1"),
        (["calibrate=nowhere"], "calibrate=nowhere: there is no such folder"),
        (["data.train_split=nothing"], ADVICE),
        (["data.batch=1"], ADVICE),
    ):
        with pytest.raises(ConfigError, match=message):
            run(ckpt, output, "int8=true", *overrides)
    voc = {"dataset": {"class": "fcn.datasets.voc2012.VOC2012"}, "root": "nowhere"}
    for data in (voc, None):
        with pytest.raises(ConfigError, match=ADVICE):
            run(write_checkpoint(tmp_path / "other.ckpt", data=data), output, "int8=true")
    with pytest.raises(ConfigError, match="int8=1: must be true or false"):
        run(ckpt, output, "int8=1")
    (tmp_path / "other.ckpt").unlink()
    assert list(tmp_path.iterdir()) == []


def test_default_name(ckpt: Path) -> None:
    from fcn.inference.export import export_path

    assert export_path(None, ckpt, "onnx", int8=True).name == "best_int8.onnx"
    assert export_path(None, ckpt, "onnx").name == "best.onnx"


def test_missing_packages(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install -r requirements/export\.txt"):
        run(ckpt, tmp_path / "x.onnx", "int8=true")
