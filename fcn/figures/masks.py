"""A mask as a picture: in colours, laid over its image, or compared with the label.

    picture = to_pil(overlay(image, mask, palette))      # a Pillow image, to be shown or saved
    to_palette_image(mask, palette).save("mask.png")      # labels as pixel values, as VOC has them

A mask is a tensor (H, W) of class indices; `void` (255) marks pixels without a class. An image is
(3, H, W) uint8, RGB. A palette holds one colour (R, G, B), 0 to 255, for each class.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Colour = Sequence[int]
Palette = Sequence[Colour]

VOID = 255  # as in fcn.datasets, which this package does not import
VOID_COLOUR = (224, 224, 192)  # the cream that VOC's own masks have at void pixels
# Colours of the error map. They differ in lightness too, for readers who do not see red.
CORRECT, WRONG, IGNORED = (240, 240, 240), (204, 51, 17), (150, 150, 150)
# Rows of pixels that `overlay` works on at once. The indices that it computes take eight times the
# memory of the pixels themselves.
ROWS_AT_ONCE = 64


def colourise(mask: Tensor, palette: Palette, void: int = VOID) -> Tensor:
    """The colour of each pixel's class.

    Args:
        mask: (H, W), class indices of any integer type.

    Returns:
        (3, H, W) uint8.
    """
    colours = torch.from_numpy(_colours(palette, void))
    return colours[mask.cpu().long()].permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def _colours(palette: Palette, void: int = VOID) -> np.ndarray:
    """The colour of each label from 0 to 255: (256, 3) uint8."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[void] = VOID_COLOUR
    return colours


def overlay(image: Tensor, mask: Tensor, palette: Palette, alpha: float = 0.6) -> Tensor:
    """The colours of a mask laid over its image.

    A class whose colour is black, as that of VOC's background is, stays clear.

    Args:
        image: (3, H, W) uint8.
        mask: (H, W), class indices.
        alpha: how much of the mask's colour is in the result, from 0 to 1.

    Returns:
        (3, H, W) uint8, a new tensor. In memory it is (H, W, 3), as Pillow and video want it.
    """
    # predict.py calls this in a thread, beside the network. NumPy computes in that thread alone,
    # where torch would start further ones, which would take the cores from the network.
    pixels, labels = image.cpu().permute(1, 2, 0).numpy(), mask.cpu().numpy()  # (H, W, 3), (H, W)
    values = np.arange(256, dtype=np.float32)
    tints = np.float32(alpha) * _colours(palette).astype(np.float32)  # (256, 3)
    table = np.rint(np.float32(1 - alpha) * values + tints[..., None])  # label, channel, value
    table[[label for label, colour in enumerate(palette) if not any(colour)]] = values
    table = table.astype(np.uint8)
    # The place in the flat table where the values of each label and channel begin.
    starts = np.arange(0, table.size, 256).reshape(256, 3)
    result = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(result), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        result[rows] = table.take(starts.take(labels[rows], axis=0) + pixels[rows])
    return torch.from_numpy(result).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def error_map(label: Tensor, prediction: Tensor, void: int = VOID) -> Tensor:
    """Where a prediction is wrong: correct pixels light, wrong ones red, ignored ones grey.

    Args:
        label, prediction: (H, W), class indices, in RAM.

    Returns:
        (3, H, W) uint8.
    """
    kind = torch.where(label == void, 2, (label != prediction).long())  # index into the colours
    return colourise(kind, (CORRECT, WRONG, IGNORED))


def labels_in(*masks: Tensor) -> list[int]:
    """The labels that occur in any of the masks, in ascending order; void is one of them."""
    pixels = np.sum([to_pil(mask).histogram() for mask in masks], axis=0)  # (256,), of each label
    return pixels.nonzero()[0].tolist()


def resize_to_fit(picture: Tensor, width: int, height: int) -> Tensor:
    """Enlarge or shrink a picture until it just fits into a box; its shape stays.

    Args:
        picture: an image (3, H, W), or a mask (H, W), of which the nearest pixels are taken so
            that no labels are mixed; uint8.
        width, height: the box, in pixels.

    Returns:
        (3, h, w) or (h, w), uint8.
    """
    h, w = picture.shape[-2:]
    scale = min(width / w, height / h)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    method = Image.Resampling.BILINEAR if picture.ndim == 3 else Image.Resampling.NEAREST
    pixels = torch.from_numpy(np.array(to_pil(picture).resize(size, method)))
    return pixels.permute(2, 0, 1) if picture.ndim == 3 else pixels  # (h, w, 3) -> (3, h, w)


def to_pil(picture: Tensor) -> Image.Image:
    """An image (3, H, W) or a mask (H, W) as Pillow's RGB or grey image."""
    pixels = picture.cpu().to(torch.uint8).numpy()
    return Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels)


def to_palette_image(mask: Tensor, palette: Palette) -> Image.Image:
    """A mask as VOC stores it: pixel values are class indices, and the palette only shows them.

    Args:
        mask: (H, W), class indices.
        palette: up to 256 colours, one for each pixel value.
    """
    picture = to_pil(mask)
    picture.putpalette([channel for colour in palette for channel in colour])
    return picture
