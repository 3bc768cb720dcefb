"""What is in a data set: pixels of each class, kinds of images, and what is wrong with them.

    before_training(datamodule)                  # train.py: masks of both splits, for some seconds
    train = Survey("train", data, images=True)   # the check: all pairs of a split
    balanced_weights(train.pixels[:21])          # the weight of each class, see model.class_weights

A data set is surveyed before training if it has a method `read_labels(index)`, which returns the
mask (H, W) of a sample without reading its image. Data sets of files have it, see reading.Pairs.
"""

import hashlib
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from fcn.datasets import SegmentationDataset
from fcn.datasets.folder import Folder
from fcn.datasets.palettes import Appearance, contradiction
from fcn.datasets.pictures import image_facts, image_size
from fcn.datasets.reading import Pairs
from fcn.datasets.value_range import Facts, Range, RangeError, clipping, range_problem
from fcn.errors import DataError

if TYPE_CHECKING:
    from fcn.datamodule import SegmentationDataModule

SECONDS = 10.0  # before training, for each of the two splits; masks that are left then are not read
# If more than this share of the masks with void pixels hold no class but the first, void seems to
# stand for a class there.
VOID_SHARE = 0.9
SHOWN = 3  # errors in a message before training


@dataclass
class PairReport:
    """What is noted of one pair of image and mask; None is what was not read."""

    error: DataError | None = None
    # For the file of the image: the type of its values, the lowest and the highest.
    facts: dict[Path, Facts] = field(default_factory=dict)
    # For the file of the mask: how it shows its labels.
    appearance: dict[Path, Appearance] = field(default_factory=dict)
    pixels: np.ndarray | None = None  # (256,), the number of pixels with each label
    size: tuple[int, int] | None = None  # height and width
    content: bytes | None = None  # a hash of the image's pixels
    # Whether EXIF turns the image in such a way that its size does not show whether its mask, which
    # EXIF does not turn, fits it.
    turned: bool = False


class Survey:
    """What is in one split. Every pair is read, whatever is wrong with the ones before it.

    Args:
        split: the name of the split.
        data: its data set.
        images: whether to read the images too, or only the masks and the headers of the images.
        seconds: after this time, no further pair is read. The order is random, so that those which
            were read are a sample of all.

    Attributes:
        value_range: the range that is set for the values of images.
        pairs: what was noted of each pair that was read, by its index.
        facts, appearances: what was noted of the files of images, and of masks.
        errors: of the pairs that cannot be used.
        good: indices of the others.
        pixels, masks: (256,), how many pixels have each label, and how many masks.
    """

    def __init__(
        self,
        split: str,
        data: SegmentationDataset,
        *,
        images: bool = False,
        seconds: float = math.inf,
    ) -> None:
        self.split, self.data, self._with_images = split, data, images
        self.value_range: Range | None = getattr(data, "value_range", None)
        self._deadline = time.monotonic() + seconds
        order = np.random.default_rng(0).permutation(len(data)).tolist()
        # Threads are enough, since Pillow releases Python's lock while it decodes.
        found = thread_map(self._read, order, desc=split, leave=False, disable=None)
        noted = dict(zip(order, found, strict=True))
        self.pairs: dict[int, PairReport] = {i: noted[i] for i in sorted(noted) if noted[i]}
        self.errors = [pair.error for pair in self.pairs.values() if pair.error is not None]
        self.good = [index for index, pair in self.pairs.items() if pair.error is None]
        self.facts: dict[Path, Facts] = {}
        self.appearances: dict[Path, Appearance] = {}
        self.pixels, self.masks = np.zeros((2, 256), np.int64)
        for pair in self.pairs.values():
            self.facts |= pair.facts
            self.appearances |= pair.appearance
            if pair.pixels is not None:
                self.pixels += pair.pixels
                self.masks += pair.pixels > 0

    def _read(self, index: int) -> PairReport | None:
        if time.monotonic() > self._deadline:
            return None
        pair = PairReport()
        try:
            self._note(index, pair)
        except DataError as error:
            pair.error = error
        return pair

    def _note(self, index: int, pair: PairReport) -> None:
        data: Any = self.data
        if isinstance(data, Folder):
            data.check_listed(index)
        if isinstance(data, Pairs):
            image, mask = data.pairs[data.ids[index]]
            pair.facts[image] = image_facts(image, data.value_range, max_pixels=data.max_pixels)
            (height, width), turn = image_size(image, max_pixels=data.max_pixels)
            if turn in (2, 3, 4) or (turn > 4 and height == width):
                with suppress(DataError):  # a mask in a .mat is no picture
                    pair.turned = image_size(mask, max_pixels=data.max_pixels)[1] == 1
        if isinstance(data, Folder):
            pair.appearance[mask] = data.appearance(mask)
        if self._with_images or not hasattr(data, "read_labels"):
            sample = data[index]
            labels = sample["mask"].numpy()
            values = sample["image"].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
            # The size is part of the hash: images of 2×8 and 4×4 pixels can have the same bytes.
            salt = "×".join(map(str, labels.shape)).encode()
            pair.content = hashlib.blake2b(values.tobytes(), digest_size=16, salt=salt).digest()
        else:
            labels = data.read_labels(index)
            if isinstance(data, Pairs) and (height, width) != labels.shape:
                data[index]  # this raises the error that says what differs
        pair.size = labels.shape
        pair.pixels = np.bincount(labels.ravel(), minlength=256)

    @property
    def is_complete(self) -> bool:
        """Whether every pair has been read, and none of them with an error."""
        return len(self.good) == len(self.data)

    def unseen_classes(self) -> list[str]:
        """The classes without a pixel in the masks that were read."""
        return [name for k, name in enumerate(self.data.classes) if not self.pixels[k]]


def balanced_weights(pixels: np.ndarray) -> list[float]:
    """Weights of the classes in inverse proportion to their pixels; over all pixels they average 1.

    Args:
        pixels: (K,), the training pixels of each class. A class without any has the weight 1.
    """
    present = pixels > 0
    weights = pixels.sum() / np.maximum(present.sum() * pixels, 1)
    return [round(float(weight), 6) for weight in np.where(present, weights, 1.0)]


def find_errors(train: Survey, val: Survey, *, limit: int | None) -> list[DataError]:
    """Errors to correct before a run can start: those of many files first, then single ones.

    Args:
        train, val: what is in the two splits.
        limit: the setting data.limit.
    """
    problems = [range_problem(train.facts | val.facts, train.value_range)]
    problems += [contradiction(train.appearances | val.appearances)]
    if limit is None:
        problems += [void_problem(train) or mixed_with_void(train, val)]
    # The first problem is said once, and not for each image.
    single = [e for e in (*train.errors, *val.errors) if not isinstance(e, RangeError)]
    return [*(DataError(text) for text in problems if text), *single]


def void_problem(train: Survey) -> str | None:
    """What is wrong if all pixels of a class are ignored, since its label is taken for void.

    In own data, a class without a pixel while others are void is taken for that mistake. In the
    published data sets, whose labels are known, all classes but one must be missing.
    """
    unseen, void = train.unseen_classes(), train.pixels[train.data.void]
    own, most = isinstance(train.data, Folder), len(unseen) >= len(train.data.classes) - 1
    if not (unseen and void and train.is_complete and (own or most)):
        return None
    share = void / train.pixels.sum()
    message = (
        f"no pixel of {', '.join(unseen)} in the {len(train.data)} training masks, but {share:.1%} "
        "of their pixels are void, which is ignored. "
    )
    if own and most:
        message += (
            "If these pixels are the missing class, as in masks of the values 0 and 255, set "
            'data.dataset.void=null "data.dataset.palette=[[0,0,0],[255,255,255]]", a colour for '
            "each class. "
        )
    elif own:
        message += (
            "Put images of it into the training list, or remove it from data.dataset.classes. "
        )
    return message + not_checked("the class is missing on purpose", train.data)


def not_checked(meant: str, data: SegmentationDataset) -> str:
    """How to train all the same."""
    return f"If {meant}, add data.limit={len(data)} (all images): then this is not checked"


def mixed_with_void(train: Survey, val: Survey) -> str | None:
    """What is wrong if masks of the labels 0 and 1 are mixed with masks of the values 0 and 255.

    In these, void takes the place of the class. Where void is a border, or lies outside of the
    field of view, there are masks that have it beside a class.
    """
    data = train.data
    if not isinstance(data, Folder):
        return None
    noted = (*train.pairs.values(), *val.pairs.values())
    counts = [pair.pixels for pair in noted if pair.pixels is not None]
    present = np.array(counts, np.int64).reshape(-1, 256) > 0  # (number of masks, 256)
    first, void = present[:, 0], present[:, data.void]  # (number of masks,)
    others = present[:, 1 : len(data.classes)].any(1)
    in_place = int((first & void & ~others).sum())
    if in_place <= VOID_SHARE * void.sum() or not (others & ~void).any():
        return None
    return (
        f"{in_place} of {len(present)} masks hold only {data.classes[0]} and void, which is "
        "ignored, while nearly all masks of the other classes hold no void. If void is a class "
        "there, as in masks of the values 0 and 255 among masks of labels, save all masks with the "
        f"same labels. {not_checked('it is meant', data)}"
    )


def before_training(datamodule: "SegmentationDataModule") -> None:
    """Read the masks of both splits, so that a bad one ends a run in its first minute.

    This takes at most 2 * SECONDS. It does nothing for a data set without `read_labels`.

    Args:
        datamodule: with both splits open.

    Raises:
        DataError: there are errors to correct; see `find_errors`.
    """
    train_data, val_data = datamodule.train_data, datamodule.val_data
    if not hasattr(train_data, "read_labels"):
        return
    started = time.monotonic()
    train = Survey(datamodule.train_split, train_data, seconds=SECONDS)
    val = Survey(datamodule.val_split, val_data, seconds=SECONDS)
    counts = [f"{len(s.pairs)} of {len(s.data)} masks of {s.split}" for s in (train, val)]
    print(f"read {' and '.join(counts)} in {time.monotonic() - started:.1f} s", flush=True)
    errors = find_errors(train, val, limit=datamodule.limit)
    if errors:
        lines = [str(error) for error in errors[:SHOWN]]
        if len(errors) > SHOWN:
            lines.append(f"and {len(errors) - SHOWN} more errors")
        raise DataError("\n".join(lines))
    warning = clipping(train.facts | val.facts, train.value_range)
    if warning:
        print(warning, flush=True)
    if train.is_complete and train.unseen_classes():
        print(f"warning: never in {train.split}: {', '.join(train.unseen_classes())}", flush=True)
