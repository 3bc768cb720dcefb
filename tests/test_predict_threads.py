"""fcn/inference/predictor.py: photographs are read and written while the network computes."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fcn.errors import WriteError
from fcn.files import atomic_write
from fcn.inference import predictor
from fcn.inference.predictor import OUT_OF_MEMORY, predict_files
from fcn.inference.tta import TestTime

PATIENCE = 10  # seconds until a test fails in which something is not done beside something else
Jobs = dict[Path, Path]


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    """Five photographs of one size."""
    for number in range(5):
        Image.new("RGB", (9, 7)).save(tmp_path / f"{number}.png")
    return {tmp_path / f"{n}.png": tmp_path / "out" / str(n) for n in range(5)}


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """None of the threads begun by a test is left, whatever happens."""
    before = set(threading.enumerate())  # other tests of this process may have left some
    yield
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name.startswith("ThreadPoolExecutor")]


def network(step: Callable[[int], None]) -> TestTime:
    """Finds class 0 everywhere, and calls `step` with 0, 1 and so on, once for each batch."""
    calls = iter(range(99))

    def scores(image: Tensor) -> Tensor:
        step(next(calls))
        return torch.zeros(len(image), 2, *image.shape[-2:])

    return TestTime(scores)


def nothing(*_: object) -> None:
    pass


def test_reads_one_ahead(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the network computes, the next photograph is read, and no further one."""
    begun = [threading.Event() for _ in jobs]
    reads: list[Path] = []
    real: Any = predictor.read_image

    def read_image(path: Path, *given: object, **options: object) -> object:
        begun[len(reads)].set()
        reads.append(path)
        return real(path, *given, **options)

    def step(number: int) -> None:
        if number + 1 < len(jobs):
            assert begun[number + 1].wait(PATIENCE)
        assert len(reads) <= number + 2

    monkeypatch.setattr(predictor, "read_image", read_image)
    assert predict_files(jobs, network(step), nothing) == {}
    assert reads == list(jobs)


def test_writes_one_behind(jobs: Jobs) -> None:
    """While the network computes, the batch before is written, and no earlier one."""
    computing = [threading.Event() for _ in range(len(jobs) + 1)]
    computing[-1].set()  # nothing is computed beside the last one
    written: list[Path] = []

    def step(number: int) -> None:
        assert len(written) >= number - 1  # all but those of the batch before
        computing[number].set()

    def write(image: Tensor, mask: Tensor, target: Path) -> None:
        assert computing[int(target.name) + 1].wait(PATIENCE)
        time.sleep(0.02)  # a slow disk
        written.append(target)

    assert predict_files(jobs, network(step), write) == {}
    assert written == list(jobs.values())


def test_each_error_stays_with_its_photograph(jobs: Jobs) -> None:
    first, second, third, fourth, fifth = jobs
    second.write_text("no image", encoding="utf-8")
    written = []

    def step(number: int) -> None:
        if number == 1:  # the third photograph, because the second one is not read
            raise RuntimeError("out of memory")

    def write(image: Tensor, mask: Tensor, target: Path) -> None:
        if target == jobs[first]:
            raise WriteError("a long message") from OSError("the disk is full")
        if target == jobs[fourth]:
            raise PermissionError("not allowed")
        written.append(target)

    failed = predict_files(jobs, network(step), write)
    assert list(failed) == [first, second, third, fourth]
    assert failed.pop(second).startswith("cannot read this image: cannot identify")
    assert list(failed.values()) == ["the disk is full", OUT_OF_MEMORY, "not allowed"]
    assert written == [jobs[fifth]]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a mistake")])
def test_the_end_waits_for_what_has_begun_only(
    error: BaseException, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two photographs are to be written, and the writing of one has begun, when the error comes."""
    writing, ending = threading.Event(), threading.Event()
    written = []

    class Pool(ThreadPoolExecutor):
        """The first to be shut down is the writer. It has no more to do before `ending` is set."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ending.set()
            super().shutdown(wait)

    def step(number: int) -> None:
        if number == 1:
            assert writing.wait(PATIENCE)
            raise error

    def write(image: Tensor, mask: Tensor, target: Path) -> None:
        writing.set()
        with atomic_write(target) as part:
            assert ending.wait(PATIENCE)
            part.write_bytes(b"complete")
        written.append(target)

    monkeypatch.setattr(predictor, "ThreadPoolExecutor", Pool)
    with pytest.raises(type(error)):
        predict_files(jobs, network(step), write, batch_size=2)
    assert written == list(jobs.values())[:1]
    assert list(written[0].parent.iterdir()) == written


def test_an_unexpected_error_ends_the_program(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: object, **options: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predict_files(jobs, network(nothing), mistake)
    monkeypatch.setattr(predictor, "read_image", mistake)
    with pytest.raises(ZeroDivisionError):
        predict_files(jobs, network(nothing), nothing)
