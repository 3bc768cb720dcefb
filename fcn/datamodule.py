"""The LightningDataModule: loaders for one data set, and nothing else.

    data = SegmentationDataModule(dataset=VOC2012, root="data", batch_size=2, crop_size=320)
    trainer.fit(module, datamodule=data)

Which image comes when, and how it is augmented, depends only on the seed and on the position in the
stream. A run that was killed and resumed therefore sees the images that it would have seen without
the interruption, and the number of loader processes makes no difference.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fcn.datasets import SegmentationDataset, find_dataset
from fcn.datasets.reading import check_disjoint
from fcn.errors import ConfigError, DataError, check_flag, check_text, check_whole, reason, refuse
from fcn.loader_process import (
    Transformed,
    leave_interrupts,
    loaders_are_spawned,
    random_generator,
    system_workers,
)
from fcn.transforms import MAX_SIZE, collate, eval_transform, is_size, train_transform


class SegmentationDataModule(pl.LightningDataModule):
    """Training batches as an endless stream; evaluation batches in order, each image once.

    Args:
        dataset: opens a split, given `split`, `root` and `download`: a data set's class such as
            `fcn.datasets.voc2012.VOC2012`, or a `functools.partial` of one.
        root: the folder that holds the data, or receives the download.
        download: whether to fetch the data if it is missing.
        train_split, val_split: names of splits of the data set.
        batch_size: images in a training batch of each process (device). "auto" is accepted as a
            placeholder, to be replaced by a number before the loaders are made.
        eval_batch_size: images in an evaluation batch. 1 evaluates every image at its own size. A
            larger number pads images to a common size, which changes scores in the last digits.
        num_workers: loader processes; None: as many as `system_workers` says. With forked
            processes, validation has as many of its own, which take little memory. With spawned
            ones it has one at most.
        limit: use only the first so many images of each split; None: all.
        crop_size, scale, flip, jitter, rotate, blur: see `fcn.transforms.train_transform`.
        seed: fixes the order of the images and their augmentation.

    Raises:
        ConfigError: an argument cannot work. The message begins with "name=value".
        DataError: in `prepare_data`, `setup` or while loading: the data is missing or broken.
    """

    train_data: SegmentationDataset  # `setup` opens both
    val_data: SegmentationDataset

    def __init__(
        self,
        *,
        dataset: Callable[..., SegmentationDataset],
        root: str | Path | None = None,
        download: bool = False,
        train_split: str = "train",
        val_split: str = "val",
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        limit: int | None = None,
        crop_size: int | Sequence[int] | None = None,
        scale: Sequence[float] | None = None,
        flip: float = 0.5,
        jitter: float | None = None,
        rotate: float | None = None,
        blur: float | None = None,
        seed: int = 0,
    ) -> None:
        # Classes are known before any data is on disk: they are attributes of the data set's class,
        # or, where they depend on its arguments, what its class method `labels` returns for these.
        labels: Any = getattr(dataset, "func", dataset)
        if hasattr(labels, "labels"):
            labels = labels.labels(**getattr(dataset, "keywords", {}))
        if not (callable(dataset) and hasattr(labels, "classes") and hasattr(labels, "palette")):
            refuse("dataset", dataset, "the class of a data set, or a functools.partial of one")
        if not isinstance(root, Path):
            check_text("root", root, optional=True)
        check_flag("download", download)
        check_text("train_split", train_split, wanted="the name of a split, such as train")
        check_text("val_split", val_split, wanted="the name of a split, such as val")
        if batch_size != "auto" and not is_size(batch_size):
            refuse("batch_size", batch_size, f"auto or a whole number from 1 to {MAX_SIZE}")
        check_whole("eval_batch_size", eval_batch_size, 1, MAX_SIZE)
        check_whole("num_workers", num_workers, 0, 256, optional=True)
        check_whole("limit", limit, 1, optional=True)
        check_whole("seed", seed, 0, 2**32 - 1)
        super().__init__()
        self.augment = train_transform(
            crop_size=crop_size, scale=scale, flip=flip, jitter=jitter, rotate=rotate, blur=blur
        )
        self.make_dataset = dataset
        self.root, self.download = root, download
        self.train_split, self.val_split = train_split, val_split
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers = system_workers() if num_workers is None else num_workers
        self.limit, self.seed = limit, seed
        self.classes: tuple[str, ...] = labels.classes
        self.palette: tuple[tuple[int, int, int], ...] = labels.palette  # RGB, 0 to 255

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build a data module from the plain values that a checkpoint holds.

        Args:
            settings: as `fcn.checkpoint.data_settings` returns them. `dataset` holds the name of
                the data set's class under `class`, and the arguments of that class. Everything
                else are arguments of this data module.

        Raises:
            DataError: `class` names no data set of this project.
            ConfigError: an argument has an unknown name, or a value that cannot work.
        """
        arguments = dict(settings)
        dataset = arguments.pop("dataset", None)
        if not isinstance(dataset, Mapping):
            refuse("dataset", dataset, "the name of a data set's class, and its arguments")
        options = dict(dataset)
        dataset_class = find_dataset(options.pop("class", None))
        try:
            signature(dataset_class).bind(split="train", root=None, download=False, **options)
            signature(cls).bind(dataset=dataset_class, **arguments)
        except TypeError as error:  # its message names the argument
            raise ConfigError(str(error)) from error
        return cls(dataset=partial(dataset_class, **options), **arguments)

    def prepare_data(self) -> None:
        """Fetch the data if it is missing. Lightning calls this in one process only."""
        self.open(self.val_split, download=self.download)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that a stage needs.

        Raises:
            DataError: a split is incomplete, or the two share images.
        """
        if stage in ("fit", None) and not hasattr(self, "train_data"):
            self.train_data = self.open(self.train_split)
        if stage in ("fit", "validate", None) and not hasattr(self, "val_data"):
            self.val_data = self.open(self.val_split)
        if hasattr(self, "train_data") and hasattr(self, "val_data"):
            check_disjoint(self.train_data.ids, self.val_data.ids)

    def state_dict(self) -> dict[str, int]:
        """A checksum of the ids of each open split, by which a resumed run notices a change."""
        opened = {name: getattr(self, f"{name}_data", None) for name in ("train", "val")}
        return {
            f"{name}_images": zlib.crc32("\n".join(data.ids).encode(errors="backslashreplace"))
            for name, data in opened.items()
            if data is not None
        }

    def open(self, split: str, *, download: bool = False) -> SegmentationDataset:
        """One split as it is on disk, or its first `limit` images."""
        try:
            data = self.make_dataset(split=split, root=self.root, download=download)
        except PermissionError as e:  # a folder that may not be listed
            raise DataError(f"{e.filename}: {reason(e)}") from e
        data.ids = data.ids[: self.limit]
        return data

    def train_dataloader(self) -> DataLoader:
        """An endless loader that starts where the trainer is.

        It never ends: the length of a run is given in steps or in time, and `trainer.max_epochs` is
        converted to steps before the first one.
        """
        rank, world = self._process()
        start = 0
        if self.trainer is not None:
            batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
            start = batches * self.batch_size * world
        stream = ShuffledStream(
            len(self.train_data), seed=self.seed, start=start, rank=rank, world=world
        )
        data = Transformed(self.train_data, self.augment, seed=self.seed)
        return self._loader(data, self.batch_size, stream, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The loader of the validation split."""
        beside_training = hasattr(self, "train_data") and loaders_are_spawned()
        return self.eval_dataloader(self.val_data, most_workers=1 if beside_training else 256)

    def eval_dataloader(self, data: SegmentationDataset, *, most_workers: int = 256) -> DataLoader:
        """A loader of any split: in order, unchanged, with the last batch even if it is smaller.

        Several processes divide the split between them into consecutive parts. Lightning's own
        sampler would repeat some images to make all parts equally long, which changes the scores.

        Raises:
            DataError: there are fewer images than processes.
        """
        rank, world = self._process()
        if len(data) < world:
            raise DataError(
                f"{world} processes cannot share {len(data)} images to validate on: use fewer "
                "devices, or a larger data.val_split or data.limit"
            )
        unchanged = Transformed(data, eval_transform())
        order = range(len(data) * rank // world, len(data) * (rank + 1) // world)
        workers = min(self.num_workers, most_workers)
        return self._loader(unchanged, self.eval_batch_size, order, workers)

    def _process(self) -> tuple[int, int]:
        """The rank of this process, and how many processes there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, data: Dataset, batch_size: int, sampler: Any, workers: int) -> DataLoader:
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=leave_interrupts,
        )


class ShuffledStream(Sampler[tuple[int, int]]):
    """Yields (epoch, index) without end; every epoch is another permutation of the images.

    What comes at position p, in epoch p // size, depends only on the seed and on p.

    Args:
        size: the number of images.
        seed: of the permutations.
        start: the position in the stream to begin at.
        rank, world: of `world` processes, each takes every `world`-th position; the first
            position of this one is `start + rank`.
    """

    def __init__(
        self, size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if size == 0:
            raise DataError("the training split has no images")
        self.size, self.seed, self.start, self.rank, self.world = size, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        current, order = -1, np.empty(0, np.int64)
        while True:
            epoch, place = divmod(position, self.size)
            if epoch != current:
                current, order = epoch, random_generator(self.seed, epoch).permutation(self.size)
            yield epoch, int(order[place])
            position += self.world
