"""fcn/inference/predictor.py: photographs are read and written while the network computes."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

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
Network = Callable[[int], None]


@pytest.fixture
def jobs(tmp_path: Path) -> dict[Path, Path]:
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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the photographs, as they are read."""
    names: list[str] = []
    real = predictor.read_image

    def read_image(path: Path, *given: object, **options: object) -> object:
        names.append(path.name)
        return real(path, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor, "read_image", read_image)
    return names


def network(step: Network) -> TestTime:
    """Finds class 0 everywhere, and calls `step` with 0, 1 and so on, once for each batch."""
    calls = iter(range(99))

    def scores(image: Tensor) -> Tensor:
        step(next(calls))
        return torch.zeros(len(image), 2, *image.shape[-2:])

    return TestTime(scores)


def nothing(*_: object) -> None:
    pass


def test_reads_the_next_one_beside_the_network_and_no_more(
    jobs: dict[Path, Path], monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    begun = [threading.Event() for _ in jobs]
    counted = predictor.read_image

    def read_image(path: Path, *given: object, **options: object) -> object:
        begun[len(reads)].set()
        return counted(path, *given, **options)  # type: ignore[arg-type]

    def step(number: int) -> None:
        if number + 1 < len(jobs):
            assert begun[number + 1].wait(PATIENCE)
        assert len(reads) <= number + 2

    monkeypatch.setattr(predictor, "read_image", read_image)
    assert predict_files(jobs, network(step), nothing) == {}
    assert reads == [path.name for path in jobs]


def test_writes_beside_the_network_and_one_batch_at_most(jobs: dict[Path, Path]) -> None:
    computing = [threading.Event() for _ in range(len(jobs) + 1)]
    computing[-1].set()  # nothing is computed beside the last one
    written: list[str] = []

    def step(number: int) -> None:
        assert len(written) >= number - 1  # all but those of the batch before
        computing[number].set()

    def write(image: Tensor, mask: Tensor, target: Path) -> None:
        assert computing[int(target.name) + 1].wait(PATIENCE)
        written.append(target.name)

    assert predict_files(jobs, network(step), write) == {}
    assert written == [target.name for target in jobs.values()]


def test_each_error_stays_with_its_photograph(jobs: dict[Path, Path]) -> None:
    first, second, third, fourth, _ = jobs
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
        written.append(target.name)

    failed = predict_files(jobs, network(step), write)
    assert list(failed) == [first, second, third, fourth]
    assert failed[first] == "the disk is full"
    assert failed[second].startswith("cannot read this image: cannot identify")
    assert failed[third] == OUT_OF_MEMORY
    assert failed[fourth] == "not allowed"
    assert written == ["4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a mistake")])
def test_the_end_waits_for_what_has_begun_and_for_no_more(
    error: BaseException, jobs: dict[Path, Path]
) -> None:
    writing, failing = threading.Event(), threading.Event()
    written = []

    def step(number: int) -> None:
        if number == 1:
            assert writing.wait(PATIENCE)
            failing.set()
            raise error

    def write(image: Tensor, mask: Tensor, target: Path) -> None:
        writing.set()
        with atomic_write(target) as part:
            assert failing.wait(PATIENCE)
            part.write_bytes(b"complete")
        written.append(target)

    with pytest.raises(type(error)):
        predict_files(jobs, network(step), write, batch_size=2)
    assert written == [jobs[path] for path in list(jobs)[:1]]
    assert list(written[0].parent.iterdir()) == written


@pytest.mark.parametrize("thread", ["reader", "writer"])
def test_an_unexpected_error_ends_the_program(
    thread: str, jobs: dict[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: object, **options: object) -> None:
        raise ZeroDivisionError

    if thread == "reader":
        monkeypatch.setattr(predictor, "read_image", mistake)
    with pytest.raises(ZeroDivisionError):
        predict_files(jobs, network(nothing), mistake)
