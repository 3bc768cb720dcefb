"""The encoder; test_network.py compares it with torchvision's VGGs."""

from itertools import pairwise

import torch
from tiny_vgg import TINY_WIDTHS
from torch import nn
from torch.nn import functional as F

from fcn.vgg import backbones, stage_widths, vgg_stages


def test_backbones_are_torchvisions_vggs_and_those_that_a_user_has_registered() -> None:
    torchvisions = ["vgg11", "vgg13", "vgg16", "vgg19"]
    assert backbones() == [*torchvisions, "vgg_tiny"]
    for backbone in torchvisions:
        assert stage_widths(vgg_stages(backbone)) == [64, 128, 256, 512, 512]
    stages = vgg_stages("vgg_tiny", ceil_mode=True)
    assert stage_widths(stages) == [width for width, pool in pairwise(TINY_WIDTHS) if pool == "M"]
    assert stages[0](torch.zeros(1, 3, 7, 9)).shape == (1, 4, 4, 5)  # rounded up


def test_pooling_avg() -> None:
    stages = vgg_stages("vgg_tiny", "avg")
    assert [type(m) for m in stages.modules() if "Pool" in type(m).__name__] == [nn.AvgPool2d] * 5
    nn.init.normal_(stages[0][0].weight)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(stages[0](x), F.avg_pool2d(stages[0][:-1](x), 2))
