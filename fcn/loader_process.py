"""Loader processes: how many there are, and what each runs, a data set with its transform.

    samples = Transformed(data, train_transform(crop_size=320), seed=0)
    samples[epoch, index]      # the same each time, in whatever process
    system_workers()           # how many processes suit this machine

Windows and macOS start such a process empty, and it imports the file of everything it is handed. So
nothing here imports pytorch_lightning, which would take 2.4 of 7.3 seconds and 80 of 470 MB (three
measurements on Linux with two cores, 2026-11-27).
"""

import math
import multiprocessing
import os
import signal

import numpy as np
import torch
from torch.utils.data import Dataset

from fcn.datasets import Sample, SegmentationDataset
from fcn.transforms import Transform

SPAWNED_BYTES = 400e6  # of memory that a loader process takes where it is spawned, not forked


class Transformed(Dataset[Sample]):
    """A data set with a transform.

    Args:
        data: the data set.
        transform: applied to every sample.
        seed: of the transform's random numbers. A key (epoch, index) then fixes them; a plain
            index as the key is for transforms without any.
    """

    def __init__(
        self, data: SegmentationDataset, transform: Transform, *, seed: int | None = None
    ) -> None:
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        if isinstance(key, int):
            return self.transform(self.data[key])
        epoch, index = key
        sample = self.data[index]
        # torchvision's transforms draw from torch's global generator. It is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            assert self.seed is not None
            torch.manual_seed(random_generator(self.seed, epoch, index).integers(2**63))
            return self.transform(sample)


def random_generator(*key: int) -> np.random.Generator:
    """A generator whose numbers depend only on `key`, and are the same on every platform."""
    return np.random.default_rng(np.random.SeedSequence(key))


def leave_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the run itself. A terminal sends it to the loader processes, too.

    They would end at once, and the run could not end its current step as it should.
    """
    for name in ("SIGINT", "SIGBREAK"):  # Ctrl-Break, on Windows
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def default_workers(cores: int, memory: float = math.inf) -> int:
    """The number of loader processes where none is asked for: one less than cores, at most 8.

    Args:
        cores: that this process may use.
        memory: bytes of free memory, which limit the number where processes are spawned. All
            loaders together get a quarter of it at most. If there is a second core, there is
            always one loader.
    """
    return int(min(8, cores - 1, max(1, memory / 4 / SPAWNED_BYTES)))


def system_workers() -> int:
    """`default_workers` for this machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that this process may use
        cores = len(os.sched_getaffinity(0))
    if not loaders_are_spawned():
        return default_workers(cores)
    import psutil

    return default_workers(cores, psutil.virtual_memory().available)


def loaders_are_spawned() -> bool:
    """Whether loader processes are new interpreters, which must import torch, and no forks."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return (chosen or multiprocessing.get_all_start_methods()[0]) != "fork"  # the default is first
