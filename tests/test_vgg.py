"""The encoder against torchvision's VGGs."""

from itertools import pairwise

import pytest
import torch
import torchvision
from tiny_vgg import TINY_WIDTHS
from torch import nn
from torch.nn import functional as F

from fcn.network import FCN
from fcn.vgg import RecomputedMaxPool2d, backbones, stage_widths, vgg_stages
from fcn.weights import from_torchvision


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_backbones_are_torchvisions_vggs_and_those_that_a_user_has_registered() -> None:
    assert backbones() == ["vgg11", "vgg13", "vgg16", "vgg19", "vgg_tiny"]


@pytest.mark.parametrize("backbone", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_widths_are_those_of_the_layers(backbone: str) -> None:
    assert stage_widths(vgg_stages(backbone)) == [64, 128, 256, 512, 512]


def test_widths_of_a_thin_vgg() -> None:
    stages = vgg_stages("vgg_tiny", ceil_mode=True)
    before_pools = pairwise(TINY_WIDTHS)
    assert stage_widths(stages) == [width for width, pool in before_pools if pool == "M"]
    assert sum(p.numel() for p in stages.parameters()) < 10_000
    assert stages[0](torch.zeros(1, 3, 7, 9)).shape == (1, 4, 4, 5)  # rounded up


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_stages_equal_torchvision_after_each_pool(backbone: str) -> None:
    with torch.device("meta"):
        features = torchvision.models.get_model(backbone).features
    features = features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.normal_(layer.bias)
    network = FCN(5, backbone=backbone, head_width=8, head_kernel=1).eval()
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    network.load_state_dict(from_torchvision(network, state)[0], strict=False)

    image = torch.rand(1, 3, 64, 64)
    wanted, ours, stage = network.normalize(image), network.normalize(image), 0
    with torch.inference_mode():
        for layer in features:
            wanted = layer(wanted)
            if isinstance(layer, nn.MaxPool2d):
                ours = network.stages[stage](ours)
                stage += 1
                assert ours.shape == wanted.shape
                assert wanted.std() > 0.1
                atol = 1e-5 * wanted.abs().max().item()  # the same sums in another order
                torch.testing.assert_close(ours, wanted, rtol=0, atol=atol)
    assert stage == 5


def test_pooling_avg() -> None:
    average = vgg_stages("vgg_tiny", "avg")
    for kind, stages in ((nn.AvgPool2d, average), (nn.MaxPool2d, vgg_stages("vgg_tiny"))):
        assert all(isinstance(list(stage.children())[-1], kind) for stage in stages)
        assert len([m for m in stages.modules() if "Pool" in type(m).__name__]) == 5
    x = torch.rand(1, 3, 8, 8)
    nn.init.normal_(average[0][0].weight)
    first = nn.Sequential(*list(average[0].children())[:-1])
    torch.testing.assert_close(average[0](x), F.avg_pool2d(first(x), 2))


def test_max_pooling_in_bfloat16_equals_torchs() -> None:
    x = torch.randn(2, 3, 8, 6).to(torch.bfloat16)
    x[0, 0, :2, :2] = float("nan")
    pool = RecomputedMaxPool2d(2, 2)
    assert torch.equal(pool(x).nan_to_num(9), F.max_pool2d(x, 2, 2).nan_to_num(9))
    learned = x.clone().requires_grad_()
    assert torch.equal(pool(learned).nan_to_num(9), F.max_pool2d(x, 2, 2).nan_to_num(9))
