"""Test-time augmentation: a network sees an image mirrored, at several sizes, and in tiles.

    network = TestTime(predictor.scores, flip=True, scales=(0.75, 1, 1.25), tile=768)
    network = TestTime(predictor.scores, tile=cfg.tile, **view_settings(cfg.tta))
    mask = network.masks(image)     # (N, 3, H, W) uint8 -> (N, H, W) uint8

predict.py and evaluate.py use it for their settings `tta.flip`, `tta.scales` and `tile`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from fcn.errors import check_flag, check_whole, is_number, refuse
from fcn.inference.tiles import CELL, ScoreFunction, scores_in_bands

LARGE, LARGE_TILE = 2**22, 1024  # pixels; an image of more than LARGE gets tiles of this side
LARGEST_SCALE = 8


def view_settings(tta: Any) -> dict[str, Any]:
    """The arguments `flip` and `scales` of `TestTime` from the scripts' group of settings `tta`.

    What is missing there is None, which `TestTime` refuses.

    Raises:
        ConfigError: this is no group, or it has another setting, which would change nothing.
    """
    if not isinstance(tta, Mapping):
        refuse("tta", tta, "a group of settings")
    for name in tta:
        if name not in ("flip", "scales"):
            wanted = "tta.flip or tta.scales; the setting for tiles is tile=512"
            refuse(f"tta.{name}", tta[name], wanted)
    return {name: tta.get(name) for name in ("flip", "scales")}


class TestTime(nn.Module):
    """A module around a network that averages flips and scales, and cuts large images into tiles.

    Its input and output are those of the network. With `flip` or `scales`, the scores are the
    logarithm of the mean probability over all views.

    Args:
        network: images (N, 3, H, W) uint8 -> logits (N, K, H, W).
        flip: whether each view is also used mirrored, left to right.
        scales: factors on height and width, one view for each; [1] is the image alone.
        tile: side of square tiles in pixels, rounded down to a multiple of 32. None: an image is
            used in one piece, or, above 4 million pixels, in tiles of 1024, because a VGG would
            need gigabytes.

    Raises:
        ConfigError: an argument is out of its range. The message names the setting of the scripts.
    """

    __test__ = False  # pytest must not take this class for a test

    def __init__(
        self,
        network: ScoreFunction,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tile: int | None = None,
    ) -> None:
        check_flag("tta.flip", flip)
        check_whole("tile", tile, 2 * CELL, optional=True)
        valid = isinstance(scales, Sequence) and len(scales) > 0
        if not valid or not all(is_number(s) and 0 < s <= LARGEST_SCALE for s in scales):
            wanted = f"a list of numbers above 0 and at most {LARGEST_SCALE}, such as [0.75, 1]"
            refuse("tta.scales", scales, wanted)
        super().__init__()
        self.network, self.flip, self.scales = network, flip, tuple(scales)
        self.tile = None if tile is None else tile - tile % CELL

    def forward(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 -> scores (N, K, H, W)."""
        return torch.cat(list(self.bands(image)), 2)

    def masks(self, image: Tensor) -> Tensor:
        """The class of each pixel: images (N, 3, H, W) uint8 -> (N, H, W) uint8 on the CPU.

        With tiles, only the scores of one row of them, (N, K, tile, W) float32, are held at a time.
        """
        # For equal scores, max and argmax both give the first class, as torch documents for every
        # device. On a CPU, argmax takes twice as long.
        bands = [band.max(1).indices.to("cpu", torch.uint8) for band in self.bands(image)]
        return torch.cat(bands, 1)

    def bands(self, image: Tensor) -> Iterator[Tensor]:
        """The scores from the top of the image down, in bands of rows (N, K, h, W)."""
        height, width = image.shape[-2:]
        tile = self.tile
        if tile is None:
            tile = LARGE_TILE if height * width > LARGE else max(height, width)
        if max(height, width) <= tile:
            yield self._views(image)
        else:
            yield from scores_in_bands(self._views, image, tile)

    def _views(self, image: Tensor) -> Tensor:
        """Images or tiles (N, 3, H, W) uint8 -> scores (N, K, H, W) of all flips and scales."""
        if not self.flip and self.scales == (1,):
            return self.network(image)
        size = image.shape[-2:]
        total = torch.zeros(())  # of the probabilities (N, K, H, W) of all views
        for scale in self.scales:
            # Resizing uint8 is fastest where the colours of a pixel lie side by side in memory.
            view = image.contiguous(memory_format=torch.channels_last)
            if scale != 1:
                scaled = [max(1, round(side * scale)) for side in size]
                view = TF.resize_image(view, scaled, antialias=True)  # (N, 3, h, w)
            total = total + _probabilities(self.network(view), size)
            if self.flip:
                mirrored = self.network(view.flip(-1)).flip(-1)  # logits, turned back
                total = total + _probabilities(mirrored, size)
        views = len(self.scales) * (2 if self.flip else 1)
        return (total / views).clamp(min=1e-30).log()  # the logarithm of 0 would be -inf


def _probabilities(logits: Tensor, size: torch.Size) -> Tensor:
    """The logits of one view (N, K, h, w) -> probabilities (N, K, H, W) float32."""
    return F.interpolate(logits.float(), size, mode="bilinear").softmax(1)
