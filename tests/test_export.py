"""export.py: files that do what the network does, at any size, and predict.py with them."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, compose_config
from PIL import Image
from safetensors import safe_open
from test_predict import noise, write_checkpoint
from torch import Tensor, nn

import fcn.inference.export as exporting
from export import export
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, WeightsError
from fcn.inference.export import ExportedNetwork, ExportError, compare, export_program
from fcn.inference.onnx_session import open_session
from fcn.inference.predictor import OUT_OF_MEMORY, load_predictor, predict_files
from fcn.inference.tta import TestTime
from fcn.module import SegmentationModule
from predict import predict

pytestmark = pytest.mark.xdist_group("onnx")  # one worker imports onnxscript and has the fixtures


def run(ckpt: Path, output: Path, *overrides: str) -> Path:
    return export(compose_config("export", f"ckpt={ckpt}", f"output={output}", *overrides))


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"dataset": {"class": "fcn.datasets.folder.Folder", "value_range": [0, 4095]}}
    folder = tmp_path_factory.mktemp("exported")
    return write_checkpoint(folder / "best.ckpt", data=data, image_type="16-bit")


@pytest.fixture(scope="session")
def pt2(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ckpt, tmp_path_factory.mktemp("pt2") / "model.pt2", "format=torch")


@pytest.fixture(scope="session")
def onnx_file(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return run(ckpt, tmp_path_factory.mktemp("onnx") / "model.onnx", "argmax=true")


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
    (given,), (scores_out, mask_out) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 3, "height", "width"])
    assert (scores_out.name, scores_out.shape) == ("scores", ["batch", 8, "height", "width"])
    assert (mask_out.name, mask_out.shape) == ("mask", ["batch", "height", "width"])
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for image in images():
        scores, mask = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), network(image), atol=1e-5, rtol=1e-4)
        assert np.array_equal(mask, scores.argmax(1))


@pytest.mark.slow
def test_prediction_with_an_onnx_file(tmp_path: Path, ckpt: Path, onnx_file: Path) -> None:
    Image.fromarray(noise(70, 101)[..., 0].astype(np.uint16) * 16).save(tmp_path / "x.png")
    masks = []
    for source in (ckpt, onnx_file):
        options = [f"input={tmp_path / 'x.png'}", f"output={tmp_path / source.suffix[1:]}"]
        options += ["device=cpu", "tta.flip=true", "tta.scales=[0.75,1]", "tile=64"]
        output = predict(compose_config("predict", f"ckpt={source}", *options))
        with Image.open(output / "x.png") as mask:
            masks.append((np.array(mask), mask.getpalette()))
        assert (output / "x_overlay.jpg").is_file()
    assert np.mean(masks[0][0] == masks[1][0]) > 0.999
    assert masks[0][1] == masks[1][1]
    for source in (ckpt, onnx_file):  # a program reads an image as the checkpoint does
        predictor = load_predictor(source, "cpu")
        assert (predictor.value_range, predictor.image_type) == ([0, 4095], "16-bit")
    with pytest.raises(ConfigError, match="an ONNX file runs with device=cpu precision=32-true"):
        load_predictor(onnx_file, "cpu", "bf16-mixed")


@pytest.mark.slow
def test_a_file_that_disagrees(
    ckpt: Path, pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is that of another network, whose scores are 1 % higher."""
    monkeypatch.setattr(exporting, "_write_torch", lambda _, part, __: shutil.copy(pt2, part))
    module = SegmentationModule.load_from_checkpoint(ckpt)
    for layer in (module.network.score, *module.network.skips.values()):
        for parameter in layer.parameters():
            parameter.data *= 1.01
    with pytest.raises(ExportError, match="disagrees with the network at 131×97"):
        export_program(module, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argmax", [False, True])
def test_outputs(argmax: bool) -> None:
    image = torch.rand(2, 3, 5, 7)
    scores, *mask = ExportedNetwork(nn.Conv2d(3, 4, 1), argmax)(image)
    assert scores.shape == (2, 4, 5, 7)
    assert len(mask) == argmax
    for found in mask:
        assert found.dtype == torch.uint8
        assert torch.equal(found, scores.argmax(1).to(torch.uint8))


def test_compare_looks_at_masks_and_sizes() -> None:
    network = nn.Conv2d(3, 4, 1)

    def scores(image: Tensor) -> Tensor:
        return network(image.float() / 255)

    class Network(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return scores(image)

    assert compare(lambda image: [scores(image)], Network()) == (0, 1)
    for wrong in (
        lambda image: [scores(image), scores(image).argmin(1)],
        lambda image: [scores(image)[..., :-1]],
        lambda image: [scores(image) * float("nan")],
    ):
        with pytest.raises(ExportError):
            compare(wrong, Network())


def test_missing_packages(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    message = "not installed: pip install -r requirements/export.txt"
    with pytest.raises(ConfigError, match=message):
        run(ckpt, tmp_path / "x.onnx")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(ConfigError, match=message):
        load_predictor(tmp_path / "x.onnx")


def test_settings_that_cannot_work(ckpt: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["format=tflite"], "format=tflite: must be one of onnx, torch, safetensors"),
        (["format=torch"], r"ends with \.pt2"),
        (["argmax=2"], "argmax=2: must be true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(ckpt, tmp_path / "x.onnx", *overrides)
    with pytest.raises(WeightsError, match=r"none\.ckpt: no such file"):
        run(tmp_path / "none.ckpt", tmp_path / "x.pt2", "format=torch")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output=.*file: "):
        run(ckpt, tmp_path / "file" / "x.pt2", "format=torch")


def test_an_onnx_file_that_needs_too_much_memory(tmp_path: Path) -> None:
    """onnxruntime's own error becomes torch's, so that predict.py names the image and goes on."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        make.make_node("Shape", ["image"], ["shape"]),
        make.make_node("Mul", ["shape", "factor"], ["larger"]),
        make.make_node("ConstantOfShape", ["larger"], ["scores"]),
    ]
    given = make.make_tensor_value_info("image", kinds.UINT8, ["n", 3, "h", "w"])
    made = make.make_tensor_value_info("scores", kinds.FLOAT, None)
    factor = make.make_tensor("factor", kinds.INT64, [4], [2**45, 1, 1, 1])
    graph = make.make_graph(nodes, "large", [given], [made], [factor])
    opset = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "x.onnx")
    program, _ = open_session(tmp_path / "x.onnx")
    Image.fromarray(noise(2, 2)).save(tmp_path / "x.png")
    network = TestTime(lambda image: program(image)[0])
    photo = tmp_path / "x.png"
    assert predict_files({photo: tmp_path / "x"}, network, print) == {photo: OUT_OF_MEMORY}


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    """predict.py does not open a .pt2: torch.export.load can run code that is in it."""
    for content in (b"", b"hello"):
        (tmp_path / "x.pt2").write_bytes(content)
        with pytest.raises(WeightsError, match=r"x\.pt2: a \.pt2 is a program") as error:
            load_predictor(tmp_path / "x.pt2")
        assert "\n" not in str(error.value)
    pytest.importorskip("onnxruntime")
    for content in (b"", b"hello"):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(WeightsError, match=r"x\.onnx"):
            load_predictor(tmp_path / "x.onnx")


def test_script(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a shell sees: what was written and what it is for, or exit code 1 and a line."""
    arguments: list[Any] = ["export.py", f"ckpt={ckpt}", "format=safetensors"]
    script = str(PROJECT / "export.py")
    monkeypatch.setattr(sys, "argv", [*arguments, f"output={tmp_path / 'ä=(1)'}"])
    runpy.run_path(script, run_name="__main__")
    assert "ä=(1), 0 MB: takes the place of a checkpoint" in capsys.readouterr().out
    expected = SegmentationModule.load_from_checkpoint(ckpt).state_dict()
    with safe_open(tmp_path / "ä=(1)" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in expected.items())
    monkeypatch.setattr(sys, "argv", [*arguments, f"output={tmp_path / 'x.onnx'}"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(script, run_name="__main__")
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: output=")
    assert len(printed.splitlines()) == 1
