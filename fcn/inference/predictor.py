"""A trained network that is ready for photographs, and what it writes for each of them.

    predictor = load_predictor(Path("runs/.../checkpoints/best.ckpt"))
    network = TestTime(predictor.scores, flip=True)
    jobs = find_photos("photos", Path("predictions"))
    failed = predict_files(jobs, network, predictor.write_results)

This is what predict.py does. From Python, `predictor.scores` alone gives class scores.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from fcn.cards import check_card, has_tensor_cores
from fcn.checkpoint import data_settings, image_type, read_checkpoint
from fcn.datasets import pictures
from fcn.datasets.pictures import MAX_PIXELS, image_facts, read_image
from fcn.datasets.value_range import SMALL_SHARE, Range, check_range, measure, range_problem
from fcn.datasets.voc2012 import voc_palette
from fcn.errors import ConfigError, DataError, WriteError, check_choice, check_whole, reason, refuse
from fcn.figures.legend import draw_legend, legend_entries
from fcn.figures.masks import labels_in, overlay, to_palette_image, to_pil
from fcn.files import atomic_write
from fcn.inference.onnx_session import open_onnx
from fcn.inference.photos import MARK, MASK, OVERLAY, result_path
from fcn.inference.tiles import ScoreFunction
from fcn.inference.tta import TestTime
from fcn.module import SegmentationModule
from fcn.precision import (
    AUTOCAST,
    PRECISIONS,
    best_layout,
    best_precision,
    cast_weights,
    main_device,
    precisions_of,
)

log = logging.getLogger(__name__)

JPEG_SIDE = 65_500  # pixels; libjpeg writes no longer side
OUT_OF_MEMORY = "memory ran out; try tile=768 batch_size=1"

Write = Callable[[Tensor, Tensor, Path], None]  # image (3, H, W), mask (H, W), target
Loaded = list[tuple[Path, Tensor]]  # photographs, and the image (3, H, W) uint8 of each


@dataclass
class Predictor:
    """A network, and the names and colours of its classes.

    Args:
        scores: images (N, 3, H, W) uint8 -> logits (N, K, H, W).
        class_names: the names of the K classes.
        palette: K colours (R, G, B), 0 to 255. None stands for VOC's.
        value_range: the values of an image's file that are black and white for the network; see
            `fcn.datasets.pictures.read_image`.
        image_type: the type that an image's file must have. None: any.
        data_root: where the run that trained the network had its data, if that is known.
    """

    scores: ScoreFunction
    class_names: Sequence[str]
    palette: Sequence[Sequence[int]] | None
    value_range: Range | None = None
    image_type: str | None = None
    data_root: str | None = None

    def __post_init__(self) -> None:
        own = (self.palette or ())[: len(self.class_names)]
        # A palette PNG has 256 colours. Those of void and of values that are no class are VOC's.
        self.colours = [*own, *voc_palette()[len(own) :]]

    def write_mask(self, image: Tensor, mask: Tensor, target: Path) -> None:
        """Write the classes (H, W) uint8 as a palette PNG, like VOC's own masks.

        Raises:
            WriteError: the file cannot be written.
        """
        save_png(to_palette_image(mask, self.colours), result_path(target, MASK))

    def write_results(self, image: Tensor, mask: Tensor, target: Path) -> None:
        """Write the mask (H, W) uint8, and its colours over the image (3, H, W) above a legend.

        Raises:
            WriteError: a file cannot be written.
        """
        self.write_mask(image, mask, target)
        picture = to_pil(overlay(image, mask, self.colours))
        entries = legend_entries(labels_in(mask), self.class_names, self.colours)
        font_size = max(13, min(picture.width // 50, picture.height // 10))
        legend = draw_legend(entries, width=picture.width, font_size=font_size)
        canvas = Image.new("RGB", (legend.width, picture.height + legend.height), "white")
        canvas.paste(picture)
        canvas.paste(legend, (0, picture.height))
        canvas.thumbnail((JPEG_SIDE, JPEG_SIDE))  # which leaves a smaller one as it is
        with atomic_write(result_path(target, OVERLAY)) as part:
            canvas.save(part, "JPEG", quality=90, subsampling=0, comment=MARK)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG with the mark by which a later run of predict.py recognises its own results.

    Raises:
        WriteError: the file cannot be written.
    """
    note = PngInfo()
    note.add_text("Software", MARK)
    with atomic_write(path) as part:
        picture.save(part, "PNG", pnginfo=note)


def load_predictor(path: Path, device: str = "auto", precision: str | None = None) -> Predictor:
    """Open a checkpoint, one of the authors' nets, or an .onnx file that export.py wrote.

    Args:
        path: the file.
        device: cpu, cuda, cuda:1 or mps; auto is the fastest that the machine has.
        precision: "32-true", "bf16-mixed", "16-mixed" or "64-true". None is the precision that the
            network was trained in, or, if that was a mixed one, the one this device is fast at.

    Raises:
        WeightsError: the file is missing, broken, not ours, or could run code.
        ConfigError: the machine has no such device, or the file cannot run in this precision.
        DeviceError: torch has no code for the device.
    """
    check_choice("precision", precision, PRECISIONS, optional=True)
    if path.suffix == ".onnx":  # it runs on the CPU, whatever GPU there is
        if device not in ("auto", "cpu") or precision not in (None, "32-true"):
            raise ConfigError(f"ckpt={path}: an ONNX file runs with device=cpu precision=32-true")
        checkpoint, onnx = open_onnx(path)
        settings, kind = checkpoint["hyper_parameters"], image_type(checkpoint)
        names, palette = settings["class_names"], settings["palette"]
        _, root = image_settings(checkpoint)
        return Predictor(onnx, names, palette, checkpoint["value_range"], kind, root)
    place = find_device(device)
    check_card(place)
    checkpoint = read_checkpoint(path)
    module = SegmentationModule.load_from_checkpoint(path, checkpoint=checkpoint)
    trained = str(checkpoint["precision"])
    # A network that was trained in float16, on a GPU without bfloat16, runs in float16 on any GPU
    # with tensor cores. Apple's mps has no float64.
    keep = place.type == "cuda" and trained == "16-mixed" and has_tensor_cores(place)
    if (trained in AUTOCAST or place.type == "mps") and not keep:
        trained = best_precision(place)
    precision = precision or trained
    if precision not in precisions_of(place):
        refuse("precision", precision, f"32-true on the device {place.type}")
    if precision == "64-true":  # the module was built in float32, which has rounded the weights
        module.double().load_state_dict(checkpoint["state_dict"])
    network = module.network.eval().to(place)
    network.set_layout(best_layout(place, precision, backward=False))
    cast_weights(network, precision)
    dtype = AUTOCAST.get(precision)

    def scores(image: Tensor) -> Tensor:
        with torch.autocast(place.type, dtype, enabled=dtype is not None):
            return network(image.to(place))

    value_range, root = image_settings(checkpoint)
    palette = module.hparams.get("palette")
    kind = image_type(checkpoint)
    return Predictor(scores, module.class_names, palette, value_range, kind, root)


def image_settings(checkpoint: Mapping[str, Any]) -> tuple[Range | None, str | None]:
    """The `value_range` of the data that a network was trained on, and the root of this data.

    Both are None for a network whose checkpoint has no data settings, such as one of the authors'.

    Raises:
        ConfigError: there is a `value_range` that cannot work.
    """
    data = data_settings(checkpoint) or {"dataset": {}}
    value_range = data["dataset"].get("value_range")
    check_range(value_range)
    return value_range, data.get("root")


def find_device(name: str) -> torch.device:
    """The device of that name; auto: the fastest that is there.

    Raises:
        ConfigError: there is no such device.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        refuse("device", name, "auto, cpu, mps, cuda or cuda:1")
    try:
        return torch.empty(0, device=main_device() if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error


def predict_files(
    jobs: Mapping[Path, Path],
    network: TestTime,
    write: Write,
    *,
    batch_size: int = 1,
    value_range: Range | None = None,
    expected: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict[Path, str]:
    """Write the results of photographs. Photographs of the same size share a batch.

    While the network computes, one thread reads the next photograph, and another one writes the
    results of the batch before.

    Args:
        jobs: photographs, and the target of each.
        network: predicts the mask of each image.
        write: a function that writes the results of one photograph. It is called in a thread.
        batch_size: images in a batch.
        value_range, expected, max_pixels: as for `fcn.datasets.pictures.read_image`.

    Returns:
        The photographs that could not be segmented or written, and why.

    Raises:
        ConfigError: `batch_size` is out of its range.
    """
    check_whole("batch_size", batch_size, 1, 2**14)
    warned = value_range is not None

    def read(path: Path) -> np.ndarray:
        nonlocal warned
        pixels = read_image(path, value_range, expected=expected, max_pixels=max_pixels)
        warned = warned or _warn_about_range(path, pixels, max_pixels)
        return pixels

    waiting: dict[torch.Size, Loaded] = {}  # by size of the image
    with one_thread() as reader, one_thread() as writer:
        batches = _Batches(jobs, network, write, writer)
        coming = read_ahead(jobs, read, reader)
        for path, result in tqdm(coming, unit="image", total=len(jobs), disable=len(jobs) < 2):
            try:
                pixels = result.result()
            except DataError as error:
                batches.fail([path], str(error).removeprefix(f"{path}: "))
                continue
            image = torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W), a view
            waiting.setdefault(image.shape, []).append((path, image))
            largest = max(waiting, key=lambda size: len(waiting[size]))
            # Where there are many sizes, a batch is predicted before it is full, to limit memory.
            many = sum(map(len, waiting.values())) == 4 * batch_size
            if many or len(waiting[largest]) == batch_size:
                batches.predict(waiting.pop(largest))
        for batch in waiting.values():
            batches.predict(batch)
        batches.finish()
    return batches.failed


@contextmanager
def one_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that works while the network computes.

    When the block ends, by an error or by Ctrl-C too, the thread ends what it has begun, so that no
    file is left half written, and begins nothing more.
    """
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(
    paths: Iterable[Path], read: Callable[[Path], np.ndarray], reader: ThreadPoolExecutor
) -> Iterator[tuple[Path, Future[np.ndarray]]]:
    """Each path, and what `read` gives for it or raises.

    While the caller works on one, `reader` reads the next one. It reads no further ahead, so that
    memory does not depend on how many there are.
    """
    begun = ((path, reader.submit(read, path)) for path in paths)
    for current, _ in pairwise(chain(begun, [None])):  # `pairwise` has begun the next one by now
        if current:  # for the type checker: only the last second one is None
            yield current


def _warn_about_range(path: Path, pixels: np.ndarray, max_pixels: int) -> bool:
    """Warn if the values of an image fill only a small part of the range of their type.

    Args:
        path: the file.
        pixels: (H, W, 3) uint8, what `read_image` has made of these values.
        max_pixels: as for `read_image`.

    Returns:
        Whether there was a warning.
    """
    if pictures.image_type(path, max_pixels=max_pixels) == "8-bit":
        return False
    # Decoding a file again takes long. A sixteenth of the pixels shows whether that is needed.
    low, high = measure(pixels[::4, ::4], "8-bit", usual=True).usual or (0, 0)
    if high - low > 255 * SMALL_SHARE:
        return False
    problem = range_problem({path: image_facts(path, max_pixels=max_pixels)}, None)
    if problem:
        log.warning(
            "%s (the run that trained the network has no data.dataset.value_range)", problem
        )
    return problem is not None


@dataclass
class _Batches:
    """Predicts batches of photographs. A thread writes one batch while the next is predicted."""

    jobs: Mapping[Path, Path]
    network: TestTime
    write: Write
    writer: ThreadPoolExecutor
    # The photographs that could not be segmented or written, and why, in the order in which their
    # turn came.
    failed: dict[Path, str] = field(default_factory=dict)
    writing: list[Future[None]] = field(default_factory=list)  # the results of the last batch

    def predict(self, batch: Loaded) -> None:
        """Predict photographs of one size, and hand them over to be written."""
        try:
            with torch.inference_mode():
                images = torch.stack([image for _, image in batch])  # (N, 3, H, W) uint8
                masks = self.network.masks(images)  # (N, H, W) uint8
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            self.fail([path for path, _ in batch], OUT_OF_MEMORY)
            return
        self.finish()  # At most one batch waits to be written, or memory would grow on a slow disk.
        for (path, image), mask in zip(batch, masks, strict=True):
            self.writing.append(self.writer.submit(self._write, path, image, mask))

    def _write(self, path: Path, image: Tensor, mask: Tensor) -> None:
        """Write the results of one photograph, in the thread."""
        target = self.jobs[path]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.write(image, mask, target)
        except (OSError, WriteError) as error:  # only the cause, as the caller names the file
            self.failed[path] = reason(error.__cause__ or error)

    def fail(self, paths: Iterable[Path], why: str) -> None:
        """Record photographs that failed, after the results of the batch before."""
        self.finish()
        self.failed |= dict.fromkeys(paths, why)

    def finish(self) -> None:
        """Wait until the last batch is written, and raise an error that is a mistake of ours."""
        for future in self.writing:
            future.result()
        self.writing = []
