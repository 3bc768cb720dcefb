"""What a process that loads data runs: a data set with its transform, away from Lightning.

    samples = Transformed(data, train_transform(crop_size=320), seed=0)
    samples[epoch, index]      # the same each time, in whatever process

Windows and macOS start such a process empty, and it imports the file of everything it is handed. So
nothing here imports pytorch_lightning, which would take 2.4 of 7.3 seconds and 80 of 470 MB (three
measurements on Linux with two cores, 2026-11-27).
"""

import signal

import numpy as np
import torch
from torch.utils.data import Dataset

from fcn.datasets import Sample, SegmentationDataset
from fcn.transforms import Transform


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
