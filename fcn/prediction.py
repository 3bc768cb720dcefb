"""Photographs in, masks and overlays out; flips, scales and tiles at test time.

model = load_model(Path("runs/.../checkpoints/best.ckpt"))
network = TestTime(model.scores, flip=True, scales=(0.75, 1, 1.25), tile=768)
failed = predict_files(find_photos("photos", output), network, model.save)
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob, has_magic
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from fcn.datasets.reading import check_exist, is_picture, open_picture, read_ids
from fcn.datasets.voc2012 import ARCHIVE, LISTS, voc_palette
from fcn.devices import best_precision
from fcn.errors import ConfigError, reason
from fcn.evaluation import open_checkpoint
from fcn.visualize import FAINT, INK, one_line, overlay, to_pil, whole

Scores = Callable[[Tensor], Tensor]  # images (N, 3, H, W) uint8 -> logits (N, K, H, W)
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE, LARGE_TILE = 2**22, 1024  # pixels of an image seen as a whole; side of tiles above that
CELL = 32  # pixels of the coarsest pool: tiles on this grid pool as the whole image does


class TestTime(nn.Module):
    """A network seen through flips, scales and tiles; takes and gives what the network does.

    With `flip` or `scales`, scores are the log of the mean probability over all views. Tiles
    overlap by a third. Convolutions see zeros beyond a tile, so its outermost eighth counts
    nothing; over the next twelfth its weight rises as its neighbour's falls. At 768 every pixel is
    seen with 96 more around it: VGG-19's receptive field is 460 wide, its weight in the middle.
    (A trained VGG-19 FCN-8s on 1680×1260 pixels: 99.99 % of them get the class of the whole.)

    Args:
        network: images (N, 3, H, W) uint8 -> logits (N, K, H, W).
        flip: also mirrored.
        scales: factors on height and width; [1] is the image alone.
        tile: side in pixels, rounded down to a multiple of 32; None: images as a whole, but in
            tiles of 1024 above 4 million pixels, where a VGG would need gigabytes.

    Raises:
        ConfigError: an argument is out of its range.
    """

    __test__ = False  # no tests inside, pytest

    def __init__(
        self,
        network: Scores,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tile: int | None = None,
    ) -> None:
        super().__init__()
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ConfigError(f"tta.scales={list(scales)}: must be a list of numbers above 0")
        if tile is not None and tile < 2 * CELL:
            raise ConfigError(f"tile={tile}: must be null or a whole number from {2 * CELL} up")
        self.network, self.flip, self.scales = network, flip, tuple(scales)
        self.tile = tile and tile - tile % CELL

    def forward(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 -> scores (N, K, H, W)."""
        return torch.cat(list(self._bands(image)), 2)

    def masks(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 -> classes (N, H, W) uint8 on the CPU. With tiles, only the
        scores of one row of them are held at a time, (N, K, tile, W) float32."""
        bands = (band.argmax(1).to("cpu", torch.uint8) for band in self._bands(image))
        return torch.cat(list(bands), 1)

    def _bands(self, image: Tensor) -> Iterator[Tensor]:
        """The scores from the top down, in bands (N, K, h, W)."""
        height, width = image.shape[-2:]
        tile = self.tile or (LARGE_TILE if height * width > WHOLE else max(height, width))
        if max(height, width) <= tile:
            yield self._views(image)
            return
        rows, columns = tiles(height, tile), tiles(width, tile)
        band = None
        for number, (top, bottom, down) in enumerate(rows):
            for left, right, across in columns:
                scores = self._views(image[..., top:bottom, left:right]).float()
                if band is None:
                    band = scores.new_empty(*scores.shape[:2], 0, width)
                if left == 0:  # below what the tiles above have begun
                    band = F.pad(band, (0, 0, 0, bottom - top - band.shape[2]))  # (N, K, h, W)
                band[..., left:right] += scores * torch.outer(down, across).to(scores)
            assert band is not None
            done = (height if bottom == height else rows[number + 1][0]) - top
            yield band[:, :, :done]
            band = band[:, :, done:]

    def _views(self, image: Tensor) -> Tensor:
        """The scores of an image or a tile from all flips and scales."""
        if not self.flip and self.scales == (1,):
            return self.network(image)
        size = image.shape[-2:]
        total = torch.zeros(())
        for scale in self.scales:
            view = image.contiguous(memory_format=torch.channels_last)  # see RandomScaleCrop
            if scale != 1:
                scaled = [max(1, round(side * scale)) for side in size]
                view = TF.resize_image(view, scaled, antialias=True)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = self.network(view.flip(-1)).flip(-1) if mirrored else self.network(view)
                logits = F.interpolate(logits.float(), size, mode="bilinear")
                total = total.to(logits) + logits.softmax(1)
        return (total / (len(self.scales) * (1 + self.flip))).clamp(min=1e-30).log()


def tiles(length: int, tile: int) -> list[tuple[int, int, Tensor]]:
    """(start, stop, weight of each pixel) along one side; the weights of a pixel sum to 1."""
    whole = -(-length // CELL) * CELL  # to where the network pads
    overlap = max(CELL, tile // 3 // CELL * CELL)
    gaps = max(0, -(-(whole - tile) // (tile - overlap)))
    starts = [(whole - tile) * i // max(1, gaps) // CELL * CELL for i in range(gaps + 1)]
    x, margin = torch.arange(whole) + 0.5, overlap * 3 // 8
    # The image's own border is none of a tile's.
    low = torch.tensor([-math.inf, *starts[1:]])[:, None]
    high = torch.tensor([*(start + tile for start in starts[:-1]), math.inf])[:, None]
    inside = torch.minimum(x - low, high - x)  # (tiles, whole)
    weights = ((inside - margin) / (overlap - 2 * margin)).clamp(0, 1)
    weights /= weights.sum(0)
    stops = [min(start + tile, length) for start in starts]
    return [(a, b, w[a:b]) for a, b, w in zip(starts, stops, weights, strict=True)]


@dataclass
class Model:
    """What gives scores, with the names and colours of its classes."""

    scores: Scores
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]] | None  # None: VOC's

    def __post_init__(self) -> None:
        own = (self.palette or ())[: len(self.class_names)]
        self.colours = [*own, *voc_palette()[len(own) :]]  # 256: void and unused ones are VOC's

    def save_mask(self, image: Tensor, mask: Tensor, target: Path) -> None:
        """The classes (H, W) uint8 as a palette PNG, like VOC's own masks."""
        picture = to_pil(mask)
        picture.putpalette([channel for colour in self.colours for channel in colour])
        with whole(results(target)[0]) as part:
            picture.save(part, "PNG")

    def save(self, image: Tensor, mask: Tensor, target: Path) -> None:
        """The mask, and its colours over the image (3, H, W) uint8 above a legend."""
        self.save_mask(image, mask, target)
        parts = zip(image.split(256, 1), mask.split(256), strict=True)  # blended in float32
        pixels = torch.cat([overlay(i, m, self.colours) for i, m in parts], 1)
        found = mask.flatten().bincount().nonzero().flatten().tolist()
        entries = [(self.class_names[k], tuple(self.colours[k])) for k in found]
        with whole(results(target)[1]) as part:
            with_legend(to_pil(pixels), entries).save(part, "JPEG", quality=90, subsampling=0)


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, tuple]]) -> Image.Image:
    """The picture on top of a strip of names, each beside its colour."""
    size = max(13, picture.width // 50)
    font, line = ImageFont.load_default(size), round(1.8 * size)
    entries = [(one_line(name, 60), colour) for name, colour in entries]
    cell = 2 * line + round(max(font.getlength(name) for name, _ in entries))
    columns = max(1, picture.width // cell)
    height = picture.height + line * -(-len(entries) // columns)
    canvas = Image.new("RGB", (max(picture.width, cell), height), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for number, (name, colour) in enumerate(entries):
        x, y = cell * (number % columns), picture.height + line * (number // columns)
        draw.rectangle((x + line // 4, y + line // 4, x + line, y + line - 3), colour, FAINT)
        draw.text((x + 1.3 * line, y + line / 2), name, INK, font, anchor="lm")
    return canvas


def load_model(path: Path, device: str = "auto", precision: str | None = None) -> Model:
    """A checkpoint, or what export.py made of one (.onnx, .pt2), ready to give scores.

    Args:
        device: cpu, cuda, cuda:1, mps; auto: the fastest that is there.
        precision: None: as it was trained; of mixed ones, the one that this device is fast at.

    Raises:
        WeightsError: the file is missing, broken, not ours, or could run code.
        ConfigError: device or precision are not to be had.
    """
    if path.suffix == ".onnx":
        from fcn.export import open_onnx

        if device not in ("auto", "cpu") or precision not in (None, "32-true"):
            raise ConfigError(f"ckpt={path}: an ONNX file runs with device=cpu precision=32-true")
        return Model(*open_onnx(path))
    if path.suffix == ".pt2":
        from fcn.export import read_pt2

        module, trained = read_pt2(path), "32-true"
    else:
        module, checkpoint = open_checkpoint(path)
        trained = str(checkpoint["precision"])
    place = find_device(device)
    mixed_here = (place.type, trained) == ("cuda", "16-mixed")
    if (trained in AUTOCAST or place.type == "mps") and not mixed_here:  # mps has no float64
        trained = best_precision(place.type)
    precision = precision or trained
    network = module.network.eval().to(place, torch.float64 if precision == "64-true" else None)
    cast_weights(network, precision)
    dtype = AUTOCAST.get(precision)

    def scores(image: Tensor) -> Tensor:
        with torch.autocast(place.type, dtype, enabled=dtype is not None):
            return network(image.to(place))

    return Model(scores, module.class_names, module.hparams.get("palette"))


def cast_weights(network: nn.Module, precision: str) -> None:
    """Cast the weights for good, where autocast would cast them again for every image.

    The same scores from half the memory. Not for training: small updates would round to nothing.
    """
    dtype = AUTOCAST.get(precision)
    for layer in network.modules():
        if dtype is not None and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(dtype)


def find_device(name: str) -> torch.device:
    """The device of that name, or the fastest; ConfigError if it is not there."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error


def find_photos(pattern: str, output: Path) -> dict[Path, Path]:
    """Photographs, and where the results of each go: see `results`.

    Of folders (with all below) and globs, these are the files with an ending of a picture's
    that are not hidden and not in `output`. a/photo.jpg becomes output/a/photo.png and
    output/a/photo_overlay.jpg; beside a photo.tif, photo.jpg.png and photo.jpg_overlay.jpg.

    Raises:
        ConfigError: there are none, or results would overwrite one.
    """
    given, output = Path(pattern).expanduser(), Path(os.path.abspath(output))
    if given.is_file():
        root, found = given.parent, [str(given)]
    elif given.is_dir():
        root, found = given, glob(f"{escape(str(given))}/**/*", recursive=True)
    else:
        root = Path(*takewhile(lambda part: not has_magic(part), given.parts))
        found = glob(str(given), recursive=True)
    paths = sorted({Path(os.path.abspath(path)) for path in found})
    root = Path(os.path.commonpath([os.path.abspath(root), *(path.parent for path in paths)]))
    photos = [path for path in paths if is_picture(path) and not path.is_dir()]
    if output != root:
        photos = [path for path in photos if output not in path.parents]
    photos = paths if given.is_file() else photos
    if not photos:
        raise ConfigError(f"input={pattern}: no image there; it takes a file, a folder or a glob")
    taken = Counter((p.parent, name.casefold()) for p in photos for name in {p.stem, p.name})
    jobs, real = {}, set(map(os.path.realpath, photos))
    for path in photos:
        alone = taken[path.parent, path.stem.casefold()] == 1
        jobs[path] = output / path.relative_to(root).with_name(path.stem if alone else path.name)
        if real & set(map(os.path.realpath, results(jobs[path]))):
            raise ConfigError(
                f"output={output}: a result of {path.name} would overwrite a photograph"
            )
    return jobs


def results(target: Path) -> tuple[Path, Path]:
    """The mask's path and the overlay's."""
    return target.with_name(f"{target.name}.png"), target.with_name(f"{target.name}_overlay.jpg")


def voc_photos(root: str | Path | None, split: str | None, comp: str, output: Path) -> dict:
    """The images of a VOC list, and where VOC's evaluation server wants each mask.

    Args:
        split: None: the official test list if `root` has it, else val.
        comp: comp5, or comp6 for networks that saw other data than VOC's.

    Raises:
        DataError: the tree, its list or an image is missing.
    """
    folder = ARCHIVE.find(root, download=False)
    lists = folder / "ImageSets" / "Segmentation"
    split = split or ("test" if (lists / "test.txt").is_file() else "val")
    if Path(split).name != split:
        raise ConfigError(f"split={split}: must be the name of a list")
    ids = read_ids((LISTS if split == "seg11valid" else lists) / f"{split}.txt")
    place = output / "results" / "VOC2012" / "Segmentation" / f"{comp}_{split}_cls"
    jobs = {folder / "JPEGImages" / f"{name}.jpg": place / name for name in ids}
    check_exist(jobs, what="images")
    return jobs


def predict_files(
    jobs: Mapping[Path, Path],
    network: TestTime,
    save: Callable[[Tensor, Tensor, Path], None],
    *,
    batch_size: int = 1,
    upright: bool = True,
) -> dict[Path, str]:
    """Save what the network sees in each photograph; images of one size share batches.

    Returns:
        The photographs that could not be done, and why.
    """
    failed: dict[Path, str] = {}
    waiting: dict[tuple[int, ...], list[tuple[Path, Tensor]]] = {}

    def run(size: tuple[int, ...]) -> None:
        paths, images = zip(*waiting.pop(size), strict=True)
        try:
            with torch.inference_mode():
                masks = network.masks(torch.stack(images))
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            failed.update(dict.fromkeys(paths, "memory ran out; try tile=768 batch_size=1"))
            return
        for path, image, mask in zip(paths, images, masks, strict=True):
            try:
                jobs[path].parent.mkdir(parents=True, exist_ok=True)
                save(image, mask, jobs[path])
            except OSError as error:
                failed[path] = reason(error)

    for path in tqdm(jobs, unit="image", disable=len(jobs) == 1):
        try:
            image = read_photo(path, upright=upright)
        except Exception as error:  # a damaged file raises nearly anything in Pillow
            failed[path] = reason(error).splitlines()[0]
            continue
        waiting.setdefault(tuple(image.shape), []).append((path, image))
        if len(waiting[tuple(image.shape)]) == batch_size:
            run(tuple(image.shape))
        elif sum(map(len, waiting.values())) == 4 * batch_size:  # of many sizes: memory is finite
            run(next(iter(waiting)))
    for size in list(waiting):
        run(size)
    return failed


def read_photo(path: Path, *, upright: bool = True) -> Tensor:
    """(3, H, W) uint8 RGB of whatever Pillow reads; transparency over white, 16 bits cut to 8.

    Args:
        upright: turn it as its EXIF orientation says.
    """
    with warnings.catch_warnings(action="ignore"), open_picture(path) as file:
        photo = ImageOps.exif_transpose(file) if upright else file
        if photo.mode[0] in "IF":  # I, I;16, I;16B, F: convert("RGB") would clip
            values = np.nan_to_num(np.asarray(photo, np.float32))
            top = values.max()
            step = next((s for s in (1 / 256, 1, 256) if top <= 256 * s), top / 255)
            step = 256 if ";" in photo.mode else step
            grey = (values / step).clip(0, 255).astype(np.uint8)
            return torch.from_numpy(grey).expand(3, -1, -1).contiguous()  # (H, W) -> (3, H, W)
        if photo.has_transparency_data:
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
        pixels = np.array(photo.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), a view
