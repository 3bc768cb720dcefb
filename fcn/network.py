"""FCN-32s, FCN-16s and FCN-8s on a torchvision VGG, as one class.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015.

    FCN(num_classes=21, stride=8)(torch.zeros(1, 3, 375, 500, dtype=torch.uint8)).shape
    # torch.Size([1, 21, 375, 500])
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BACKBONES = ("vgg11", "vgg13", "vgg16", "vgg19")
SKIPS = {32: (), 16: ("pool4",), 8: ("pool4", "pool3")}  # coarse to fine
POOL_CHANNELS = {"pool3": 256, "pool4": 512}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's VGGs, RGB in [0, 1]
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)  # of the authors' nets


class FCN(nn.Module):
    """A VGG turned into a segmentation network: encoder, head, and a decoder that adds skips.

    Args:
        num_classes: K, background included. Void is no class.
        stride: of the finest prediction: 32, 16 or 8 pixels (FCN-32s, FCN-16s, FCN-8s).
        backbone: a torchvision VGG without batch norm.
        weights: what `fcn.weights.load_weights` takes, or None for a random start.
        head_width: channels of conv6 and conv7; only 4096 can take VGG's own classifier.
        head_kernel: size of conv6, odd; only 7 can take VGG's own classifier.
        dropout: after conv6 and conv7, while training.
        pooling: "max" as in VGG, or "avg" as in the tutorial this work starts from.
        fusion: "score" adds 1x1 class scores of the pools (the paper); "feature" upsamples the
            scores to the pools' own channels, adds the pools themselves and predicts last.
        pool_scales: factors on (pool5, pool4, pool3) before the head and the skips read them. The
            paper's at-once training uses (1, 0.01, 0.0001): an ImageNet VGG's pools grow towards
            the image, and the largest would learn fastest.
        learn_upsampling: False keeps every upsampling as it starts: bilinear, or as loaded.
        learn_last_upsampling: False keeps the last one, to the image, as in the paper.
        freeze_stages: how many VGG stages, from the image on, stay as they were loaded.
        checkpoint_stages: how many VGG stages, from the image on, keep no activations: they are
            computed again in the backward pass (Chen et al. 2016).
        channels_last: activations of the VGG as (N, H, W, C) in memory: what tensor cores want, and
            a tenth of a training step on CPUs.
        alignment: "centered": every map covers the image, padded to whole cells, exactly. "caffe":
            as in the authors' own nets, for their weights: 100 zeros around the image, none around
            conv6 (which is 7x7 then) and in upsampling, pools that round up, crops that lay the
            maps on each other; zero is Caffe's mean.

    Raises:
        ValueError: an argument is out of its range.
        fcn.errors.WeightsError: the weights cannot be found or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int = 21,
        stride: int = 8,
        backbone: str = "vgg19",
        weights: str | Path | None = None,
        *,
        head_width: int = 4096,
        head_kernel: int = 7,
        dropout: float = 0.5,
        pooling: str = "max",
        fusion: str = "score",
        pool_scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        learn_upsampling: bool = True,
        learn_last_upsampling: bool = True,
        freeze_stages: int = 0,
        checkpoint_stages: int = 0,
        channels_last: bool = False,
        alignment: str = "centered",
    ) -> None:
        super().__init__()
        _one_of("stride", stride, tuple(SKIPS))
        _one_of("backbone", backbone, BACKBONES)
        _one_of("pooling", pooling, ("max", "avg"))
        _one_of("fusion", fusion, ("score", "feature"))
        _one_of("alignment", alignment, ("centered", "caffe"))
        _one_of("freeze_stages", freeze_stages, tuple(range(6)))
        _one_of("checkpoint_stages", checkpoint_stages, tuple(range(6)))
        for name, value in (("num_classes", num_classes), ("head_width", head_width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if head_kernel < 1 or head_kernel % 2 == 0:
            raise ValueError(f"head_kernel must be odd: conv6 keeps size; got {head_kernel}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
        if len(pool_scales) != 3:
            raise ValueError(f"pool_scales must be for (pool5, pool4, pool3); got {pool_scales}")
        if alignment == "caffe" and head_kernel != 7:
            raise ValueError(f"alignment='caffe' needs head_kernel=7; got {head_kernel}")
        if fusion == "feature" and not (learn_upsampling and learn_last_upsampling):
            raise ValueError("fusion='feature' changes channels while upsampling: it must learn it")

        self.backbone, self.stride, self.fusion = backbone, stride, fusion
        self.alignment, self.checkpoint_stages = alignment, checkpoint_stages
        caffe = alignment == "caffe"
        # Pixels around the image (conv1_1 adds its own), and what the padded sides are multiples of
        self.margin, self.cell = (99, 1) if caffe else (0, 32)
        self.stages = vgg_stages(backbone, pooling, ceil_mode=caffe)
        around = 0 if caffe else head_kernel // 2
        self.conv6 = nn.Conv2d(512, head_width, head_kernel, padding=around)
        self.conv7 = nn.Conv2d(head_width, head_width, 1)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Conv2d(head_width, num_classes, 1)

        self.pool_scales = dict(zip(("pool5", "pool4", "pool3"), pool_scales, strict=True))
        self.skips = nn.ModuleDict()  # what is added at a pool: its scores, or the pool itself
        self.upsample = nn.ModuleDict()  # x2 to each pool, then all the way to the image
        channels = num_classes
        for pool in SKIPS[stride]:
            wide = POOL_CHANNELS[pool]
            scored = fusion == "score"
            self.skips[pool] = nn.Conv2d(wide, num_classes, 1) if scored else nn.Identity()
            after = channels if scored else wide
            self.upsample[f"to_{pool}"] = _upsampling(channels, after, 2, caffe)
            channels = after
        self.upsample[f"to_image_{stride}"] = _upsampling(channels, num_classes, stride, caffe)
        self.offsets = crop_offsets(self)

        # Non-persistent: constants, nothing that is learned.
        mean = CAFFE_MEAN if caffe else MEAN
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

        self.reset_parameters()
        # Layers of head and decoder without loaded values; `head_lr_multiplier` is for them.
        self.fresh_layers = head_layers(self)
        if weights is not None:
            from fcn.weights import load_weights

            self.fresh_layers = load_weights(self, weights)
        if channels_last:
            self.stages.to(memory_format=torch.channels_last)  # activations follow the weights
        self.stages[:freeze_stages].requires_grad_(False)
        self.upsample.requires_grad_(learn_upsampling)
        if not learn_last_upsampling:
            self.upsample[f"to_image_{stride}"].requires_grad_(False)

    def reset_parameters(self) -> None:
        """Random VGG and head, scores at zero, upsampling bilinear.

        He et al. 2015, and where a VGG convolution keeps its channels, the identity plus half of
        that, after DiracNets (Zagoruyko and Komodakis 2017): without it 19 layers that have
        neither batch norm nor loaded values stay on a plateau for hundreds of steps.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d):
                init_upsampling_(module)
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels == module.out_channels:
                identity = nn.init.dirac_(torch.empty_like(module.weight))
                module.weight.data.mul_(0.5).add_(identity)
        scores = ["score", *(f"skips.{pool}" for pool in self.skips)]
        if self.fusion == "feature" and len(self.skips) > 0:
            scores = [f"upsample.to_image_{self.stride}"]  # what gives scores; `score` is a feature
        for layer in scores:
            nn.init.zeros_(self.get_parameter(f"{layer}.weight"))

    def forward(self, image: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            image: (N, 3, H, W), RGB, uint8 or float in [0, 1]; any H and W from 1 up.

        Returns:
            Logits (N, K, H, W).
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images (N, 3, H, W); got {tuple(image.shape)}")
        height, width = image.shape[-2:]
        x = self.normalize(image)
        near, right, bottom = self.margin, -width % self.cell, -height % self.cell
        x = F.pad(x, (near, near + right, near, near + bottom))  # (N, 3, H', W')

        pools = {}
        for number, stage in enumerate(self.stages, start=1):
            if number <= self.checkpoint_stages and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = stage(x)
            pools[f"pool{number}"] = x  # (N, C, H'/2^number, W'/2^number)

        # conv6 stays (N, C, H, W): its 103 M weights would be copied to the other layout each time
        x = (self.pool_scales["pool5"] * x).contiguous()
        x = self.dropout(F.relu(self.conv6(x)))  # (N, head_width, H'/32, W'/32)
        x = self.dropout(F.relu(self.conv7(x)))
        x = self.score(x)  # (N, K, H'/32, W'/32)

        for pool, skip in self.skips.items():
            x = self.upsample[f"to_{pool}"](x)  # (N, K or C of the pool, H'/16, ..), then H'/8
            beside = _crop(pools[pool], self.offsets[pool], x.shape[-2:])
            x = x + skip(self.pool_scales[pool] * beside)
        x = self.upsample[f"to_image_{self.stride}"](x)  # (N, K, H', W')
        return _crop(x, self.offsets["image"], (height, width))

    def normalize(self, image: Tensor) -> Tensor:
        """Images, uint8 or float in [0, 1], to zero mean and unit variance of ImageNet."""
        if image.dtype == torch.uint8:
            image = image.to(self.mean.dtype) / 255
        elif not image.is_floating_point():
            raise ValueError(f"expected images of uint8, or float in [0, 1]; got {image.dtype}")
        return (image.to(self.mean.dtype) - self.mean) / self.std


def vgg_stages(backbone: str, pooling: str = "max", *, ceil_mode: bool = False) -> nn.ModuleList:
    """The five stages of a torchvision VGG's `features`, each ending with its pool."""
    pool = nn.AvgPool2d if pooling == "avg" else MaxPool2d
    with torch.device("meta"):  # skips the classifier's 123 M random values
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


class MaxPool2d(nn.MaxPool2d):
    """As torch's, but the backward pass looks for the maxima again, in the input that the ReLU
    before keeps anyway. Their indices, 8 bytes each, would be a quarter of all activations."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)
        return super().forward(x)


def head_layers(network: FCN) -> list[str]:
    """Names of all layers with parameters behind the VGG stages."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("stages.")
    ]


def init_upsampling_(layer: nn.ConvTranspose2d) -> None:
    """Bilinear interpolation: channel by channel, or between random mixtures of channels."""
    size, factor = layer.kernel_size[0], layer.stride[0]
    position = torch.arange(size, dtype=torch.float64)
    line = 1 - (position - (size - 1) / 2).abs() / factor  # (2s,), a triangle
    kernel = torch.outer(line, line).to(layer.weight)  # (2s, 2s)
    if layer.in_channels == layer.out_channels:
        mix = torch.eye(layer.in_channels)
    else:
        mix = torch.randn(layer.in_channels, layer.out_channels) / layer.in_channels**0.5
    with torch.no_grad():
        layer.weight.copy_(mix[:, :, None, None].to(kernel) * kernel)  # (C_in, C_out, 2s, 2s)
        if layer.bias is not None:
            layer.bias.zero_()


def crop_offsets(network: FCN) -> dict[str, int]:
    """Rows and columns to leave out before a pool is added, and before the image; 0 if "centered".

    As Caffe's coord_map.py, this follows the centre of each map's first pixel, in pixels of the
    image: a kernel k with padding p takes it (k - 1) / 2 - p of its input's pixels further, and a
    transposed one that much of its output's back.
    """
    first = {f"pool{n}": (2**n - 1) / 2 - network.margin for n in range(1, 6)} | {"image": 0.0}
    conv6, step = network.conv6, 32  # image pixels between two of the map
    at = first["pool5"] + step * (conv6.kernel_size[0] // 2 - int(conv6.padding[0]))
    offsets = {}
    for name, layer in network.upsample.items():
        assert isinstance(layer, nn.ConvTranspose2d)
        step //= layer.stride[0]
        at -= step * ((layer.kernel_size[0] - 1) / 2 - int(layer.padding[0]))
        other = name.split("_")[1]  # to_pool4, to_pool3, to_image_8
        offsets[other] = int(abs(at - first[other]) / step)  # what begins earlier is cropped
    return offsets


def _crop(x: Tensor, offset: int, size: tuple[int, int] | torch.Size) -> Tensor:
    return x[..., offset : offset + size[0], offset : offset + size[1]]


def _upsampling(
    in_channels: int, out_channels: int, factor: int, caffe: bool
) -> nn.ConvTranspose2d:
    """Exactly `factor` times as large, centred: kernel 2s, stride s, padding s/2 (Caffe's: 0)."""
    return nn.ConvTranspose2d(
        in_channels,
        out_channels,
        2 * factor,
        stride=factor,
        padding=0 if caffe else factor // 2,
        bias=in_channels != out_channels,  # scores have theirs from the layer before
    )


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
