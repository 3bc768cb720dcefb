"""The encoder: a torchvision VGG, cut into its five stages.

Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, 2014.

    stages = vgg_stages("vgg19")        # nn.ModuleList of five nn.Sequential, each ending in a pool
    stage_widths(stages)                # [64, 128, 256, 512, 512], the channels after each pool
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# torchvision's VGGs were trained on RGB images in [0, 1], minus MEAN, divided by STD.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The mean pixel of the authors' Caffe nets, in RGB order and divided by 255.
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)


def backbones() -> list[str]:
    """Names of the VGGs without batch norm that torchvision knows, such as "vgg16" and "vgg19".

    A VGG of your own is among them if you have registered it (`torchvision.models.register_model`)
    under a name that begins with "vgg".
    """
    names = torchvision.models.list_models(include="vgg*", exclude="*_bn")
    return sorted(names, key=lambda name: (len(name), name))


def vgg_stages(backbone: str, pooling: str = "max", *, ceil_mode: bool = False) -> nn.ModuleList:
    """The five stages of a torchvision VGG's `features`.

    Args:
        backbone: one of `backbones()`.
        pooling: "max", as in VGG, or "avg".
        ceil_mode: whether a pool rounds an odd size up (Caffe does) or down (torch does).

    Returns:
        Five `nn.Sequential` of convolutions and ReLUs, each ending with its pool. Stage n takes
        (N, C, H, W) to (N, C', H/2, W/2). Their weights are not initialised: `FCN` does that.
    """
    pool = nn.AvgPool2d if pooling == "avg" else RecomputedMaxPool2d
    # On the meta device nothing is computed. Elsewhere, random values for the classifier's 123 M
    # weights, which are not used, would take a second.
    with torch.device("meta"):
        features = torchvision.models.get_model(backbone, weights=None).features
    stages, stage = nn.ModuleList(), nn.Sequential()
    for layer in features.to_empty(device="cpu"):
        if isinstance(layer, nn.MaxPool2d):
            stage.append(pool(2, 2, ceil_mode=ceil_mode))
            stages.append(stage)
            stage = nn.Sequential()
        else:
            stage.append(layer)
    return stages


def stage_widths(stages: nn.ModuleList) -> list[int]:
    """The channels that come out of each stage: those of its last convolution."""
    return [
        [layer.out_channels for layer in stage.children() if isinstance(layer, nn.Conv2d)][-1]
        for stage in stages
    ]


class RecomputedMaxPool2d(nn.MaxPool2d):
    """Max-pooling that keeps no indices for the backward pass.

    torch's own keeps the index of each maximum, in 8 bytes. They would take a sixth of a VGG's
    activations in float32, and more than a quarter in 16 bits. Here the backward pass looks for the
    maxima again, in the input, which the ReLU before the pool keeps anyway. The gradients are the
    same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H/2, W/2)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)
        return super().forward(x)
