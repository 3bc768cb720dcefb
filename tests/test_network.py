"""The network against torchvision's VGG-19, and what every variant of it must do."""

import inspect
import itertools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fcn.network import FCN, SKIPS, init_upsampling_
from fcn.vgg import CAFFE_MEAN
from fcn.weights import from_torchvision

VARIANTS = list(itertools.product((32, 16, 8), ("score", "feature")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**changes: Any) -> FCN:
    options: dict[str, Any] = {"num_classes": 5, "backbone": "vgg_tiny", "head_width": 8}
    return FCN(**options | {"head_kernel": 3} | changes).eval()


def randomise_scores(network: FCN) -> FCN:
    """Scores start at zero: without this, logits would be zero and would prove nothing."""
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize(("stride", "fusion"), VARIANTS)
def test_logits_have_the_size_of_the_image(stride: int, fusion: str) -> None:
    network = small(stride=stride, fusion=fusion)
    with torch.inference_mode():
        for size in ((1, 1), (1, 70), (31, 33), (64, 96), (65, 97)):
            image = torch.zeros(2, 3, *size, dtype=torch.uint8)
            assert network(image).shape == (2, 5, *size)


def test_contract_of_the_constructor() -> None:
    parameters = inspect.signature(FCN).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert list(defaults.items())[:3] == [("num_classes", 21), ("stride", 8), ("backbone", "vgg19")]
    assert all(p.kind == p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    network = small(head_width=12, dropout=0.25)
    assert network.conv7.weight.shape == (12, 12, 1, 1)
    assert network.dropout.p == 0.25


def test_decoders_of_the_paper_and_of_the_tutorial() -> None:
    paper = small(num_classes=21).upsample
    shapes = {name: tuple(w.shape) for name, w in paper.state_dict().items()}
    assert shapes == {
        "to_pool4.weight": (21, 21, 4, 4),
        "to_pool3.weight": (21, 21, 4, 4),
        "to_image_8.weight": (21, 21, 16, 16),
    }
    tutorial = small(num_classes=21, fusion="feature").upsample
    shapes = {
        name: tuple(w.shape) for name, w in tutorial.state_dict().items() if "bias" not in name
    }
    assert shapes == {
        "to_pool4.weight": (21, 16, 4, 4),
        "to_pool3.weight": (16, 8, 4, 4),
        "to_image_8.weight": (8, 21, 16, 16),
    }
    assert [layer.stride for layer in tutorial.values()] == [(2, 2), (2, 2), (8, 8)]


@pytest.mark.parametrize("fusion", ["score", "feature"])
def test_decoder_adds_what_it_should(fusion: str) -> None:
    """The loop, spelt out by hand."""
    network = randomise_scores(small(fusion=fusion, pool_scales=(2.0, 0.5, 0.25)))
    image = torch.rand(1, 3, 64, 96)
    x, pools = network.normalize(image), []
    for stage in network.stages:
        x = stage(x)
        pools.append(x)
    x = network.score(network.conv7(network.conv6(2.0 * x).relu()).relu())
    up, skips = network.upsample, network.skips
    x = up["to_pool4"](x) + skips["pool4"](0.5 * pools[3])
    x = up["to_pool3"](x) + skips["pool3"](0.25 * pools[2])
    x = up["to_image_8"](x)
    assert x.abs().mean() > 1e-3
    torch.testing.assert_close(network(image), x)


def test_uint8_and_float_agree() -> None:
    network = randomise_scores(small())
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    logits = network(image)
    assert logits.std() > 1e-3
    torch.testing.assert_close(network(image.float() / 255), logits)
    torch.testing.assert_close(network(image.double() / 255), logits)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(network.normalize(image), (image / 255 - mean) / std)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8)])
def test_refuses_what_is_no_rgb_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        small()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        small()(torch.zeros(1, 3, 8, 8, dtype=torch.int64))


@pytest.mark.slow
def test_conv7_equals_torchvisions_classifier() -> None:
    """On 224x224 the centre of conv7 sees what VGG-19's second linear layer sees."""
    with torch.device("meta"):
        vgg = torchvision.models.vgg19(init_weights=False).eval()
    vgg.features.to_empty(device="cpu")
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    width = 64  # in place of 4096: 2 M weights, not 120 M
    vgg.classifier[0] = nn.Linear(vgg.classifier[0].in_features, width)
    vgg.classifier[3] = nn.Linear(width, width)
    del vgg.classifier[6]
    image = torch.rand(1, 3, 224, 224)
    network = FCN(num_classes=2, stride=32, head_width=width).eval()
    state, warning = from_torchvision(network, vgg.state_dict())
    assert warning == ""
    missing = network.load_state_dict(state, strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"score", "upsample"}

    activations: dict[str, Tensor] = {}
    network.conv7.register_forward_hook(
        lambda module, inputs, output: activations.update(conv7=F.relu(output))
    )
    with torch.inference_mode():
        wanted = vgg.avgpool(vgg.features(network.normalize(image))).flatten(1)
        wanted = vgg.classifier[:5](wanted)  # (1, 64): linear, ReLU, dropout, linear, ReLU
        network(image)
    centre = activations["conv7"][:, :, 3, 3]
    assert activations["conv7"].shape == (1, width, 7, 7)
    assert wanted.std() > 0.01
    assert 0.2 < (wanted > 0).float().mean() < 0.8
    torch.testing.assert_close(centre, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8, 16, 32])
def test_upsampling_starts_bilinear(factor: int) -> None:
    """A linear ramp stays that ramp inside the border, in each channel on its own."""
    layer = nn.ConvTranspose2d(2, 2, 2 * factor, factor, factor // 2, bias=False)
    init_upsampling_(layer)
    size = 6
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ramp = torch.stack((3.0 * xs - 2.0 * ys + 1, -1.0 * xs))[None]
    result = layer(ramp)
    assert result.shape == (1, 2, size * factor, size * factor)
    fine = (torch.arange(size * factor) + 0.5) / factor - 0.5  # where the pixels' centres lie
    ys, xs = torch.meshgrid(fine, fine, indexing="ij")
    wanted = torch.stack((3 * xs - 2 * ys + 1, -xs))[None]
    inside = slice(factor // 2, -(factor // 2))  # between the outermost centres
    torch.testing.assert_close(
        result[..., inside, inside], wanted[..., inside, inside], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("stride", SKIPS)
def test_network_starts_bilinear_and_at_zero(stride: int) -> None:
    network = small(stride=stride)
    for layer in network.upsample.children():
        assert isinstance(layer, nn.ConvTranspose2d)
        factor = layer.stride[0]
        coarse = torch.rand(1, 5, 4, 4)
        fine = F.interpolate(coarse, scale_factor=factor, mode="bilinear")
        inside = slice(factor, -factor)
        torch.testing.assert_close(layer(coarse)[..., inside, inside], fine[..., inside, inside])
    assert not network.score.weight.any()
    assert all(not value.any() for value in network.skips.state_dict().values())
    assert not network(torch.rand(1, 3, 32, 32)).any()
    assert not small(stride=stride, fusion="feature")(torch.rand(1, 3, 32, 32)).any()


@pytest.mark.parametrize(("stride", "fusion"), VARIANTS)
def test_every_parameter_gets_a_gradient(stride: int, fusion: str) -> None:
    network = small(stride=stride, fusion=fusion).train()
    network.dropout.p = 0.0
    image = torch.rand(2, 3, 64, 64)
    label = torch.randint(5, (2, 64, 64))
    for scores_are_zero in (True, False):
        if not scores_are_zero:
            randomise_scores(network)
        network.zero_grad()
        F.cross_entropy(network(image), label).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert scores_are_zero or parameter.grad.any(), name


@pytest.mark.parametrize(("stride", "fusion"), VARIANTS)
def test_shift_of_the_image_shifts_the_prediction(stride: int, fusion: str) -> None:
    """By 32 pixels, the coarsest cell; compared where no border reaches."""
    network = randomise_scores(small(stride=stride, fusion=fusion, head_kernel=1)).double()
    scene = torch.rand(1, 3, 32, 352, dtype=torch.float64)
    with torch.inference_mode():
        left, right = network(scene[..., :320]), network(scene[..., 32:])
    # This VGG sees about 75 pixels each way, upsampling one cell more
    here, there = left[..., 160:192], right[..., 128:160]
    assert here.std() > 1e-3
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(left[..., 128:160], there, rtol=1e-3, atol=1e-3)


def test_learn_upsampling_false_freezes_upsampling_only() -> None:
    frozen = {n for n, p in small(learn_upsampling=False).named_parameters() if not p.requires_grad}
    assert frozen == {
        "upsample.to_pool4.weight",
        "upsample.to_pool3.weight",
        "upsample.to_image_8.weight",
    }
    assert all(p.requires_grad for p in small().parameters())
    one = small(learn_last_upsampling=False)
    frozen = {n for n, p in one.named_parameters() if not p.requires_grad}
    assert frozen == {"upsample.to_image_8.weight"}


@pytest.mark.parametrize("stages", [0, 2, 5])
def test_freeze_stages(stages: int) -> None:
    network = small(freeze_stages=stages)
    for number, stage in enumerate(network.stages):
        assert all(p.requires_grad == (number >= stages) for p in stage.parameters())
    assert all(p.requires_grad for p in network.conv6.parameters())


def gradients(network: FCN) -> tuple[dict[str, Tensor], int, set[torch.dtype]]:
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
    loss.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found, total, {tensor.dtype for tensor in kept.values()}


def test_checkpointing_changes_memory_and_no_number() -> None:
    network = randomise_scores(small())
    expected, most, _ = gradients(network)
    for stages in (2, 5):
        other = small(checkpoint_stages=stages)
        other.load_state_dict(network.state_dict())
        found, kept, _ = gradients(other)
        assert kept < most
        most = kept
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def test_pooling_keeps_no_indices() -> None:
    network = randomise_scores(small())
    found, _, dtypes = gradients(network)
    assert dtypes == {torch.float32}
    for stage in network.stages:
        stage[-1] = nn.MaxPool2d(2, 2)
    network.zero_grad()
    expected, _, dtypes = gradients(network)
    assert torch.int64 in dtypes
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_dropout_acts_in_training_only() -> None:
    network = randomise_scores(small(head_width=64))
    image = torch.rand(1, 3, 64, 64)
    assert network(image).equal(network(image))
    network.train()
    assert not network(image).equal(network(image))


def test_normalisation_is_no_state() -> None:
    assert not {"mean", "std"} & set(small().state_dict())
    caffe = small(alignment="caffe", head_kernel=7)
    assert not {"mean", "std"} & set(caffe.state_dict())
    torch.testing.assert_close(caffe.mean.flatten(), torch.tensor(CAFFE_MEAN))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", "8"),
        ("backbone", "vgg19_bn"),
        ("fusion", "sum"),
        ("freeze_stages", 6),
        ("head_kernel", 4),
        ("head_kernel", 3.0),
        ("dropout", 1),
        ("dropout", "half"),
        ("dropout", float("nan")),
        ("pool_scales", (1.0, 2.0)),
        ("pool_scales", (1.0, 0.0, 1.0)),
        ("num_classes", 256),
        ("freeze_stages", True),
        ("channels_last", 1),
        ("learn_upsampling", "no"),
        ("alignment", "left"),
    ],
)
def test_bad_arguments(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fcn.network.vgg_stages")  # nothing is built before
    shown = "null" if value is None else "true" if value is True else value
    with pytest.raises(ValueError, match="must be") as caught:
        small(**{name: value})
    assert str(caught.value).startswith(f"{name}={shown}: must be ")


def test_feature_fusion_must_learn_upsampling() -> None:
    with pytest.raises(ValueError, match=r"^learn_upsampling=false: .* must learn"):
        small(fusion="feature", learn_upsampling=False)
    with pytest.raises(ValueError, match=r"^learn_last_upsampling=false: .* must learn"):
        small(fusion="feature", learn_last_upsampling=False)


@pytest.mark.parametrize("fusion", ["score", "feature"])
def test_layout_can_be_changed(fusion: str) -> None:
    """The same scores, and activations in the layout that was asked for."""
    network = randomise_scores(small(stride=8, fusion=fusion, channels_last="auto"))
    image = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = network(image).detach()
    for channels_last in (True, False, True):
        network.set_layout(channels_last)
        scores = network(image)
        torch.testing.assert_close(scores, expected)
        convolution = network.stages[2].get_parameter("0.weight")
        assert convolution.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_layout_leaves_gradients_where_they_are() -> None:
    """DistributedDataParallel sums them in storage of its own, and would not see a copy."""
    network = small(stride=8)
    network(torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)).sum().backward()
    places = {n: p.grad.data_ptr() for n, p in network.named_parameters() if p.grad is not None}
    network.set_layout(True)
    network.set_layout(False)
    assert places
    for name, place in places.items():
        gradient = network.get_parameter(name).grad
        assert gradient is not None
        assert gradient.data_ptr() == place, name
