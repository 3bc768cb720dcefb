"""export.py, fcn/inference/export.py and quantise.py: files that do what the network does, in float
or nearly so in int8, at any size, and evaluate.py and predict.py with them."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config, write_onnx
from PIL import Image
from test_predict import noise, write_12_bits, write_checkpoint
from torch import Tensor

import fcn.inference.export as exporting
import fcn.inference.quantise as quantising
from evaluate import evaluate
from export import export
from fcn.checkpoint import read_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, WeightsError
from fcn.inference.export import ExportError, export_path, export_program
from fcn.inference.onnx_session import open_session
from fcn.inference.predictor import OUT_OF_MEMORY, load_predictor, predict_files
from fcn.inference.quantise import Images, folder_images, quantise
from fcn.inference.tta import TestTime
from fcn.module import SegmentationModule
from predict import predict

pytestmark = pytest.mark.xdist_group("onnx")  # one worker imports onnxscript and has the fixtures


def run(ckpt: Path, output: Path, *overrides: str) -> Path:
    return export(compose_config("export", f"ckpt={ckpt}", f"output={output}", *overrides))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_12_bits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ckpt(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "best.ckpt"
    return write_checkpoint(path, data=data, image_type="16-bit")


@pytest.fixture(scope="module")
def pt2(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ckpt, tmp_path_factory.mktemp("pt2") / "model.pt2", "format=torch")


@pytest.fixture(scope="module")
def onnx_file(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return run(ckpt, tmp_path_factory.mktemp("onnx") / "model.onnx", "argmax=true")


@pytest.fixture(scope="module")
def int8(ckpt: Path, onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from `onnx_file`, instead of from another one just like it."""
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "export_program", lambda _, p, **__: shutil.copy(onnx_file, p))
        patch.setattr(quantising, "NEEDED", 0.8)  # random scores are nearly equal at many pixels
        return run(ckpt, path, "int8=true", "argmax=true", "calibrate=4")


def images() -> list[Tensor]:
    return [
        torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
        for n, height, width in ((1, 1, 1), (3, 45, 20), (2, 64, 96), (1, 130, 33))
    ]


@pytest.mark.slow
@torch.inference_mode()
def test_torch_program(ckpt: Path, pt2: Path) -> None:
    assert [path.name for path in pt2.parent.iterdir()] == ["model.pt2"]
    extra = dict.fromkeys(("class_names", "palette", "void"), "")
    program = torch.export.load(pt2, extra_files=extra).module()
    assert json.loads(extra["class_names"]) == list(Shapes.classes)
    assert json.loads(extra["palette"]) == [list(colour) for colour in Shapes.palette]
    assert json.loads(extra["void"]) == 255
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for image in images():
        (scores,) = program(image)
        torch.testing.assert_close(scores, network(image), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_onnx_file(ckpt: Path, onnx_file: Path) -> None:
    import onnx
    import onnxruntime

    assert list(onnx_file.parent.iterdir()) == [onnx_file]
    onnx.checker.check_model(str(onnx_file), full_check=True)
    session = onnxruntime.InferenceSession(onnx_file)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(Shapes.classes)
    assert json.loads(metadata["void"]) == 255
    axes = [(value.name, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    assert axes == [
        ("image", ["batch", 3, "height", "width"]),
        ("scores", ["batch", 8, "height", "width"]),
        ("mask", ["batch", "height", "width"]),
    ]
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for image in images():
        scores, mask = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), network(image), atol=1e-5, rtol=1e-4)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, scores.argmax(1))


@pytest.mark.slow
@torch.inference_mode()
def test_int8_file(ckpt: Path, onnx_file: Path, int8: Path) -> None:
    """It takes any size, keeps what export.py has written beside the network, and has the right
    layers in int8, with weights of 7 bits: with 8, sums would stop at 32767 on some CPUs."""
    import onnx
    import onnxruntime

    assert list(int8.parent.iterdir()) == [int8]
    exact, session = (onnxruntime.InferenceSession(path) for path in (onnx_file, int8))
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, "height", "width"]]
    about = [s.get_modelmeta().custom_metadata_map.items() for s in (exact, session)]
    assert about[0] <= about[1]
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for n, height, width in ((1, 1, 1), (3, 45, 20), (2, 128, 64)):
        pixels = np.stack([noise(height, width, seed) for seed in range(n)])
        image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        scores, mask = session.run(None, {"image": image})
        assert scores.shape == (n, 8, height, width)
        assert np.array_equal(mask, scores.argmax(1))
    expected = network(torch.from_numpy(image)).numpy()
    assert np.abs(scores - expected).mean() < 0.2 * np.abs(expected).mean()

    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(int8).graph.initializer}
    whole = {name for name in weights if name.endswith("weight_quantized")}
    assert all(name.startswith(quantising.INT8_LAYERS) for name in whole)
    assert len(whole) == 8 + 2  # the convolutions of a VGG-11; conv6 and conv7
    assert {weights[name].dtype for name in whole} == {np.dtype(np.int8)}
    assert max(np.abs(weights[name].astype(int)).max() for name in whole) == 64
    in_float = {name for name, value in weights.items() if value.ndim == 4} - whole
    assert {name.split(".")[1] for name in in_float} == {"score", "skips", "upsample"}


@pytest.mark.slow
def test_pixels_that_int8_loses(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After calibration with black images, no activation of others fits its range."""
    photos = [torch.from_numpy(noise(64, 64, n).copy()).permute(2, 0, 1) for n in range(5)]
    path, black = tmp_path / "new" / "x.onnx", [torch.zeros_like(photos[0])]
    with pytest.raises(ExportError, match=r"of the pixels of 3 images keep the class .* 97% are"):
        quantise(onnx_file, path, Images(black, photos[:3]))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(quantising, "NEEDED", 0.8)  # random scores are nearly equal at many pixels
    found = quantise(onnx_file, path, Images(photos[3:], photos[:3]))
    assert 0.8 <= found.equal < 1
    assert found.size == path.stat().st_size / onnx_file.stat().st_size
    for text in ("% of the float file's size; ", " times as fast (", "of the pixels of 3 other im"):
        assert text in str(found)


def test_images_of_a_folder(tmp_path: Path) -> None:
    """They are read as in training; a fifth of them judges, and memory does not depend on sizes."""
    for number in range(6):
        pixels = np.full((4, 5 + number), number * 16 * 256 // 255, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
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
def test_in_place_of_a_checkpoint(ckpt: Path, onnx_file: Path, int8: Path, tmp_path: Path) -> None:
    """The scores are the checkpoint's within rounding, and images are read as it reads them."""
    Image.fromarray(noise(70, 101)[..., 0].astype(np.uint16) * 16).save(tmp_path / "x.png")
    metrics, masks, palettes = [], [], []
    for file in (ckpt, onnx_file, int8):
        options = [f"ckpt={file}", f"output={tmp_path / file.stem}", "tta.flip=true"]
        more = ["report.images=0", "accelerator=cpu"]
        metrics.append(evaluate(compose_config("evaluate", *options, *more)))
        more = [f"input={tmp_path / 'x.png'}", "device=cpu", "tta.scales=[0.75,1]", "tile=64"]
        output = predict(compose_config("predict", *options, *more))
        assert (output / "x_overlay.jpg").is_file()
        with Image.open(output / "x.png") as mask:
            masks.append(np.array(mask))
            palettes.append(mask.getpalette())
        predictor = load_predictor(file, "cpu")
        assert (predictor.value_range, predictor.image_type) == ([0, 4095], "16-bit")
    assert np.mean(masks[0] == masks[1]) > 0.999
    assert palettes[0] == palettes[1] == palettes[2]
    expected, exact, rounded = metrics
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss"):
        assert exact[name] == pytest.approx(expected[name], rel=1e-3), name
    for name in ("data", "step", "images"):
        assert exact[name] == rounded[name] == expected[name]
    assert rounded["miou"] == pytest.approx(expected["miou"], abs=0.005)
    assert rounded["loss"] == pytest.approx(expected["loss"], rel=0.01)
    assert rounded["loss"] != expected["loss"]
    with pytest.raises(ConfigError, match="an ONNX file runs with device=cpu precision=32-true"):
        load_predictor(onnx_file, "cpu", "bf16-mixed")


def test_a_file_that_disagrees(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of it."""
    module, path = SegmentationModule.load_from_checkpoint(ckpt), tmp_path / "x.pt2"
    monkeypatch.setattr(exporting, "_write_torch", lambda _, part, __: part.touch())

    def export_with(change: Callable[[Tensor], list[Tensor]]) -> Any:
        monkeypatch.setattr(exporting, "_read_torch", lambda _: lambda image: change(module(image)))
        return export_program(module, path, checkpoint=read_checkpoint(ckpt))

    outputs: list[Callable[[Tensor], list[Tensor]]] = [
        lambda scores: [scores * 1.01],
        lambda scores: [scores * math.nan],
        lambda scores: [scores, scores.argmin(1)],
        lambda scores: [scores[..., :-1]],
    ]
    message = r"disagrees with the network at 131×97|gives \(1, 8, 97, 130\), not \(1, 8, 97, 131\)"
    for output in outputs:
        with pytest.raises(ExportError, match=message):
            export_with(output)
        assert list(tmp_path.iterdir()) == []
    assert export_with(lambda scores: [scores]) == (0, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_missing_packages(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    message = "not installed: pip install -r requirements/export.txt"
    with pytest.raises(ConfigError, match=message):
        run(ckpt, tmp_path / "x.onnx")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(ConfigError, match=message):
        load_predictor(tmp_path / "x.onnx")


def test_default_name() -> None:
    for int8, name in ((True, "best_int8.onnx"), (False, "best.onnx")):
        assert export_path(None, Path("best.ckpt"), "onnx", int8=int8).name == name
    assert export_path("~no_user/a.onnx", Path("best.ckpt"), "onnx").name == "a.onnx"


@pytest.mark.slow
def test_settings_that_cannot_work(data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ckpt, int8 = tmp_path / "x.ckpt", "int8=true"
    voc = {"dataset": {"class": "fcn.datasets.voc2012.VOC2012"}, "root": "nowhere"}
    advice = r"calibrate=FOLDER, or say with data\.root=FOLDER"
    for settings, overrides, message in (
        (data, ["format=tflite"], "format=tflite: must be one of onnx, torch, safetensors"),
        (data, ["format=torch"], r"ends with \.pt2"),
        (data, ["argmax=2"], "argmax=2: must be true or false"),
        (data, ["int8=1"], "int8=1: must be true or false"),
        (data, [int8, "format=torch"], "int8=true: only format=onnx has it, and this is format=t"),
        (data, [int8, "calibrate=0"], "calibrate=0: must be a whole number from 1"),
        (data, [int8, "calibrate=nowhere"], "calibrate=nowhere: there is no such folder"),
        (data, [int8, "data.train_split=nothing"], advice),
        (data, [int8, "data.batch=1"], advice),
        (voc, [int8], advice),
        (None, [int8], advice),
    ):
        write_checkpoint(ckpt, data=settings)
        with pytest.raises(ConfigError, match=message):
            run(ckpt, tmp_path / "x.onnx", *overrides)
    assert list(tmp_path.iterdir()) == [ckpt]
    (tmp_path / "y.onnx").touch()
    with pytest.raises(ConfigError, match="an ONNX file is exported already"):
        run(tmp_path / "y.onnx", tmp_path / "z.onnx")


def test_an_onnx_file_that_needs_too_much_memory(tmp_path: Path) -> None:
    """onnxruntime's own error becomes torch's, so that predict.py names the image and goes on."""
    pytest.importorskip("onnxruntime")
    make = pytest.importorskip("onnx").helper
    nodes = [
        make.make_node("Shape", ["image"], ["shape"]),
        make.make_node("Mul", ["shape", "factor"], ["larger"]),
        make.make_node("ConstantOfShape", ["larger"], ["scores"]),
    ]
    given = make.make_tensor_value_info("image", 2, ["n", 3, "h", "w"])  # 2 is uint8, 1 float32
    made = make.make_tensor_value_info("scores", 1, None)
    factor = make.make_tensor("factor", 7, [4], [2**45, 1, 1, 1])  # int64
    graph = make.make_graph(nodes, "large", [given], [made], [factor])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    program, _ = open_session(tmp_path / "x.onnx")
    photo, network = tmp_path / "x.png", TestTime(lambda image: program(image)[0])
    Image.fromarray(noise(2, 2)).save(photo)
    assert predict_files({photo: tmp_path / "x"}, network, print) == {photo: OUT_OF_MEMORY}


def test_the_data_root_of_an_onnx_file(tmp_path: Path) -> None:
    """predict.py format=voc finds the images where the run had them."""
    path = tmp_path / "x.onnx"
    for data, root in (({"dataset": {"class": "x"}, "root": "/data"}, "/data"), ("x", None)):
        write_onnx(path, {"config": json.dumps({"data": data})})
        assert load_predictor(path, "cpu").data_root == root


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    """predict.py does not open a .pt2: torch.export.load can run code that is in it."""
    pytest.importorskip("onnxruntime")
    for name, message in (("x.pt2", r"x\.pt2: a \.pt2 is a program"), ("x.onnx", r"x\.onnx")):
        for content in (b"", b"hello"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(WeightsError, match=message) as error:
                load_predictor(tmp_path / name)
            assert "\n" not in str(error.value)
