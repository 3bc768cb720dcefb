"""The authors' Caffe nets: geometry, weights under torchfcn's names, its own models as judge."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import compose_config
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate import evaluate
from export import export
from fcn.checkpoint import AT_ONCE, data_settings, last_checkpoint, read_checkpoint, rename
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import WeightsError
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.published import main
from fcn.vgg import MEAN, STD
from fcn.weights import load_weights, torchvision_layers
from predict import predict

State = dict[str, Tensor]
MEAN_BGR = torch.tensor([104.00698793, 116.66876762, 122.67891434])  # torchfcn/datasets/voc.py
VGG16 = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, *[512] * 3), (512, *[512] * 3))
UPSAMPLING = {  # name: kernel; of all four nets
    32: {"upscore": 64},
    16: {"upscore2": 4, "upscore16": 32},
    8: {"upscore2": 4, "upscore_pool4": 4, "upscore8": 16},
}


THIN = 8  # The nets of these tests are so many times thinner than VGG-16.


@pytest.fixture(autouse=True)
def thin_vgg16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torchvision's VGG-16 thin."""
    torch.manual_seed(0)
    configurations = torchvision.models.vgg.cfgs
    thin = [n if n == "M" else n // THIN for n in configurations["D"]]
    monkeypatch.setitem(configurations, "D", thin)


def random_state(stride: int, width: int = 8, classes: int = 21) -> State:
    """As torchfcn names them, of any width; logits are some units large."""
    shapes = {
        f"conv{i}_{j}": (after // THIN, before if before == 3 else before // THIN, 3, 3)
        for i, channels in enumerate(VGG16, 1)
        for j, (before, after) in enumerate(pairwise(channels), 1)
    }
    shapes |= {"fc6": (width, 512 // THIN, 7, 7), "fc7": (width, width, 1, 1)}
    shapes |= {"score_fr": (classes, width, 1, 1)}
    skips = {32: {}, 16: {"pool4": 512}, 8: {"pool4": 512, "pool3": 256}}[stride]
    shapes |= {f"score_{pool}": (classes, wide // THIN, 1, 1) for pool, wide in skips.items()}
    state = {}
    for name, shape in shapes.items():
        std = (2 / torch.Size(shape[1:]).numel()) ** 0.5 / (70 if name == "conv1_1" else 1)
        state[f"{name}.weight"] = torch.empty(shape).normal_(std=std)
        state[f"{name}.bias"] = torch.empty(shape[0]).normal_(std=0.1)
    for name, size in UPSAMPLING[stride].items():  # not bilinear, so that each pixel has its place
        state[f"{name}.weight"] = torch.empty(classes, classes, size, size).normal_(std=0.1)
    return state


def bgr(image: Tensor) -> Tensor:
    """What torchfcn's data set makes of RGB uint8."""
    return image.flip(1).float() - MEAN_BGR[:, None, None]


def photo(height: int, width: int) -> Tensor:
    return torch.randint(256, (1, 3, height, width), dtype=torch.uint8)


def small(**changes: Any) -> FCN:
    options: dict[str, Any] = {"num_classes": 5, "backbone": "vgg_tiny", "head_width": 8}
    return FCN(**options | {"alignment": "caffe"} | changes).eval()


def save(folder: Path, state: State) -> Path:
    """Writes a file as torch did when those nets were converted."""
    torch.save(state, folder / "net.pth", _use_new_zipfile_serialization=False)
    return folder / "net.pth"


# ---- the same logits as PyPI's torchfcn


class ThinConv2d(nn.Conv2d):
    """A convolution as thin as ours."""

    def __init__(self, before: int, after: int, *size: int, **options: int) -> None:
        before, after = (n if n in (3, 21) else n // THIN for n in (before, after))
        super().__init__(before, after, *size, **options)  # type: ignore[arg-type]


@pytest.fixture
def torchfcn_models() -> Iterator[ModuleType]:
    """torchfcn.models, thin; the rest of the package wants others that are not needed here."""
    spec = find_spec("torchfcn")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("no torchfcn: pip install --no-deps -r requirements/torchfcn.txt")
    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("torchfcn")
        package.__path__ = list(spec.submodule_search_locations)
        patch.setitem(sys.modules, "torchfcn", package)
        yield import_module("torchfcn.models")


@pytest.mark.slow
@torch.inference_mode()
def test_logits_equal_torchfcns(
    torchfcn_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 4096 // THIN
    all_tensors = random_state(32) | random_state(16) | random_state(8, width)  # of all four nets
    wide, flat, tall = (33, 47), (5, 74), (100, 61)  # (H, W)
    kinds = [("FCN32s", 32, [wide]), ("FCN16s", 16, [flat])]
    kinds += [("FCN8s", 8, [wide, flat, tall]), ("FCN8sAtOnce", 8, [tall])]
    for kind, stride, sizes in kinds:
        with monkeypatch.context() as patch:
            patch.setattr(nn, "Conv2d", ThinConv2d)
            theirs = getattr(torchfcn_models, kind)(n_class=21).eval()
        state = {name: all_tensors[name] for name in theirs.state_dict()}
        scales = AT_ONCE if kind == "FCN8sAtOnce" else (1.0, 1.0, 1.0)
        for pool, scale in zip(("pool4", "pool3"), scales[1:], strict=True):
            if f"score_{pool}.weight" in state:  # skips count as much as without a scale
                state[f"score_{pool}.weight"] = state[f"score_{pool}.weight"] / scale
        theirs.load_state_dict(state)

        monkeypatch.setattr(
            "fcn.weights.read_weights", lambda *_, state=state: (state, MEAN, STD, {})
        )
        ours = FCN(21, stride, "vgg16", head_width=width, alignment="caffe", pool_scales=scales)
        ours.eval()
        assert load_weights(ours, "fcn_from_caffe.pth") == []
        for size in sizes:
            image = photo(*size)
            expected = theirs(bgr(image))
            assert expected.std() > 0.3
            torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-4)


# ---- geometry


def test_crops_are_those_of_the_authors_prototxts() -> None:
    """`crop_param` in voc-fcn32s, voc-fcn16s and voc-fcn8s of fcn.berkeleyvision.org."""
    assert small(stride=32).offsets == {"image": 19}
    assert small(stride=16).offsets == {"pool4": 5, "image": 27}
    assert small(stride=8).offsets == {"pool4": 5, "pool3": 9, "image": 31}
    for kernel in (1, 7):
        centered = small(stride=8, alignment="centered", head_kernel=kernel)
        assert centered.offsets == {"pool4": 0, "pool3": 0, "image": 0}


def test_checkpoints_from_before_are_centered(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(last_checkpoint(finished_run), weights_only=True)
    assert checkpoint["hyper_parameters"].pop("alignment") == "centered"
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt").network.margin == 0


# ---- weights


def test_each_tensor_has_its_place(tmp_path: Path) -> None:
    state = random_state(8, classes=5)
    network = small(backbone="vgg16")
    assert load_weights(network, save(tmp_path, state)) == []
    own = network.state_dict()
    assert len(own) == len(state)
    places = {"conv1_2": "stages.0.2", "conv3_2": "stages.2.2", "conv5_3": "stages.4.4"}
    places |= {"fc6": "conv6", "fc7": "conv7", "score_fr": "score"}
    places |= {"score_pool4": "skips.pool4", "score_pool3": "skips.pool3"}
    places |= {"upscore2": "upsample.to_pool4", "upscore_pool4": "upsample.to_pool3"}
    places |= {"upscore8": "upsample.to_image_8"}
    for theirs, ours in places.items():
        for kind in ("weight",) if theirs.startswith("up") else ("weight", "bias"):
            assert own[f"{ours}.{kind}"].equal(state[f"{theirs}.{kind}"]), theirs

    image = photo(9, 12)  # BGR to RGB, and its range
    first = network.get_submodule("stages.0.0")
    expected = F.conv2d(bgr(image), state["conv1_1.weight"], state["conv1_1.bias"], padding=1)
    torch.testing.assert_close(first(network.normalize(image)), expected, rtol=0, atol=1e-4)


def test_a_coarser_net_starts_a_finer_one(tmp_path: Path) -> None:
    network = small(backbone="vgg16", stride=16)
    new = ["skips.pool4", "upsample.to_pool4", "upsample.to_image_16"]
    assert load_weights(network, save(tmp_path, random_state(32, classes=5))) == new


def test_misfits_are_named_as_in_the_file(tmp_path: Path) -> None:
    state = random_state(8, classes=5)
    wrong = {"conv6_1.weight": torch.zeros(1), "conv1_1.weight": torch.zeros(8, 1, 3, 3)}
    for options, change, message in (
        ({"alignment": "centered"}, {}, "they need model.alignment=caffe model.backbone=vgg16"),
        ({"backbone": "vgg19"}, {}, "missing: conv3_4.weight, conv3_4.bias, conv4_4.weight"),
        ({}, wrong, "unexpected: conv6_1.weight; wrong shape: conv1_1.weight (8, 1, 3, 3), not (8"),
    ):
        path = save(tmp_path, state | change)
        with pytest.raises(WeightsError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
            load_weights(small(**{"backbone": "vgg16"} | options), path)


def test_imagenet_weights_see_what_they_know(tmp_path: Path) -> None:
    """torchvision's, in a network whose zero is another mean."""
    centered = small(alignment="centered")
    layers, own = torchvision_layers(centered), centered.state_dict()
    state = {rename(name, layers): own[name] for name in own if name.startswith("stages.")}
    caffe = small()
    load_weights(caffe, save(tmp_path, state))
    image = photo(9, 12)
    first = [n.stages[0][0](n.normalize(image))[..., 1:-1, 1:-1] for n in (caffe, centered)]
    torch.testing.assert_close(*first, rtol=0, atol=1e-5)


# ---- the scripts


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A thin FCN-8s in torch's old format, as those of 2017 are."""
    return save(tmp_path, random_state(8))


def network_of(path: Path) -> FCN:
    network = FCN(21, 8, "vgg16", head_width=8, alignment="caffe").eval()
    load_weights(network, path)
    return network


def test_checkpoint_of_a_published_net(published: Path) -> None:
    module = SegmentationModule.load_from_checkpoint(published)
    assert module.class_names == list(VOC2012.classes)
    assert module.fresh_layers == []
    expected = network_of(published).state_dict()
    torch.testing.assert_close(module.network.state_dict(), expected, rtol=0, atol=0)
    data = data_settings(read_checkpoint(published))
    dataset = {"class": "fcn.datasets.voc2012.VOC2012"}
    assert data == {"dataset": dataset, "root": "data", "download": True}


def test_evaluation(published: Path, tiny_voc: Path, tmp_path: Path) -> None:
    """Nothing is given but the file and where the data are."""
    arguments = [f"ckpt={published}", f"data.root={tiny_voc}", f"output={tmp_path}"]
    arguments += ["data.num_workers=0", "data.limit=2", "report.images=0"]
    metrics = evaluate(compose_config("evaluate", *arguments, "accelerator=cpu"))
    assert list(metrics["iou"]) == list(VOC2012.classes)
    assert (metrics["images"], metrics["precision"], metrics["step"]) == (2, "32-true", 0)
    assert metrics["data"]["download"] is True  # of conf/data/voc2012.yaml


def test_prediction(published: Path, tmp_path: Path) -> None:
    """The .pth and what export.py makes of it give the mask of the network itself."""
    image = photo(40, 55)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    safe = tmp_path / "safe"
    export(compose_config("export", f"ckpt={published}", f"output={safe}", "format=safetensors"))
    with torch.inference_mode():
        expected = network_of(published)(image)[0].argmax(0).numpy()
    assert read_checkpoint(safe / "model.safetensors")["hyper_parameters"]["alignment"] == "caffe"
    for ckpt in (published, safe):
        options = [f"ckpt={ckpt}", f"input={tmp_path / 'x.png'}", f"output={tmp_path / 'out'}"]
        output = predict(compose_config("predict", *options, "device=cpu"))
        with Image.open(output / "x.png") as mask:
            assert np.array_equal(np.array(mask), expected), ckpt


def test_at_once(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = tmp_path / "x.ckpt"
    main([str(published), "--at-once", "--output", str(ckpt)])
    assert capsys.readouterr().out == f"{ckpt}\n"
    assert read_checkpoint(ckpt)["hyper_parameters"]["weights"] is None
    module = SegmentationModule.load_from_checkpoint(ckpt)
    assert module.fresh_layers == []
    assert module.network.pool_scales == {"pool5": 1, "pool4": 0.01, "pool3": 1e-4, "pool2": 1e-4}
    staged = network_of(published)
    assert staged.pool_scales == {"pool5": 1, "pool4": 1, "pool3": 1, "pool2": 1}
    assert module.network.conv7.weight.equal(staged.conv7.weight)


def test_conversions_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pth"
    some = {"conv1_1.weight": torch.zeros(1), "fc6.bias": torch.zeros(8)}
    for layer, message in (
        ("upscore", "--at-once: .*x.pth is no FCN-8s"),
        ("upscore8", "x.pth does not fit .* missing: conv1_1.bias, conv1_2.weight"),
    ):
        torch.save(some | {f"{layer}.weight": torch.zeros(1)}, path)
        with pytest.raises(WeightsError, match=r"x\.pth"):
            SegmentationModule.load_from_checkpoint(path)
        with pytest.raises(SystemExit):
            main([str(path), "--at-once"])
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
    assert [*tmp_path.iterdir()] == [path]


def test_a_conversion_keeps_its_input(
    published: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published.parent)
    before = published.rename("net.ckpt").read_bytes()
    for more in ([], ["--output", str(Path("net.ckpt").resolve())]):
        with pytest.raises(SystemExit):
            main(["net.ckpt", *more])
        assert "net.ckpt: is the file to convert" in capsys.readouterr().err
    assert Path("net.ckpt").read_bytes() == before
