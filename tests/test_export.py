"""export.py: files that do what the network does, at any size, and predict.py with them."""

import json
import pickle
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image
from test_predict import noise
from torch import Tensor, nn

import fcn.export as fcn_export
from export import export
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, WeightsError
from fcn.export import ExportError, compare, read_pt2
from fcn.module import SegmentationModule
from fcn.prediction import load_model
from fcn.runs import best_checkpoint
from predict import predict


def run(ckpt: Path, output: Path, *overrides: str) -> Path:
    return export(compose_config("export", f"ckpt={ckpt}", f"output={output}", *overrides))


@pytest.fixture(scope="module")
def ckpt(finished_run: Path) -> Path:
    return best_checkpoint(finished_run)


@pytest.fixture(scope="module")
def pt2(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ckpt, tmp_path_factory.mktemp("pt2") / "model.pt2", "format=torch", "argmax=true")


def images() -> list[Tensor]:
    return [
        torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
        for n, height, width in ((1, 1, 1), (3, 45, 20), (2, 64, 96), (1, 130, 33))
    ]


@pytest.mark.slow
@torch.inference_mode()
def test_torch_program(ckpt: Path, pt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in pt2.parent.iterdir()] == ["model.pt2"]
    extra = dict.fromkeys(("class_names", "palette", "void"), "")
    program = torch.export.load(pt2, extra_files=extra).module()
    assert json.loads(extra["class_names"]) == list(Shapes.classes)
    assert json.loads(extra["palette"]) == [list(colour) for colour in Shapes.palette]
    assert json.loads(extra["void"]) == 255
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for image in images():
        scores, mask = program(image)
        expected = network(image)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
        assert mask.dtype == torch.uint8
        assert torch.equal(mask, scores.argmax(1).to(torch.uint8))


@pytest.mark.slow
@torch.inference_mode()
def test_onnx_file(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = run(ckpt, tmp_path / "model.onnx", "argmax=true")
    assert list(tmp_path.iterdir()) == [path]
    assert "agrees with the network" in capsys.readouterr().out
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(Shapes.classes)
    assert json.loads(metadata["void"]) == 255
    (given,), (scores_out, mask_out) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape) == ("tensor(uint8)", ["batch", 3, "height", "width"])
    assert scores_out.shape == ["batch", 8, "height", "width"]
    assert mask_out.shape == ["batch", "height", "width"]
    network = SegmentationModule.load_from_checkpoint(ckpt).network.eval()
    for image in images():
        scores, mask = session.run(None, {"image": image.numpy()})
        expected = network(image)
        torch.testing.assert_close(torch.from_numpy(scores), expected, atol=1e-5, rtol=1e-4)
        assert np.array_equal(mask, scores.argmax(1))
    plain = onnxruntime.InferenceSession(run(ckpt, tmp_path / "plain.onnx"))
    assert [output.name for output in plain.get_outputs()] == ["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_prediction_with_an_exported_file(
    tmp_path: Path, ckpt: Path, pt2: Path, ending: str
) -> None:
    if ending == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    file = pt2 if ending == "pt2" else run(ckpt, tmp_path / "model.onnx")
    Image.fromarray(noise(70, 101)).save(tmp_path / "x.png")
    if ending == "pt2":
        expected = SegmentationModule.load_from_checkpoint(ckpt).state_dict()
        found = read_pt2(file).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    masks = []
    for source in (ckpt, file):
        options = [f"input={tmp_path / 'x.png'}", f"output={tmp_path / source.suffix[1:]}"]
        options += ["device=cpu", "tta.flip=true", "tta.scales=[0.75,1]", "tile=64"]
        output = predict(compose_config("predict", f"ckpt={source}", *options))
        with Image.open(output / "x.png") as mask:
            masks.append((np.array(mask), mask.getpalette()))
        assert (output / "x_overlay.jpg").is_file()
    assert np.mean(masks[0][0] == masks[1][0]) > 0.999
    assert masks[0][1] == masks[1][1]


def test_a_file_that_disagrees(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(fcn_export.Exported):
        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            scores, *mask = super().forward(image)
            return (scores + 0.01 * scores.abs().amax(), *mask)

    monkeypatch.setattr(fcn_export, "Exported", Off)
    with pytest.raises(ExportError, match="disagrees with the network at 131×97"):
        run(ckpt, tmp_path / "x.pt2", "format=torch")
    assert list(tmp_path.iterdir()) == []


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
    message = "not installed: pip install -r requirements-export.txt"
    with pytest.raises(ConfigError, match=message):
        run(ckpt, tmp_path / "x.onnx")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "x.onnx")


def test_settings_that_cannot_work(ckpt: Path, tmp_path: Path) -> None:
    for overrides, message in (
        (["format=tflite"], "format=tflite: must be onnx, torch or safetensors"),
        (["format=torch"], r"ends with \.pt2"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(ckpt, tmp_path / "x.onnx", *overrides)
    with pytest.raises(WeightsError, match=r"none\.ckpt: no such file"):
        run(tmp_path / "none.ckpt", tmp_path / "x.pt2", "format=torch")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hacked"),)


def test_broken_and_hostile_files(
    tmp_path: Path, pt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a .pt2 is unpickled or evaluated, wherever it is put."""
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Hostile())
    with zipfile.ZipFile(pt2) as source:
        content = {name: source.read(name) for name in source.namelist()}
    for name in {str(Path(name).parent): name for name in content}.values():  # one a folder
        with zipfile.ZipFile("x.pt2", "w") as archive:
            for other, value in content.items():
                archive.writestr(other, bomb if other == name else value)
        with suppress(WeightsError):
            read_pt2(Path("x.pt2"))
    for broken in (b"", b"hello", pt2.read_bytes()[:5000]):
        Path("x.pt2").write_bytes(broken)
        with pytest.raises(WeightsError, match=r"x\.pt2"):
            load_model(Path("x.pt2"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]
