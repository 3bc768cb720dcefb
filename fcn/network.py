"""FCN-32s, FCN-16s, FCN-8s and FCN-4s on a torchvision VGG, as one class.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015.

    FCN(num_classes=21, stride=8)(torch.zeros(1, 3, 375, 500, dtype=torch.uint8)).shape
    # torch.Size([1, 21, 375, 500])

The network starts with random weights; `fcn.weights.load_weights` gives it those of ImageNet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fcn.vgg import CAFFE_MEAN, MEAN, STD, backbones, stage_widths, vgg_stages

# The pools whose features each variant adds to its coarse scores, coarse to fine. The paper ends
# at 8.
SKIPS = {32: (), 16: ("pool4",), 8: ("pool4", "pool3"), 4: ("pool4", "pool3", "pool2")}


class FCN(nn.Module):
    """A VGG turned into a segmentation network: encoder, head, and a decoder that adds skips.

    Args:
        num_classes: K, background included. Void is not a class.
        stride: pixels between two predictions of the finest map that is upsampled to the image:
            32, 16 or 8 (FCN-32s, FCN-16s, FCN-8s); or 4 (FCN-4s), which is not in the paper: it
            adds pool2 to an FCN-8s, as the paper adds pool3 to an FCN-16s.
        backbone: a torchvision VGG without batch norm: "vgg11", "vgg13", "vgg16" or "vgg19".
        head_width: channels of conv6 and conv7. Only 4096 can take VGG's own classifier.
        head_kernel: size of conv6, odd. Only 7 can take VGG's own classifier.
        dropout: the share of values that are zeroed after conv6 and conv7 while training.
        pooling: "max" as in VGG, or "avg" as in the tutorial this work starts from.
        fusion: "score" adds 1x1 class scores of the pools (the paper); "feature" upsamples the
            scores to the pools' own channels, adds the pools themselves and predicts last.
        pool_scales: factors on (pool5, pool4, pool3), applied before the head and the skips read
            them; with `deep_skips`, on the convolutions before these pools as well. The authors'
            "at once" training, which adds both skips from the first step, uses (1, 0.01, 0.0001):
            in an ImageNet VGG, the values of a pool are larger the nearer it is to the image, and
            without the factors the skip from pool3 would learn fastest. The factor of pool3 is that
            of pool2 as well, whose values are about as large.
        deep_skips: whether each skip also reads what the next stage's convolutions make of its
            pool, in the same height and width: conv5_3 of a VGG-16 with pool4, conv4_3 with pool3,
            and conv3_3 with pool2. The paper does not do this. A feature pyramid network (Lin et
            al. 2017) reads these convolutions. Needs fusion="score".
        skip_kernel: size of the convolutions that score what the skips read, odd; 1 in the paper.
            The decoder of an FPN has convolutions of 3x3. More than 1 needs fusion="score".
        learn_upsampling: False leaves every upsampling layer untrained. It keeps its first values,
            which are bilinear interpolation, or those that were loaded.
        learn_last_upsampling: False leaves only the last of them, which goes to the size of the
            image, untrained, as in the paper.
        freeze_stages: how many VGG stages, counted from the image, are not trained.
        checkpoint_stages: how many VGG stages, counted from the image, keep no activations except
            what a skip reads. All else is computed again in the backward pass (Chen et al. 2016).
        channels_last: whether the VGG's activations are stored as (N, H, W, C), which is faster on
            some devices (fcn.precision.best_layout). "auto" is True until `set_layout` is called
            with what suits the device.
        alignment: how the maps of different strides are laid over each other. "centered": the
            image is padded to a multiple of 32 pixels, and every map covers it exactly. "caffe":
            as the authors' own nets do it, and only for their weights. The image is padded with 100
            zeros on each side; conv6 (which must be 7x7) and the upsampling layers have no padding;
            pools round odd sizes up; and maps are cropped until they fit over each other. Images
            are normalised with Caffe's mean.

    Raises:
        ValueError: an argument is out of its range. The message begins with "name=value".
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int = 21,
        stride: int = 8,
        backbone: str = "vgg19",
        *,
        head_width: int = 4096,
        head_kernel: int = 7,
        dropout: float = 0.5,
        pooling: str = "max",
        fusion: str = "score",
        pool_scales: Sequence[float] = (1.0, 1.0, 1.0),
        deep_skips: bool = False,
        skip_kernel: int = 1,
        learn_upsampling: bool = True,
        learn_last_upsampling: bool = True,
        freeze_stages: int = 0,
        checkpoint_stages: int = 0,
        channels_last: bool | str = False,
        alignment: str = "centered",
    ) -> None:
        _check_arguments(locals())  # no other local variable exists yet
        super().__init__()
        self.backbone, self.stride, self.deep_skips = backbone, stride, deep_skips
        self.fusion, self.alignment, self.checkpoint_stages = fusion, alignment, checkpoint_stages
        self.skip_kernel = skip_kernel
        caffe = alignment == "caffe"
        # Pixels added around the image (conv1_1 adds one more itself), and the number that the
        # padded sides are multiples of.
        self.margin, self.cell = (99, 1) if caffe else (0, 32)

        self.stages = vgg_stages(backbone, pooling, ceil_mode=caffe)
        widths = stage_widths(self.stages)  # [64, 128, 256, 512, 512] in VGG-16 and 19
        padding = 0 if caffe else head_kernel // 2
        self.conv6 = TrimmedConv2d(widths[4], head_width, head_kernel, padding=padding)
        self.conv7 = nn.Conv2d(head_width, head_width, 1)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Conv2d(head_width, num_classes, 1)

        pools = ("pool5", "pool4", "pool3", "pool2")
        self.pool_scales = dict(zip(pools, (*pool_scales, pool_scales[2]), strict=True))
        self.skips = nn.ModuleDict()  # what each adds: scores of what it reads, or just that
        self.upsample = nn.ModuleDict()  # by 2 to the size of each pool, then to that of the image
        channels = num_classes
        for pool in SKIPS[stride]:
            before = int(pool[-1]) - 1  # the stages before that of this pool
            width = sum(widths[before : before + (2 if deep_skips else 1)])
            out_channels = num_classes if fusion == "score" else width
            self.skips[pool] = nn.Identity()
            if fusion == "score":
                self.skips[pool] = nn.Conv2d(width, num_classes, skip_kernel, 1, skip_kernel // 2)
            self.upsample[f"to_{pool}"] = _upsampling(channels, out_channels, 2, caffe)
            channels = out_channels
        self.upsample[f"to_image_{stride}"] = _upsampling(channels, num_classes, stride, caffe)
        self.offsets = crop_offsets(self)

        # The buffers are constants and are not saved with the weights.
        mean = CAFFE_MEAN if caffe else MEAN
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

        self.reset_parameters()
        self.set_layout(bool(channels_last))
        self.stages[:freeze_stages].requires_grad_(False)
        self.upsample.requires_grad_(learn_upsampling)
        if not learn_last_upsampling:
            self.upsample[f"to_image_{stride}"].requires_grad_(False)

    def reset_parameters(self) -> None:
        """Give every layer its first values: VGG and head random, scores zero, upsampling bilinear.

        Random weights are those of He et al. 2015. A VGG convolution with as many output as input
        channels gets half of these values plus the identity, as in DiracNets (Zagoruyko and
        Komodakis 2017). Otherwise the loss of a VGG-19 without batch norm and without pretrained
        weights stays where it is for hundreds of steps.
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
            # Here the last layer computes the class scores, and `score` only a map of K features.
            scores = [f"upsample.to_image_{self.stride}"]
        for layer in scores:
            nn.init.zeros_(self.get_parameter(f"{layer}.weight"))

    def set_layout(self, channels_last: bool) -> None:
        """Let the VGG's activations be stored as (N, H, W, C), or as (N, C, H, W)."""
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # Activations follow the weights of the VGG, and the skips read them. This does not use
        # Module.to(), which leaves 1x1 convolutions other strides than their gradients will have,
        # and copies gradients, which DistributedDataParallel keeps in storage of its own.
        for weight in (*self.stages.parameters(), *self.skips.parameters()):
            if weight.ndim == 4:
                weight.data = torch.empty_like(weight, memory_format=layout).copy_(weight.data)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores for every pixel.

        Args:
            image: (N, 3, H, W), RGB, uint8 or float in [0, 1]; any H and W from 1 up.

        Returns:
            Logits (N, K, H, W).

        Raises:
            ValueError: the images are of another shape or type.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images (N, 3, H, W); got {tuple(image.shape)}")
        height, width = image.shape[-2:]
        x = self.normalize(image)
        margin, right, bottom = self.margin, -width % self.cell, -height % self.cell
        x = F.pad(x, (margin, margin + right, margin, margin + bottom))  # (N, 3, H', W')

        features: dict[str, Tensor] = {}  # what the skips read
        for number, stage in enumerate(self.stages, start=1):
            assert isinstance(stage, nn.Sequential)
            pool, pool_before = f"pool{number}", f"pool{number - 1}"
            if self.deep_skips and pool_before in self.skips:
                # Until its own pool, a stage has the size of the pool before it.
                x = self._run(stage[:-1], number, x)  # (N, C, H'/2^(number-1), W'/2^(number-1))
                deep = self.pool_scales[pool] * x
                features[pool_before] = torch.cat([features[pool_before], deep], dim=1)
                x = stage[-1](x)
            else:
                x = self._run(stage, number, x)  # (N, C, H'/2^number, W'/2^number)
            if pool in self.skips:
                features[pool] = self.pool_scales[pool] * x

        # The layout goes back from channels_last to the default one. Otherwise conv6 would convert
        # its 103 M weights to channels_last in every step.
        x = (self.pool_scales["pool5"] * x).contiguous()
        x = self.dropout(F.relu(self.conv6(x)))  # (N, head_width, H'/32, W'/32)
        x = self.dropout(F.relu(self.conv7(x)))
        x = self.score(x)  # (N, K, H'/32, W'/32)

        for pool, skip in self.skips.items():
            x = self.upsample[f"to_{pool}"](x)  # (N, K or C of the pool, H'/16, ..), H'/8, H'/4
            x = x + _crop(skip(features.pop(pool)), self.offsets[pool], x.shape[-2:])
        x = self.upsample[f"to_image_{self.stride}"](x)  # (N, K, H', W'); "caffe": at least H, W
        return _crop(x, self.offsets["image"], (height, width))

    def _run(self, layers: nn.Sequential, number: int, x: Tensor) -> Tensor:
        """Layers of stage `number`, computed again in the backward pass if the settings say so."""
        if number <= self.checkpoint_stages and torch.is_grad_enabled():
            return checkpoint(layers, x, use_reentrant=False, preserve_rng_state=False)
        return layers(x)

    def normalize(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W), uint8 or float in [0, 1] -> minus mean, divided by deviation.

        Both are torchvision's for ImageNet. With alignment="caffe" the mean is Caffe's.

        Raises:
            ValueError: the images are of another type.
        """
        if image.dtype == torch.uint8:
            image = image.to(self.mean.dtype) / 255
        elif not image.is_floating_point():
            raise ValueError(f"expected images of uint8, or float in [0, 1]; got {image.dtype}")
        return (image.to(self.mean.dtype) - self.mean) / self.std


class TrimmedConv2d(nn.Conv2d):
    """A convolution that trains only those weights that meet a pixel of the map.

    On a map of n rows, weights n or more rows from the kernel's centre meet nothing but padding. A
    conv6 of 7x7 has such weights for images of up to 96 pixels. Their gradient is 0. But in
    bfloat16 on a CPU, torch 2.14 does not write it where there are one or two rows (a fault of
    oneDNN): it is whatever was in memory before, and sometimes NaN. So the kernel is trimmed first.
    The result is the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H, W), or less without padding."""
        padding, size = int(self.padding[0]), self.kernel_size[0]  # the kernel is square
        if torch.is_grad_enabled() and min(x.shape[-2:]) <= padding:
            rows, columns = (max(padding + 1 - side, 0) for side in x.shape[-2:])
            weight = self.weight[..., rows : size - rows, columns : size - columns]
            return F.conv2d(x, weight, self.bias, padding=(padding - rows, padding - columns))
        return super().forward(x)


def head_layers(network: FCN) -> list[str]:
    """The names of all layers with weights after the VGG stages: those of head and decoder."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("stages.")
    ]


def init_upsampling_(layer: nn.ConvTranspose2d) -> None:
    """Set a layer to bilinear interpolation of each channel by its own stride.

    With fusion="feature" a layer also changes the number of channels. Each output channel is then
    the interpolation of a random mixture of the input channels.

    Args:
        layer: has a kernel of twice its stride s. It is changed in place.
    """
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
    """How many rows and columns to crop at the top left of each pool, and of the last map.

    With alignment="centered" all are 0. Like Caffe's coord_map.py, this computes where in the image
    the centre of each map's first pixel lies. A convolution with a kernel of size k and padding p
    moves that point by (k - 1) / 2 - p pixels of its input; a transposed convolution moves it back
    by that many pixels of its output.

    Returns:
        For example {"pool4": 5, "pool3": 9, "image": 31}, in pixels of those maps.
    """
    # Where in the image the first pixel of each pool lies, and that of the image itself.
    first = {f"pool{n}": (2**n - 1) / 2 - network.margin for n in range(1, 6)} | {"image": 0.0}
    conv6, step = network.conv6, 32  # step: pixels of the image between two pixels of the map
    centre = first["pool5"] + step * (conv6.kernel_size[0] // 2 - int(conv6.padding[0]))
    offsets = {}
    for name, layer in network.upsample.items():
        assert isinstance(layer, nn.ConvTranspose2d)
        step //= layer.stride[0]
        centre -= step * ((layer.kernel_size[0] - 1) / 2 - int(layer.padding[0]))
        other = name.split("_")[1]  # to_pool4, to_pool3, to_image_8
        # The map that is cropped is the one that begins further up and to the left.
        offsets[other] = int(abs(centre - first[other]) / step)
    return offsets


def _crop(x: Tensor, offset: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """A window of height and width `size`, `offset` pixels from the top and from the left of x."""
    return x[..., offset : offset + size[0], offset : offset + size[1]]


def _upsampling(channels: int, out_channels: int, factor: int, caffe: bool) -> nn.ConvTranspose2d:
    """Upsampling by a factor s: a kernel of 2s, a stride of s, a padding of s/2, or 0 for Caffe.

    With s/2 the output is exactly s times as large as the input, and centred on it.
    """
    padding = 0 if caffe else factor // 2
    bias = channels != out_channels  # if they are equal, the layer before has added a bias already
    return nn.ConvTranspose2d(channels, out_channels, 2 * factor, factor, padding, bias=bias)


def _check_arguments(given: dict[str, Any]) -> None:
    """Refuse arguments of `FCN` that cannot work, before any layer is built.

    Raises:
        ValueError: for example "stride=7: must be 32, 16, 8 or 4".
    """
    limits = [("num_classes", 1, 255), ("head_width", 1, 2**14)]
    limits += [("freeze_stages", 0, 5), ("checkpoint_stages", 0, 5)]
    for name, low, high in limits:
        valid = _is_integer(given[name], low, high)
        _check(name, given[name], valid, f"a whole number from {low} to {high}")
    choices = {"backbone": backbones(), "pooling": ["max", "avg"], "fusion": ["score", "feature"]}
    choices["alignment"] = ["centered", "caffe"]
    for name, allowed in choices.items():
        _check(name, given[name], given[name] in allowed, " or ".join(allowed))
    for name in ("learn_upsampling", "learn_last_upsampling", "deep_skips"):
        _check(name, given[name], isinstance(given[name], bool), "true or false")
    layout = given["channels_last"]
    valid = isinstance(layout, bool) or layout == "auto"
    _check("channels_last", layout, valid, "auto, true or false")

    stride, kernel, dropout = given["stride"], given["head_kernel"], given["dropout"]
    _check("stride", stride, _is_integer(stride, 4, 32) and stride in SKIPS, "32, 16, 8 or 4")
    for name in ("head_kernel", "skip_kernel"):
        odd = _is_integer(given[name], 1, 63) and given[name] % 2 == 1
        _check(name, given[name], odd, "an odd number from 1 to 63")
    valid = _is_number(dropout) and 0 <= dropout < 1
    _check("dropout", dropout, valid, "a number of at least 0 and below 1")
    scales = given["pool_scales"]
    valid = isinstance(scales, Sequence) and len(scales) == 3
    valid = valid and all(_is_number(scale) and scale > 0 for scale in scales)
    _check("pool_scales", scales, valid, "three numbers above 0, for pool5, pool4 and pool3")

    fits = kernel == 7 or given["alignment"] != "caffe"
    _check("head_kernel", kernel, fits, "7 with alignment=caffe")
    fits = not given["deep_skips"] or given["fusion"] == "score"
    _check("deep_skips", given["deep_skips"], fits, "false with fusion=feature")
    fits = given["skip_kernel"] == 1 or given["fusion"] == "score"
    _check("skip_kernel", given["skip_kernel"], fits, "1 with fusion=feature")
    for name in ("learn_upsampling", "learn_last_upsampling"):
        fits = given[name] or given["fusion"] != "feature"
        _check(name, given[name], fits, "true with fusion=feature, which must learn to upsample")


# fcn/errors.py has such checks too. This file has its own, because it imports nothing of the
# project but vgg.py, so that it can be used alone.


def _check(name: str, value: object, valid: bool, wanted: str) -> None:
    if not valid:
        if isinstance(value, str) and value[:1].isdigit():
            wanted += ", but is a text; remove the quotes"
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
        raise ValueError(f"{name}={text}: must be {wanted}")


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    """Whether this is an int or a finite float, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
