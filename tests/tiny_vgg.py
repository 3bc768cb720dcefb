"""A VGG of some 10,000 parameters, which torchvision knows by its name once this file is imported.

FCN(backbone="vgg_tiny")      model.backbone=vgg_tiny
"""

from torch import nn
from torchvision.models import VGG, VGG11_Weights
from torchvision.models._api import register_model

TINY_WIDTHS = (4, "M", 8, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M")  # VGG-11 with thin layers


@register_model()
def vgg_tiny(*, weights: VGG11_Weights | None = None, progress: bool = True) -> VGG:
    """VGG-11 with few channels in each layer, and without its classifier."""
    layers: list[nn.Module] = []
    channels = 3
    for width in TINY_WIDTHS:
        if isinstance(width, int):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return VGG(nn.Sequential(*layers), init_weights=False)
