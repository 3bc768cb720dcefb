"""Augmentation and batching: `train_transform()`, `eval_transform()`, `collate()`.

Built on torchvision.transforms.v2 and tv_tensors, so an image and its mask move as one; bytes in,
bytes out, since the network normalises on its own device. All randomness is torch's global
generator: seed it and a sample comes out the same.
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

FILL = (124, 116, 104)  # ImageNet's mean colour: about 0 once the network has normalised it

Transform = Callable[[Sample], Sample]


class Batch(TypedDict):
    """Samples of one size: what a step of training or evaluation takes."""

    image: Tensor  # (N, 3, H, W) uint8, RGB
    mask: Tensor  # (N, H, W) uint8
    id: list[str]


def train_transform(
    *,
    crop_size: int | Sequence[int] | None,
    scale: Sequence[float] | None,
    flip: float = 0.5,
    jitter: float | None = None,
) -> Transform:
    """Random scale, padding and crop to one size, horizontal flip, colour; in this order.

    crop_size: height and width of what comes out, or one number for both; None: whole images
    scale: smallest and largest factor, drawn log-uniformly (halving as likely as doubling); None: 1
    flip: probability
    jitter: largest relative change of brightness, contrast and saturation, 0 to 1; a quarter of
        it for hue; None: no change

    Raises ValueError for numbers out of range.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is a probability, not {flip}")
    if jitter is not None and not 0 <= jitter <= 1:
        raise ValueError(f"jitter must be 0 to 1, not {jitter}")
    steps: list[torch.nn.Module] = [
        RandomScaleCrop(crop_size=crop_size, scale=scale),
        v2.RandomHorizontalFlip(flip),
    ]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter, jitter / 4))
    return v2.Compose(steps)


def eval_transform() -> Transform:
    """Changes nothing: a metric counts every pixel of the image as it is on disk."""
    return v2.Identity()


class RandomScaleCrop(v2.Transform):
    """Scales by a random factor and crops at a random place, without scaling what is cropped away.

    The crop is chosen in the scaled image, and only the part of the original below it is resized
    (to whole pixels at both ends, so the factor may differ by the last of them). Where the scaled
    image is smaller than the crop, it lies at the top left; the rest is FILL, and VOID in the mask.
    """

    def __init__(
        self, *, crop_size: int | Sequence[int] | None, scale: Sequence[float] | None
    ) -> None:
        super().__init__()
        size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"crop_size must be one or two numbers of pixels, not {crop_size}")
        if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1] < math.inf):
            raise ValueError(f"scale must be (smallest, largest) factor above 0, not {scale}")
        self.crop_size, self.scale = size, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.query_size(flat_inputs)  # (H, W)
        low, high = self.scale or (1.0, 1.0)
        factor = math.exp(math.log(low) + torch.rand(()).item() * math.log(high / low))
        box, size = [], []
        for i, side in enumerate(sides):
            scaled = max(round(side * factor), 1)
            crop = self.crop_size[i] if self.crop_size else scaled
            kept = min(crop, scaled)
            start = int(torch.randint(scaled - kept + 1, ()))
            # Outwards to whole pixels of the original, and at least one of them.
            first = min(math.floor(start * side / scaled), side - 1)
            last = min(math.ceil((start + kept) * side / scaled), side)
            box.append(slice(first, max(last, first + 1)))
            size.append((kept, crop))
        kept_size, crop_size = zip(*size, strict=True)
        return {"box": tuple(box), "size": kept_size, "crop_size": crop_size}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        is_mask = isinstance(inpt, tv_tensors.Mask)
        part = inpt.as_subclass(Tensor)[..., *params["box"]]  # (3 | -, h, w)
        if part.shape[-2:] != params["size"]:
            if is_mask:
                # Nearest *exact* takes the pixel below the centre, as bilinear does; torchvision's
                # default for masks, plain nearest, would shift the labels against the image.
                part = F.resize_image(
                    part[None], params["size"], interpolation=InterpolationMode.NEAREST_EXACT
                )[0]
            else:
                # Channels last: the fastest kernel, and the other fails on an image 1 pixel wide
                # (torch 2.14: "num_channels == unpacked_output.size(0)").
                part = part[None].contiguous(memory_format=torch.channels_last)
                part = F.resize_image(part, params["size"], antialias=True)[0]
        # (3 | -, kept H, kept W) -> (3 | -, crop H, crop W)
        return tv_tensors.wrap(_pad(part, params["crop_size"]), like=inpt)


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch of samples that may differ in size: each is padded at the right and bottom to the
    largest height and width, with FILL, and VOID in the mask, so that no loss or metric sees it."""
    size = tuple(max(s["mask"].shape[i] for s in samples) for i in (-2, -1))
    return {
        "image": torch.stack([_pad(s["image"].as_subclass(Tensor), size) for s in samples]),
        "mask": torch.stack([_pad(s["mask"].as_subclass(Tensor), size) for s in samples]),
        "id": [s["id"] for s in samples],
    }


def _pad(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """An image (3, h, w) or mask (h, w) at the top left of one of the wanted size."""
    h, w = x.shape[-2:]
    if (h, w) == size:
        return x
    out = x.new_empty((*x.shape[:-2], *size))
    out[...] = VOID if x.ndim == 2 else torch.tensor(FILL, dtype=x.dtype)[:, None, None]
    out[..., :h, :w] = x
    return out
