"""The authors' Caffe nets: geometry, weights under torchfcn's names, its own models as judge."""

import re
import sys
from collections.abc import Callable, Iterator
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
from conftest import compose_config, train_tiny
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evaluate import evaluate
from export import export
from fcn.checkpoint import (
    AT_ONCE,
    data_settings,
    find_checkpoint,
    last_checkpoint,
    read_checkpoint,
)
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, WeightsError
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.published import main
from fcn.vgg import MEAN, STD
from fcn.weights import load_weights
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


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file as torch did when those nets were converted."""

    def _save(state: State, name: str = "fcn8s_from_caffe.pth") -> Path:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
        return tmp_path / name

    return _save


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
    kinds = {
        "FCN32s": (32, [wide]),
        "FCN16s": (16, [flat]),
        "FCN8s": (8, [wide, flat, tall]),
        "FCN8sAtOnce": (8, [tall]),
    }
    for kind, (stride, sizes) in kinds.items():
        with monkeypatch.context() as patch:
            patch.setattr(nn, "Conv2d", ThinConv2d)
            theirs = getattr(torchfcn_models, kind)(n_class=21).eval()
        state = {name: all_tensors[name] for name in theirs.state_dict()}
        scales = AT_ONCE if kind == "FCN8sAtOnce" else (1.0, 1.0, 1.0)
        for pool, scale in zip(("pool4", "pool3"), scales[1:], strict=True):
            if scale != 1:  # its skips count as much as the others'
                state[f"score_{pool}.weight"] = state[f"score_{pool}.weight"] / scale
        theirs.load_state_dict(state)

        monkeypatch.setattr("fcn.weights.read_weights", lambda *_, state=state: (state, MEAN, STD))
        ours = FCN(21, stride, "vgg16", head_width=width, alignment="caffe", pool_scales=scales)
        ours.eval()
        assert load_weights(ours, "fcn_from_caffe.pth") == []
        for size in sizes:
            image = photo(*size)
            expected = theirs(bgr(image))
            assert expected.std() > 0.3
            torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-4)


# ---- geometry


@pytest.mark.parametrize(
    ("stride", "offsets"),
    [
        (32, {"image": 19}),
        (16, {"pool4": 5, "image": 27}),
        (8, {"pool4": 5, "pool3": 9, "image": 31}),
    ],
)
def test_crops_are_those_of_the_authors_prototxts(stride: int, offsets: dict[str, int]) -> None:
    """`crop_param` in voc-fcn32s, voc-fcn16s and voc-fcn8s of fcn.berkeleyvision.org."""
    assert small(stride=stride).offsets == offsets
    for kernel in (1, 3, 7):
        centered = small(stride=stride, alignment="centered", head_kernel=kernel)
        assert centered.offsets == dict.fromkeys(offsets, 0)


@torch.inference_mode()
def test_both_alignments_lay_the_maps_on_each_other() -> None:
    """Their cells lie 3 pixels apart (99 = 3 * 32 + 3); inside, they agree on an image moved so."""
    caffe, centered = small(), small(alignment="centered")
    for name, parameter in caffe.named_parameters():
        if name.startswith(("score", "skips")):
            nn.init.normal_(parameter, std=0.1)
    centre = caffe.conv6.weight[:, :, 3, 3].clone()  # a smaller field of view
    caffe.conv6.weight.zero_()[:, :, 3, 3] = 7 * centre
    centered.load_state_dict(caffe.state_dict())
    centered.mean.copy_(caffe.mean)
    image = photo(256, 256)
    inside = slice(112, 144)  # this VGG sees about 75 pixels each way, upsampling one cell more
    here = caffe(image)[..., inside, inside]
    there = centered(F.pad(image, (3, 29, 3, 29)))[..., 3:, 3:][..., inside, inside]
    assert here.std() > 0.1
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5 * here.abs().max().item())


@pytest.mark.parametrize("fusion", ["score", "feature"])
@pytest.mark.parametrize("stride", [32, 16, 8])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(stride: int, fusion: str) -> None:
    network = small(stride=stride, fusion=fusion, pooling="avg" if fusion == "feature" else "max")
    for size in ((1, 1), (26, 27), (59, 3)):  # 26 + 6 pixels are the last in a cell
        assert network(photo(*size)).shape == (1, 5, *size)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="alignment=left: must be centered or caffe"):
        small(alignment="left")
    with pytest.raises(ValueError, match="head_kernel=3: must be 7 with alignment=caffe"):
        small(head_kernel=3)


@pytest.mark.slow
def test_training_keeps_the_alignment(tmp_path: Path) -> None:
    """Trained, saved and opened again; every layer learns."""
    changes = ["model=fcn8s", "model.alignment=caffe", "model.head_kernel=7", "trainer.max_steps=1"]
    changes += ["trainer.val_check_interval=1", "data.dataset.val_length=1", "data.batch_size=1"]
    train_tiny(tmp_path / "run", *changes)
    module = SegmentationModule.load_from_checkpoint(last_checkpoint(tmp_path / "run"))
    assert module.hparams["alignment"] == "caffe"
    assert module.network.offsets == {"pool4": 5, "pool3": 9, "image": 31}
    module.network.train()
    loss = F.cross_entropy(module.network(photo(20, 30)), torch.randint(8, (1, 20, 30)))
    loss.backward()
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name
    with pytest.raises(ConfigError, match=r"head_kernel=3: must be 7 with alignment=caffe"):
        train_tiny(tmp_path / "other", "model.alignment=caffe")


def test_checkpoints_from_before_are_centered(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(last_checkpoint(finished_run), weights_only=True)
    assert checkpoint["hyper_parameters"].pop("alignment") == "centered"
    torch.save(checkpoint, tmp_path / "x.ckpt")
    assert SegmentationModule.load_from_checkpoint(tmp_path / "x.ckpt").network.margin == 0


# ---- weights


def test_each_tensor_has_its_place(save: Callable) -> None:
    state = random_state(8, classes=5)
    network = small(backbone="vgg16")
    assert load_weights(network, save(state)) == []
    own = network.state_dict()
    assert len(own) == len(state)
    places = {
        "conv1_2": "stages.0.2",
        "conv3_2": "stages.2.2",
        "conv5_3": "stages.4.4",
        "fc6": "conv6",
        "fc7": "conv7",
        "score_fr": "score",
        "score_pool4": "skips.pool4",
        "score_pool3": "skips.pool3",
        "upscore2": "upsample.to_pool4",
        "upscore_pool4": "upsample.to_pool3",
        "upscore8": "upsample.to_image_8",
    }
    for theirs, ours in places.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                assert own[f"{ours}.{kind}"].equal(state[f"{theirs}.{kind}"]), theirs

    image = photo(9, 12)  # BGR to RGB, and its range
    first = network.get_submodule("stages.0.0")
    expected = F.conv2d(bgr(image), state["conv1_1.weight"], state["conv1_1.bias"], padding=1)
    torch.testing.assert_close(first(network.normalize(image)), expected, rtol=0, atol=1e-4)


def test_a_coarser_net_starts_a_finer_one(save: Callable) -> None:
    network = small(backbone="vgg16", stride=16)
    new = ["skips.pool4", "upsample.to_pool4", "upsample.to_image_16"]
    assert load_weights(network, save(random_state(32, classes=5))) == new


MISFITS: dict[str, tuple[dict[str, Any], Callable[[State], object], str]] = {
    "default alignment": (
        {"alignment": "centered"},
        lambda s: None,
        "authors' Caffe nets: they need model.alignment=caffe model.backbone=vgg16",
    ),
    "another VGG": (
        {"backbone": "vgg19"},
        lambda s: None,
        "missing: conv3_4.weight, conv3_4.bias, conv4_4.weight",
    ),
    "finer in coarser": (
        {"stride": 16},
        lambda s: None,
        "missing: upscore16.weight; unexpected: score_pool3.weight, score_pool3.bias, upscore_",
    ),
    "missing": ({}, lambda s: s.pop("conv4_2.bias"), "missing: conv4_2.bias."),
    "unexpected": (
        {},
        lambda s: s.update({"x": s["fc6.bias"], "conv6_1.weight": s["fc6.bias"]}),
        "unexpected: x, conv6_1.weight.",
    ),
    "shape": (
        {},
        lambda s: s.update({"conv1_1.weight": torch.zeros(8, 1, 3, 3)}),
        "wrong shape: conv1_1.weight (8, 1, 3, 3), not (8, 3, 3, 3).",
    ),
    "NaN": ({}, lambda s: s["fc7.bias"].fill_(torch.nan), "NaN or Inf: fc7.bias."),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_named_as_in_the_file(case: str, save: Callable) -> None:
    options, change, message = MISFITS[case]
    state = random_state(8, classes=5)
    change(state)
    path = save(state)
    with pytest.raises(WeightsError) as caught:
        load_weights(small(**{"backbone": "vgg16"} | options), path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_imagenet_weights_see_what_they_know(save: Callable) -> None:
    """torchvision's, in a network whose zero is another mean."""
    centered = small(alignment="centered")
    names = {"stages.0.0": 0, "stages.1.0": 3, "stages.2.0": 6, "stages.2.2": 8}
    names |= {"stages.3.0": 11, "stages.3.2": 13, "stages.4.0": 16, "stages.4.2": 18}
    state = {
        f"features.{number}.{kind}": centered.state_dict()[f"{layer}.{kind}"]
        for layer, number in names.items()
        for kind in ("weight", "bias")
    }
    caffe = small()
    load_weights(caffe, save(state, "vgg11.pth"))
    image = photo(9, 12)
    first = [n.get_submodule("stages.0.0")(n.normalize(image)) for n in (caffe, centered)]
    inside = [x[..., 1:-1, 1:-1] for x in first]
    torch.testing.assert_close(*inside, rtol=0, atol=1e-5)


# ---- the scripts


@pytest.fixture
def published(save: Callable[..., Path]) -> Path:
    """A thin FCN-8s in torch's old format, as those of 2017 are."""
    return save(random_state(8))


def network_of(path: Path) -> FCN:
    network = FCN(21, 8, "vgg16", head_width=8, alignment="caffe").eval()
    load_weights(network, path)
    return network


def test_checkpoint_of_a_published_net(published: Path) -> None:
    checkpoint = read_checkpoint(published)
    module = SegmentationModule.load_from_checkpoint(published)
    assert module.class_names == list(VOC2012.classes)
    assert module.fresh_layers == []
    network = network_of(published)
    for name, value in network.state_dict().items():
        assert checkpoint["state_dict"][f"network.{name}"].equal(value)
        assert module.network.state_dict()[name].equal(value)
    data = data_settings(published, checkpoint)
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
    network, data = network_of(published), VOC2012(split="val", root=tiny_voc)
    right = pixels = 0
    for sample in (data[0], data[1]):
        with torch.inference_mode():
            found = network(sample["image"][None]).argmax(1)[0]
        known = sample["mask"] != 255
        right += int((found == sample["mask"])[known].sum())
        pixels += int(known.sum())
    assert metrics["pixel_acc"] == right / pixels


def test_prediction(published: Path, tmp_path: Path) -> None:
    """The .pth and what export.py makes of it give the mask of the network itself."""
    image = photo(40, 55)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    safe = tmp_path / "safe"
    export(compose_config("export", f"ckpt={published}", f"output={safe}", "format=safetensors"))
    with torch.inference_mode():
        expected = network_of(published)(image)[0].argmax(0).numpy()
    assert read_checkpoint(find_checkpoint(safe))["hyper_parameters"]["alignment"] == "caffe"
    for ckpt in (published, safe):
        options = [f"ckpt={ckpt}", f"input={tmp_path / 'x.png'}", f"output={tmp_path / 'out'}"]
        output = predict(compose_config("predict", *options, "device=cpu"))
        with Image.open(output / "x.png") as mask:
            assert np.array_equal(np.array(mask), expected), ckpt


def test_at_once(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = tmp_path / "x.ckpt"
    main([str(published), "--at-once", "--output", str(ckpt)])
    assert capsys.readouterr().out == f"{ckpt}\n"
    network = SegmentationModule.load_from_checkpoint(ckpt).network
    assert network.pool_scales == {"pool5": 1, "pool4": 0.01, "pool3": 0.0001}
    staged = network_of(published)
    assert staged.pool_scales == dict.fromkeys(network.pool_scales, 1)
    assert all(network.state_dict()[n].equal(v) for n, v in staged.state_dict().items())
    checkpoint = torch.load(ckpt, weights_only=True)
    assert checkpoint["hyper_parameters"]["weights"] is None
    assert checkpoint["fresh_layers"] == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"upscore.weight": torch.zeros(1)}, "--at-once: .*x.pth is no FCN-8s"),
        (
            {"upscore8.weight": torch.zeros(1), "fc6.bias": torch.zeros(8)},
            "x.pth does not fit .* missing: conv1_1.bias, conv1_2.weight",
        ),
        (None, "No such file"),
    ],
)
def test_conversions_that_cannot_be(
    state: State | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if state is not None:
        torch.save({"conv1_1.weight": torch.zeros(1)} | state, tmp_path / "x.pth")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x.pth"), "--at-once"])
    assert re.match(f"error: .*{message}", capsys.readouterr().err)
    assert not list(tmp_path.glob("*.ckpt"))
    if state is not None:
        with pytest.raises(WeightsError, match=r"x\.pth"):
            SegmentationModule.load_from_checkpoint(tmp_path / "x.pth")


def test_a_conversion_keeps_its_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(random_state(8), "net.ckpt")
    before = Path("net.ckpt").read_bytes()
    for more in ([], ["--output", str(tmp_path / "net.ckpt")]):
        with pytest.raises(SystemExit):
            main(["net.ckpt", *more])
        assert "net.ckpt: is the file to convert" in capsys.readouterr().err
    assert Path("net.ckpt").read_bytes() == before
