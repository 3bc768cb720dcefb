"""Augmentation and batching: `train_transform()`, `eval_transform()`, `collate()`.

    augment = train_transform(crop_size=320, scale=(0.5, 2.0), flip=0.5, jitter=0.2)
    batch = collate([augment(sample) for sample in samples])

Built on torchvision.transforms.v2 and tv_tensors, which change an image and its mask together.
Images stay uint8: the network normalises them on its own device. All random numbers come from
torch's global generator, so that a seed for it fixes what becomes of a sample.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fcn.datasets import VOID, Sample
from fcn.errors import check_number, is_number, refuse

FILL = (124, 116, 104)  # ImageNet's mean colour: about 0 once the network has normalised it
MAX_SIZE = 2**14  # an image of that height and width takes 1 GB; more must be a typing error

Transform = Callable[[Sample], Sample]


class Batch(TypedDict):
    """N samples, padded to one size, for one step of training or evaluation."""

    image: Tensor  # (N, 3, H, W) uint8, RGB
    mask: Tensor  # (N, H, W) uint8
    size: list[tuple[int, int]]  # height and width of each sample without the padding
    id: list[str]


def train_transform(
    *,
    crop_size: int | Sequence[int] | None,
    scale: Sequence[float] | None,
    flip: float = 0.5,
    jitter: float | None = None,
    rotate: float | None = None,
    blur: float | None = None,
) -> Transform:
    """Random rotation, scale, padding and crop to one size, flip, colour, blur, in this order.

    Args:
        crop_size: (height, width) in pixels of every result, or one number for both; None: the
            whole image, whatever its size.
        scale: the smallest and the largest factor. A factor is drawn uniformly on a logarithmic
            scale, so that halving is as likely as doubling. None: no scaling.
        flip: the probability of a horizontal flip.
        jitter: the largest relative change of brightness, contrast and saturation, from 0 to 1;
            the hue changes by at most a quarter of it. None: no change of colour.
        rotate: the largest angle in degrees, to either side, up to 180. What comes into view is
            filled as padding is: with FILL in the image and VOID in the mask. None: no rotation.
        blur: the largest standard deviation of a Gaussian blur, in pixels of the result. It is
            drawn uniformly, beginning with 0.1, which changes nothing. None: no blur.

    Raises:
        ConfigError: an argument cannot work. The message begins with "name=value".
    """
    check_number("flip", flip, 0, 1)
    check_number("jitter", jitter, 0, 1, optional=True)
    check_number("rotate", rotate, 0, 180, optional=True)
    check_number("blur", blur, 0.1, 100, optional=True)
    steps: list[torch.nn.Module] = [
        RandomScaleCrop(crop_size=crop_size, scale=scale),
        v2.RandomHorizontalFlip(flip),
    ]
    if rotate:
        fill: dict[Any, Any] = {tv_tensors.Image: FILL, tv_tensors.Mask: VOID}
        steps.insert(0, v2.RandomRotation(rotate, InterpolationMode.BILINEAR, fill=fill))
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, jitter / 4))
    if blur:
        steps.append(Blur(kernel_size=2 * math.ceil(3 * blur) + 1, sigma=(0.1, blur)))
    return v2.Compose(steps)


def eval_transform() -> Transform:
    """No change at all: a score is taken over every pixel of the image as it is on disk."""
    return v2.Identity()


class Blur(v2.GaussianBlur):
    """A Gaussian blur with a smaller kernel for an image that is too small for its own."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Blur an image (3, H, W), and leave a mask (H, W) as it is."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        # At the border the image is reflected, by half a kernel, which must be less than its side.
        sides = (inpt.shape[-1], inpt.shape[-2])  # kernel_size is (x, y)
        size = [min(k, 2 * side - 1) for k, side in zip(self.kernel_size, sides, strict=True)]
        return F.gaussian_blur(inpt, size, **params)


class RandomScaleCrop(v2.Transform):
    """Scales by a random factor, then crops at a random place.

    The crop is chosen in the scaled image, but only the part of the original that it covers is
    resized, which saves time. That part is rounded to whole pixels, so that the factor may differ
    slightly. A scaled image that is smaller than the crop is placed at its top left, and what is
    left of the crop is filled with FILL in the image and VOID in the mask.

    Args:
        crop_size, scale: as for `train_transform`.

    Raises:
        ConfigError: an argument cannot work. The message begins with "name=value".
    """

    def __init__(
        self, *, crop_size: int | Sequence[int] | None, scale: Sequence[float] | None
    ) -> None:
        super().__init__()
        size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if size is not None and not (_is_pair(size) and all(map(is_size, size))):
            wanted = f"null, a number of pixels from 1 to {MAX_SIZE}, or [height, width]"
            refuse("crop_size", crop_size, wanted)
        if scale is not None and not (
            _is_pair(scale) and all(map(is_number, scale)) and 0 < scale[0] <= scale[1]
        ):
            refuse("scale", scale, "null or [smallest, largest], both above 0")
        self.crop_size, self.scale = size, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor and the place of the crop, once for an image and its mask.

        Returns:
            `box`: the rows and columns of the original to cut out, as slices.
            `size`: (height, width) that this part is resized to.
            `crop_size`: (height, width) that it is then padded to.
        """
        sides = v2.query_size(flat_inputs)  # (H, W)
        low, high = self.scale or (1.0, 1.0)
        factor = math.exp(math.log(low) + torch.rand(()).item() * math.log(high / low))
        box, size = [], []
        for i, side in enumerate(sides):
            scaled = max(round(side * factor), 1)
            crop = self.crop_size[i] if self.crop_size else scaled
            kept = min(crop, scaled)
            start = int(torch.randint(scaled - kept + 1, ()))
            # Round outwards to whole pixels of the original, and keep at least one of them.
            first = min(math.floor(start * side / scaled), side - 1)
            last = min(math.ceil((start + kept) * side / scaled), side)
            box.append(slice(first, max(last, first + 1)))
            size.append((kept, crop))
        kept_size, crop_size = zip(*size, strict=True)
        return {"box": tuple(box), "size": kept_size, "crop_size": crop_size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut, resize and pad an image (3, H, W) or a mask (H, W)."""
        part = inpt.as_subclass(Tensor)[..., *params["box"]]  # (..., H, W) -> (..., h, w)
        if part.shape[-2:] != params["size"]:
            # (..., h, w) -> (..., kept H, kept W)
            if isinstance(inpt, tv_tensors.Mask):
                # NEAREST_EXACT takes the pixel below the centre, as bilinear interpolation does.
                # Plain nearest, torchvision's default for masks, would shift the labels against
                # the image.
                part = F.resize_image(
                    part[None], params["size"], interpolation=InterpolationMode.NEAREST_EXACT
                )[0]
            else:
                # Channels last is the fastest layout here. The other one fails on an image that is
                # one pixel wide (torch 2.14: "num_channels == unpacked_output.size(0)").
                part = part[None].contiguous(memory_format=torch.channels_last)
                part = F.resize_image(part, params["size"], antialias=True)[0]
        # (..., kept H, kept W) -> (..., crop H, crop W)
        return tv_tensors.wrap(pad(part, params["crop_size"]), like=inpt)


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch of samples that may differ in size.

    Each sample is padded at the right and at the bottom to the largest height and width of all.
    The padding is FILL in the image and VOID in the mask: no loss and no metric includes it.
    """
    size = tuple(max(s["mask"].shape[i] for s in samples) for i in (-2, -1))
    return {
        "image": torch.stack([pad(s["image"].as_subclass(Tensor), size) for s in samples]),
        "mask": torch.stack([pad(s["mask"].as_subclass(Tensor), size) for s in samples]),
        "size": [tuple(s["mask"].shape) for s in samples],
        "id": [s["id"] for s in samples],
    }


def pad(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """An image (3, h, w) or a mask (h, w), placed at the top left of one of the wanted size."""
    h, w = x.shape[-2:]
    if (h, w) == size:
        return x
    out = x.new_empty((*x.shape[:-2], *size))
    out[...] = VOID if x.ndim == 2 else torch.tensor(FILL, dtype=x.dtype)[:, None, None]
    out[..., :h, :w] = x
    return out


def is_size(value: Any) -> bool:
    """Whether this can be a number of pixels, or of images in a batch."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2
