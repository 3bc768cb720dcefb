"""The network against torchvision's VGG-19, and what every variant of it must do."""

import inspect
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fcn.network import FCN, SKIPS, TrimmedConv2d
from fcn.weights import from_torchvision

VARIANTS = list(itertools.product(SKIPS, ("score", "feature")))
CAFFE = {"alignment": "caffe", "head_kernel": 7}
DEEP = {"deep_skips": True}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**changes: Any) -> FCN:
    options: dict[str, Any] = {"num_classes": 5, "backbone": "vgg_tiny", "head_width": 8}
    return FCN(**options | {"head_kernel": 3} | changes).eval()


def randomised(**changes: Any) -> FCN:
    """Scores start at zero: without this, logits would be zero and would prove nothing."""
    network = small(**changes)
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("options", [{}, CAFFE])
@pytest.mark.parametrize(("stride", "fusion"), VARIANTS)
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(
    stride: int, fusion: str, options: dict[str, Any]
) -> None:
    network = small(stride=stride, fusion=fusion, **options)
    networks = [network]
    if fusion == "score":
        networks.append(small(stride=stride, **options, **DEEP, skip_kernel=3))
    for size in ((1, 1), (26, 27), (59, 3), (64, 96)):  # caffe: 26 + 6 are the last in a cell
        for each in networks:
            assert each(torch.zeros(2, 3, *size, dtype=torch.uint8)).shape == (2, 5, *size)


def test_contract_of_the_constructor() -> None:
    parameters = list(inspect.signature(FCN).parameters.values())
    positional = [(p.name, p.default) for p in parameters[:3]]
    assert positional == [("num_classes", 21), ("stride", 8), ("backbone", "vgg19")]
    assert all(p.kind == p.KEYWORD_ONLY for p in parameters[3:])


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("options", [{"fusion": "score"}, {"fusion": "feature"}, DEEP])
def test_decoder_adds_what_it_should(options: dict[str, Any], stride: int) -> None:
    """The loop, spelt out by hand. The image is padded at the bottom and at the right."""
    network = randomised(**options, stride=stride, pool_scales=(2.0, 0.5, 0.25))
    image = torch.rand(1, 3, 60, 90)
    x, pools, convolved = F.pad(network.normalize(image), (0, 6, 0, 4)), [], []
    for stage in network.stages:
        *convolutions, pool = stage.children()
        for layer in convolutions:
            x = layer(x)
        convolved.append(x)
        x = pool(x)
        pools.append(x)
    x = network.score(network.conv7(network.conv6(2.0 * x).relu()).relu())
    up, skips = network.upsample, network.skips
    pool4, pool3, pool2 = 0.5 * pools[3], 0.25 * pools[2], 0.25 * pools[1]
    if options == DEEP:  # conv5 has the size of pool4 and the scale of pool5
        pool4 = torch.cat([pool4, 2.0 * convolved[4]], 1)
        pool3 = torch.cat([pool3, 0.5 * convolved[3]], 1)
        pool2 = torch.cat([pool2, 0.25 * convolved[2]], 1)
    x = up["to_pool4"](x) + skips["pool4"](pool4)
    x = up["to_pool3"](x) + skips["pool3"](pool3)
    if stride == 4:
        x = up["to_pool2"](x) + skips["pool2"](pool2)
    x = up[f"to_image_{stride}"](x)[..., :60, :90]
    assert x.abs().mean() > 1e-3
    torch.testing.assert_close(network(image), x)


@pytest.mark.parametrize("size", [(1, 1), (2, 13), (3, 2), (4, 9)])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_trimmed_convolution_is_the_plain_one(size: tuple[int, int], kernel: int) -> None:
    trimmed = TrimmedConv2d(8, 4, kernel, padding=kernel // 2).double()
    plain = nn.Conv2d(8, 4, kernel, padding=kernel // 2).double()
    plain.load_state_dict(trimmed.state_dict())
    image, gradients = torch.randn(2, 8, *size).double(), []
    torch.testing.assert_close(trimmed(image), plain(image))
    for layer in (trimmed, plain):
        x = image.clone().requires_grad_()
        loss = layer(x).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_small_images_have_gradients_in_bfloat16() -> None:
    """torch does not write some weights' gradients; glibc fills all memory with large numbers."""
    code = (
        "import torch; from fcn.network import FCN\n"
        "net = FCN(5, 32, 'vgg11', head_width=16); net.score.weight.data.normal_()\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    net(torch.rand(2, 3, 64, 32)).float().sum().backward()\n"
        "print(net.conv6.weight.grad.abs().max().item())"
    )
    environment = os.environ | {"MALLOC_PERTURB_": "128"}  # 0x7f7f is 3e38 in bfloat16
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert 0 < float(done.stdout) < 1e6


def test_caffe_scores_a_pool_before_it_is_cropped() -> None:
    """As the authors' nets do. A skip of 3x3 then sees what lies beyond the crop."""
    network = randomised(**CAFFE, stride=16, skip_kernel=3)
    maps: dict[str, Tensor] = {}
    for name, layer in (("pool4", network.stages[3]), ("up", network.upsample["to_pool4"])):
        layer.register_forward_hook(lambda *args, name=name: maps.__setitem__(name, args[2]))
    logits = network(torch.rand(1, 3, 50, 50))
    offset, size = network.offsets["pool4"], maps["up"].shape[-1]
    assert 0 < offset < maps["pool4"].shape[-1] - size
    added = network.skips["pool4"](maps["pool4"])[..., offset:, offset:][..., :size, :size]
    offset = network.offsets["image"]
    expected = network.upsample["to_image_16"](maps["up"] + added)[..., offset:, offset:]
    torch.testing.assert_close(logits, expected[..., :50, :50])


def test_images() -> None:
    network = randomised()
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    logits = network(image)
    assert logits.std() > 1e-3
    torch.testing.assert_close(network(image.float() / 255), logits)
    torch.testing.assert_close(network(image.double() / 255), logits)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(network.normalize(image), (image / 255 - mean) / std)
    assert not {"mean", "std"} & set(network.state_dict())
    for wrong in (image[0], image[:, :1]):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            network(wrong)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        network(image.long())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg11", "vgg19"])
@torch.inference_mode()
def test_conv7_equals_torchvisions_classifier(backbone: str) -> None:
    """On 224x224 the centre of conv7 sees what the VGG's second linear layer sees."""
    with torch.device("meta"):
        vgg = torchvision.models.get_model(backbone, init_weights=False).eval()
    vgg.features.to_empty(device="cpu")
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias)
    width = 64  # in place of 4096: 2 M weights, not 120 M
    vgg.classifier[0] = nn.Linear(vgg.classifier[0].in_features, width)
    vgg.classifier[3] = nn.Linear(width, width)
    del vgg.classifier[6]
    image = torch.rand(1, 3, 224, 224)
    network = FCN(2, 32, backbone, head_width=width).eval()
    state, warning = from_torchvision(network, vgg.state_dict())
    assert warning == ""
    missing = network.load_state_dict(state, strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"score", "upsample"}

    found: list[Tensor] = []
    network.conv7.register_forward_hook(lambda module, inputs, output: found.append(output.relu()))
    wanted = vgg.avgpool(vgg.features(network.normalize(image))).flatten(1)
    wanted = vgg.classifier[:5](wanted)  # (1, 64): linear, ReLU, dropout, linear, ReLU
    network(image)
    assert found[0].shape == (1, width, 7, 7)
    assert wanted.std() > 0.01
    assert 0.2 < (wanted > 0).float().mean() < 0.8
    torch.testing.assert_close(found[0][:, :, 3, 3], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stride", SKIPS)
def test_network_starts_bilinear_and_at_zero(stride: int) -> None:
    network = small(stride=stride)
    for layer in network.upsample.children():
        assert isinstance(layer, nn.ConvTranspose2d)
        factor = layer.stride[0]
        coarse = torch.rand(1, 5, 4, 4)
        fine = F.interpolate(coarse, scale_factor=factor, mode="bilinear")
        assert layer(coarse).shape == fine.shape
        inside = slice(factor // 2, -(factor // 2))  # between the outermost centres
        torch.testing.assert_close(layer(coarse)[..., inside, inside], fine[..., inside, inside])
    assert not network.score.weight.any()
    assert all(not value.any() for value in network.skips.state_dict().values())
    assert not network(torch.rand(1, 3, 32, 32)).any()
    assert not small(stride=stride, fusion="feature")(torch.rand(1, 3, 32, 32)).any()


@pytest.mark.parametrize(
    "options",
    [*({"stride": s, "fusion": f} for s, f in VARIANTS), CAFFE, DEEP, DEEP | {"skip_kernel": 3}],
)
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    network = randomised(**options, dropout=0.0).train()
    logits = network(torch.rand(2, 3, 64, 64))
    F.cross_entropy(logits, torch.randint(5, (2, 64, 64))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


UPSAMPLING = ["upsample.to_pool4.weight", "upsample.to_pool3.weight", "upsample.to_image_8.weight"]


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, []),
        ({"learn_upsampling": False}, UPSAMPLING),
        ({"learn_last_upsampling": False}, UPSAMPLING[2:]),
        ({"freeze_stages": 1}, ["stages.0.0.weight", "stages.0.0.bias"]),
    ],
)
def test_frozen_layers(options: dict[str, Any], frozen: list[str]) -> None:
    network = small(**options)
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == frozen


def gradients(network: FCN) -> tuple[list[Tensor], int, set[torch.dtype]]:
    """Of all parameters; the bytes kept for the backward pass beside them, and their types."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    image = torch.rand(2, 3, 64, 70, generator=torch.Generator().manual_seed(1))
    weights = {p.data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(image).square().sum()
    total = sum(t.nbytes for pointer, t in kept.items() if pointer not in weights)
    found = torch.autograd.grad(loss, list(network.parameters()))
    return list(found), total, {tensor.dtype for tensor in kept.values()}


@pytest.mark.parametrize("deep_skips", [False, True])
def test_what_saves_memory_changes_no_gradient(deep_skips: bool) -> None:
    """Pools keep no indices; of the first stages, activations can be computed again."""
    network = randomised(deep_skips=deep_skips)
    expected, most, dtypes = gradients(network)
    assert dtypes == {torch.float32}
    for stages in (2, 5):
        other = small(checkpoint_stages=stages, deep_skips=deep_skips)
        other.load_state_dict(network.state_dict())
        found, kept, _ = gradients(other)
        assert kept < most
        most = kept
        torch.testing.assert_close(found, expected)
    for stage in network.stages:
        stage[-1] = nn.MaxPool2d(2, 2)
    found, _, dtypes = gradients(network)
    assert torch.int64 in dtypes
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_settings_that_do_not_go_together() -> None:
    """Values that are wrong by themselves: test_module.py."""
    with pytest.raises(ValueError, match=r"^head_kernel=3: must be 7 with alignment=caffe"):
        small(alignment="caffe")
    with pytest.raises(ValueError, match=r"^deep_skips=true: must be false with fusion=feature"):
        small(fusion="feature", **DEEP)
    with pytest.raises(ValueError, match=r"^skip_kernel=3: must be 1 with fusion=feature"):
        small(fusion="feature", skip_kernel=3)
    for name in ("learn_upsampling", "learn_last_upsampling"):
        with pytest.raises(ValueError, match=f"^{name}=false: .* must learn"):
            small(fusion="feature", **{name: False})


@pytest.mark.parametrize("fusion", ["score", "feature"])
def test_layout_can_be_changed(fusion: str) -> None:
    """The same scores, and activations in the layout that was asked for."""
    network = randomised(stride=8, fusion=fusion, channels_last="auto")
    image = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = network(image)
    expected.sum().backward()
    places = [p.grad.data_ptr() for p in network.parameters() if p.grad is not None]
    for channels_last in (False, True):
        network.set_layout(channels_last)
        torch.testing.assert_close(network(image), expected)
        convolution = network.stages[2].get_parameter("0.weight")
        assert convolution.is_contiguous(memory_format=torch.channels_last) == channels_last
    # DistributedDataParallel sums gradients in storage of its own, and would not see a copy.
    assert [p.grad.data_ptr() for p in network.parameters() if p.grad is not None] == places
