"""A small and fast copy of an ONNX file: most of its layers compute in 8-bit integers.

    images = data_images(datamodule, 32)                  # or folder_images(Path("photos"))
    comparison = quantise(Path("float.onnx"), Path("int8.onnx"), images)

onnxruntime's own quantiser does it: static, one scale for each output channel of a layer (Jacob et
al., CVPR 2018; "QDQ" in onnxruntime). This is what python export.py int8=true does.

- In int8 are the VGG, conv6 and conv7, which have nearly all of the arithmetic and of the weights.
- In float stay the normalisation and padding of the image, the 1x1 layers that score classes, and
  the upsampling of the scores. Their rounding would go straight into the scores, whose largest one
  decides the class, and they take little time: with all layers in int8, 1.1 % of the pixels of a
  trained network changed their class, not 0.5 %, and the file was as fast within the noise.
- Activations have 8 bits (0 to 255), weights 7 (-64 to 64, `reduce_range`). Where a CPU has AVX2 or
  AVX-512 but no VNNI, onnxruntime adds two products in 16 bits. Their sum saturates at 32767, which
  2 * 255 * 127 exceeds and 2 * 255 * 64 does not. With 8 bits for weights, the file would give
  other classes on such a CPU than on others, without a warning. Unsigned weights of 8 bits are
  right everywhere, but slower: 1.4 times the float file's speed, not 1.8, with AVX2.
- The range of an activation is from the lowest to the highest value that the calibration images
  give ("MinMax"). Percentiles and entropy changed as many pixels, and took two to three times as
  long.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from fcn.datamodule import SegmentationDataModule
from fcn.datasets.pictures import is_picture, read_image
from fcn.datasets.value_range import Range
from fcn.errors import ConfigError
from fcn.files import atomic_write, create_folder
from fcn.inference.export import ExportError
from fcn.inference.onnx_session import open_session

CALIBRATED, COMPARED = 32, 8  # images of a folder; COMPARED also of a split
NEEDED = 0.97  # the share of pixels that must have the class of the float file
SIDE = 768  # of larger images, only the centre is used, so that memory does not depend on them
INT8_LAYERS = ("network.stages.", "network.conv6.", "network.conv7.")
INT8_OPERATORS = ("Conv", "Relu", "MaxPool", "AveragePool")

T = TypeVar("T")


class Images(NamedTuple):
    """Images (3, H, W) uint8, which are read one by one.

    Those in `calibrating` give the range of each activation. Those in `judging`, which are others,
    are used to compare the int8 file with the float file.
    """

    calibrating: Iterable[Tensor]
    judging: Iterable[Tensor]


class Comparison(NamedTuple):
    """How a file in int8 compares with the float file that it was made from."""

    equal: float  # the share of pixels with the same class, 0 to 1
    images: int
    seconds: tuple[float, float]  # for an image: float, int8; medians
    speedup: float  # the median over images
    size: float  # of the file, as a share of the float file's

    def __str__(self) -> str:
        exact, int8 = self.seconds
        return (
            f"in int8, {self.size:.0%} of the float file's size; {self.speedup:.2f} times as fast "
            f"({exact:.3f} and {int8:.3f} s an image, {torch.get_num_threads()} threads); "
            f"{self.equal:.2%} of the pixels of {self.images} other images keep their class"
        )


def data_images(datamodule: SegmentationDataModule, count: int) -> Images:
    """`count` training images, and COMPARED validation images, at equal distances.

    Raises:
        DataError: the data is missing.
    """
    train, val = (datamodule.open(s) for s in (datamodule.train_split, datamodule.val_split))
    return Images(
        (train[i]["image"] for i in spread(range(len(train)), count)),
        (val[i]["image"] for i in spread(range(len(val)), COMPARED)),
    )


def folder_images(folder: Path, value_range: Range | None, image_type: str | None) -> Images:
    """The pictures of a folder. If there are many: CALIBRATED + COMPARED, at equal distances.

    Args:
        folder: holds photographs like those that the network will see. Labels are not needed.
        value_range, image_type: as `fcn.datasets.pictures.read_image` takes them.

    Raises:
        ConfigError: there is no such folder, or there are fewer than two pictures in it.
    """
    if not folder.is_dir():
        wanted = "it takes a number of training images, or a folder of images"
        raise ConfigError(f"calibrate={folder}: there is no such folder; {wanted}")
    paths = sorted(p for p in folder.iterdir() if is_picture(p) and not p.name.startswith("."))
    if len(paths) < 2:
        wanted = f"at least 2 are needed, {CALIBRATED + COMPARED} are better"
        raise ConfigError(f"calibrate={folder}: {len(paths)} images in this folder; {wanted}")

    def read(path: Path) -> Tensor:
        pixels = read_image(path, value_range, expected=image_type)  # (H, W, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    chosen = spread(paths, CALIBRATED + COMPARED)
    judging = chosen[::5]
    return Images(map(read, sorted({*chosen} - {*judging})), map(read, judging))


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of some items, at equal distances."""
    count = min(count, len(items))
    return [items[len(items) * i // count] for i in range(count)]


def quantise(exact: Path, path: Path, images: Images) -> Comparison:
    """Write an int8 file, if enough pixels keep their class.

    Args:
        exact: an ONNX file in float that export.py wrote. The new file gets its metadata.
        path: the new file.
        images: to calibrate and to judge with.

    Raises:
        ExportError: fewer than NEEDED pixels keep their class; nothing new is at `path`.
        DataError: an image cannot be read.
        WriteError: the file cannot be written.
    """
    with create_folder(path.parent, path.name), atomic_write(path) as part:
        _write_int8(exact, part, map(_batch, images.calibrating))
        found = _compare(exact, part, map(_batch, images.judging))
        if not found.equal >= NEEDED:
            raise ExportError(
                f"in int8, only {found.equal:.2%} of the pixels of {found.images} images keep the "
                f"class that they have in float; {NEEDED:.0%} are needed. Calibrate with more "
                "images, or with such as the network will see (calibrate=), or export without int8"
            )
    return found


def _batch(image: Tensor) -> Tensor:
    """An image (3, H, W), or its centre, as a batch (1, 3, H, W)."""
    height, width = image.shape[-2:]
    cropped = center_crop(image.as_subclass(Tensor), [min(height, SIDE), min(width, SIDE)])
    return cropped[None].contiguous()


def _write_int8(exact: Path, part: Path, batches: Iterable[Tensor]) -> None:
    """Write the file `part` in int8, calibrated with batches (1, 3, H, W)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = ({"image": batch.numpy()} for batch in batches)
    with TemporaryDirectory() as folder:
        # This finds the shapes of all activations, and computes what is constant.
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(exact, ready, skip_symbolic_shape=True)
        graph = onnx.load(ready, load_external_data=False).graph
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        in_float = [n.name for n in convolutions if not n.input[1].startswith(INT8_LAYERS)]
        quantize_static(
            ready,
            part,
            SimpleNamespace(get_next=lambda: next(inputs, None)),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(INT8_OPERATORS),
            nodes_to_exclude=in_float,
        )


def _compare(exact: Path, part: Path, batches: Iterable[Tensor]) -> Comparison:
    """Run the float file and the int8 file on batches (1, 3, H, W)."""
    programs = [open_session(path)[0] for path in (exact, part)]
    seconds, equal, pixels = [], 0, 0
    for batch in batches:
        masks, taken = [], []
        for program in programs:
            started = time.perf_counter()
            scores = program(batch)[0]  # (1, K, H, W)
            taken.append(time.perf_counter() - started)
            masks.append(scores.argmax(1))
        seconds.append(taken)
        equal, pixels = equal + int((masks[0] == masks[1]).sum()), pixels + masks[0].numel()
    timed = seconds[1:] or seconds  # the first of several warms up
    one, two = (median(taken[i] for taken in timed) for i in (0, 1))
    speedup = median(a / b for a, b in timed)
    size = part.stat().st_size / exact.stat().st_size
    return Comparison(equal / pixels, len(seconds), (one, two), speedup, size)
