"""The LightningDataModule: loaders for one data set, and nothing else.

Which image comes when, and how it is augmented, is a pure function of (seed, position): a run
that was killed and resumed sees what it would have seen, whatever the number of workers.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fcn.datasets import Sample, SegmentationDataset
from fcn.datasets.reading import check_disjoint
from fcn.errors import DataError
from fcn.transforms import Transform, collate, eval_transform, train_transform


class SegmentationDataModule(pl.LightningDataModule):
    """Training batches as an endless stream; evaluation batches in order, each image once.

    Args:
        dataset: makes one from (split, root, download), such as `fcn.datasets.voc2012.VOC2012`.
        root: folder that holds or receives the data.
        download: fetch the data if it is missing.
        train_split, val_split: names of splits.
        batch_size: images in a training batch of each process (device).
        eval_batch_size: images in an evaluation batch. 1 judges each image alone; more pads them
            to one size, which changes scores in the last digits.
        num_workers: loader processes; None: one less than there are cores, at most 8.
        limit: use only the first so many images of each split.
        crop_size, scale, flip, jitter: see `fcn.transforms.train_transform`.
        seed: of order and augmentation.

    Raises:
        DataError: in `prepare_data`, `setup` or while loading: the data is missing or broken.
    """

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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.make_dataset = dataset
        self.root, self.download = root, download
        self.train_split, self.val_split = train_split, val_split
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        if num_workers is None:
            able = hasattr(os, "sched_getaffinity")  # Linux
            cores = len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1
            num_workers = min(8, cores - 1)
        self.num_workers = num_workers
        self.limit, self.seed = limit, seed
        self.augment = train_transform(crop_size=crop_size, scale=scale, flip=flip, jitter=jitter)
        self.train_data: SegmentationDataset | None = None
        self.val_data: SegmentationDataset | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, known before any data is there."""
        return self._labels.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """A colour (R, G, B) for each class."""
        return self._labels.palette

    @property
    def _labels(self) -> Any:
        """What has both: the data set's class, or what `labels` there makes of its settings."""
        make = self.make_dataset
        cls, settings = getattr(make, "func", make), getattr(make, "keywords", {})  # of a partial
        return cls.labels(**settings) if hasattr(cls, "labels") else cls

    def prepare_data(self) -> None:
        """Fetch what is missing; Lightning calls this in one process only."""
        self.make_dataset(split=self.val_split, root=self.root, download=self.download)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits; refuse training images among those to validate on."""
        if stage in ("fit", None) and self.train_data is None:
            self.train_data = self.open(self.train_split)
        if stage in ("fit", "validate", None) and self.val_data is None:
            self.val_data = self.open(self.val_split)
        if self.train_data is not None and self.val_data is not None:
            check_disjoint(self.train_data.ids, self.val_data.ids)

    def sizes(self) -> str:
        """How many images there are, in words."""
        assert self.train_data is not None
        assert self.val_data is not None
        return f"{len(self.train_data)} images to train on, {len(self.val_data)} to validate on"

    def open(self, split: str) -> SegmentationDataset:
        """One split as it is on disk, or its first `limit` images."""
        data = self.make_dataset(split=split, root=self.root, download=False)
        if self.limit is not None:
            del data.ids[self.limit :]
        return data

    def train_dataloader(self) -> DataLoader:
        """From where the trainer stands, on and on: it ends by steps or time, not by epochs."""
        assert self.train_data is not None, "setup('fit') comes first"
        rank, world = self._process()
        start = 0
        if self.trainer is not None:
            batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
            start = batches * self.batch_size * world
        stream = ShuffledStream(
            len(self.train_data), seed=self.seed, start=start, rank=rank, world=world
        )
        data = Transformed(self.train_data, self.augment, seed=self.seed)
        return self._loader(data, batch_size=self.batch_size, sampler=stream)

    def val_dataloader(self) -> DataLoader:
        """The validation split."""
        assert self.val_data is not None, "setup('validate') comes first"
        return self.eval_dataloader(self.val_data)

    def eval_dataloader(self, data: SegmentationDataset) -> DataLoader:
        """Any split, in order, nothing changed, the last partial batch kept.

        Several processes share it out: each has one stretch of it, and no image comes twice, as it
        would from Lightning's own sampler, which evens the shares out.
        """
        rank, world = self._process()
        if len(data) < world:
            raise DataError(f"{world} processes cannot share {len(data)} images to validate on")
        unchanged = Transformed(data, eval_transform())
        order = range(len(data) * rank // world, len(data) * (rank + 1) // world)
        return self._loader(unchanged, batch_size=self.eval_batch_size, sampler=order)

    def _process(self) -> tuple[int, int]:
        """Which one this is, of how many."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _loader(self, data: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            data,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            **options,
        )


class ShuffledStream(Sampler[tuple[int, int]]):
    """(epoch, index) for each position of an endless stream; every epoch is a fresh permutation.

    Position p of epoch e = p // size depends on (seed, p) alone. Each of `world` processes takes
    every world-th position.
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


class Transformed(Dataset[Sample]):
    """A data set with a transform; with a `seed`, a key (epoch, index) fixes the randomness."""

    def __init__(
        self, data: SegmentationDataset, transform: Transform, *, seed: int | None = None
    ) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        if isinstance(key, int):
            return self.transform(self.data[key])
        epoch, index = key
        sample = self.data[index]
        # torchvision's transforms draw from torch's global generator: lend it, give it back.
        with torch.random.fork_rng(devices=[]):
            assert self.seed is not None
            torch.manual_seed(random_generator(self.seed, epoch, index).integers(2**63))
            return self.transform(sample)


def random_generator(*key: int) -> np.random.Generator:
    """A generator that depends on these numbers only, on every platform."""
    return np.random.default_rng(np.random.SeedSequence(key))
