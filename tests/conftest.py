"""Fixtures: a tiny VOC tree in the true on-disk layout, the real pairs where they lie near, and
training runs of a second or two inside the test's own process.

torch and what imports it are imported inside functions. With `-n 2`, pytest's main process reads
this file before it starts its workers, and would import torch (ten seconds) only to run no test.
"""

import copy
import gc
import os
import shutil
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

# One thread each for the tests, the processes that they fork and those that they start: pytest's
# own workers use the cores, and a sum of floats depends on how many threads share it. torch reads
# this when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # one of them would import trio

# OmegaConf's loader is a subclass of this. Tests compose conf/ hundreds of times, and libyaml reads
# it several times as fast as Python does.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# A command in the background of a script, as in CI, begins with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parents[1]
TINY = (
    "name=tiny",
    "data=shapes",
    "data.dataset.size=48",
    "data.dataset.train_length=10",
    "data.dataset.val_length=3",
    "data.crop_size=32",
    "data.num_workers=0",
    "model=fcn32s",
    "model.weights=null",
    "model.backbone=vgg_tiny",
    "model.head_width=8",
    "model.head_kernel=3",
    "optimizer.lr=1e-3",
    "logger=none",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "callbacks.panels.images=2",
)

# id: (width, height, label, grey); the first six are train, the rest val
TINY_VOC = {
    "2007_000032": (96, 64, 1, False),
    "2007_000039": (64, 96, 7, False),
    "2007_000063": (80, 80, 12, False),
    "2008_000068": (72, 96, 15, True),
    "2009_000121": (96, 72, 8, False),
    "2010_000170": (50, 37, 20, False),
    "2007_000033": (96, 64, 1, False),
    "2007_000042": (64, 80, 7, False),
    "2007_000061": (90, 70, 12, True),
    "2011_000129": (33, 65, 15, False),
}


def write_tiny_voc(root: Path) -> Path:
    """Writes 6 train and 4 val pairs: a disc with a void border on a textured ground, in a colour
    of its class so that a few steps of training can learn it."""
    from fcn.datasets.voc2012 import voc_palette

    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    palette = voc_palette()
    for seed, (name, (width, height, label, grey)) in enumerate(TINY_VOC.items()):
        rng = np.random.default_rng(seed)
        ys, xs = np.mgrid[:height, :width]
        distance = np.hypot(ys - height * 0.45, xs - width * 0.55) - min(height, width) * 0.3
        image = 120 + 30 * np.sin(xs / rng.uniform(2, 6))[..., None] + rng.normal(0, 8, 3)
        image = np.where(distance[..., None] < 0, np.array(palette[label]) * 0.6 + 60, image)
        image = (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
        photo = Image.fromarray(image).convert("L" if grey else "RGB")
        photo.save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
        mask = np.where(distance < -1.5, label, np.where(distance < 1.5, 255, 0)).astype(np.uint8)
        write_mask(folder / "SegmentationClass" / f"{name}.png", mask)
    ids = list(TINY_VOC)
    for split, part in (("train", ids[:6]), ("val", ids[6:]), ("trainval", sorted(ids))):
        text = "".join(f"{name}\n" for name in part)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(text)
    return root


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes (H, W) uint8 labels as VOC does: a palette PNG."""
    from fcn.datasets.voc2012 import voc_palette

    picture = Image.fromarray(mask)
    picture.putpalette([channel for colour in voc_palette() for channel in colour])
    picture.save(path)


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root (one for all tests: do not write there) with 6 train and 4 val pairs."""
    return write_tiny_voc(tmp_path_factory.mktemp("tiny_voc"))


@pytest.fixture
def own_voc(tiny_voc: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_voc` for a test to damage."""
    return Path(shutil.copytree(tiny_voc, tmp_path / "own_voc"))


@pytest.fixture(scope="session")
def real_voc_root() -> Path:
    """The data root with real VOC pairs that lies beside the project on our machines."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / "VOCdevkit" / "VOC2012").is_dir():
        pytest.skip(f"real VOC pairs not found at {root}")
    return root


def compose_config(name: str, *overrides: str) -> DictConfig:
    """conf/<name>.yaml with overrides, as the command line would compose it.

    Hydra takes a fifth of a second, most of it for files that it has read before, and at last it
    puts the values of single settings into the result. So a process composes each choice of groups
    once, and single settings go into a copy.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    single = [o for o in parsed if not (PROJECT / "conf" / o.key_or_group).is_dir()]
    if any(o.is_delete() or o.is_add() or o.is_sweep_override() for o in single):
        return compose_anew(name, *overrides)
    cfg = copy.deepcopy(compose_anew(name, *(o.input_line for o in parsed if o not in single)))
    try:
        for o in single:
            OmegaConf.update(cfg, o.key_or_group, o.value(), force_add=o.is_force_add())
    except OmegaConfBaseException:
        return compose_anew(name, *overrides)  # which raises the error as Hydra words it
    return cfg


@lru_cache
def compose_anew(name: str, *overrides: str) -> DictConfig:
    """What Hydra makes of conf/<name>.yaml and overrides. Do not change it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


def train_tiny(run: Path, *overrides: str, curves: bool = False) -> dict[str, Any]:
    """A few steps of training in `run`; what summary.json holds.

    Args:
        curves: also draw curves.png, which takes longer than all the rest.
    """
    from train import train

    cfg = compose_config(
        "train", *TINY, *overrides, *(() if curves else ("callbacks.curves=null",))
    )
    return train(cfg, run, list(overrides))


def write_onnx(path: Path, metadata: dict[str, str] | None) -> None:
    """An ONNX file that returns its input, with metadata as in a file of export.py.

    Args:
        path: of the file. Without the packages for ONNX, the test is skipped.
        metadata: what differs, as JSON; None: the file has no metadata at all.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from fcn.inference.onnx_session import METADATA

    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[1] image) => (float[1] scores)'
    model = onnx.parser.parse_model(text + " {scores = Identity(image)}")
    if metadata is not None:
        usual = dict.fromkeys(METADATA, "null") | {"class_names": '["a", "b"]', "void": "255"}
        onnx.helper.set_model_props(model, usual | metadata)
    onnx.save(model, path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended (do not write there): 4 steps of 2 batches, fp32."""
    run = tmp_path_factory.mktemp("finished") / "runs" / "tiny"
    train_tiny(run, *FINISHED, curves=True)
    return run


FINISHED = (
    "scheduler=poly",
    "model.head_lr_multiplier=5",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-cpu", action="store_true", help="fail if a test takes too long")


def pytest_configure() -> None:
    """What is imported now stays, so looking for garbage meanwhile takes seconds and finds nothing.

    `pytest_collection_finish` switches it on. forks.py, which imports this file, is not concerned.
    """
    gc.disable()


def pytest_collectstart() -> None:
    """Before the first test file is imported: torchvision knows `vgg_tiny` by its name."""
    import tiny_vgg  # noqa: F401  # registers it


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups when it is called itself
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with work in other processes come first, and `--dist loadgroup` gives one worker all:
    they share a server process (forks.py), which takes ten seconds to start. Then come other
    groups, then slow tests; the fast ones are last, so that the workers end at the same time.
    """
    for item in items:
        if hasattr(getattr(item, "module", None), "fork"):
            item.add_marker(pytest.mark.xdist_group("forks"))

    def rank(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group")
        if group is not None:
            return 0 if group.args == ("forks",) else 1
        return 2 if item.get_closest_marker("slow") else 3

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """From here on, collect garbage, but not among what has been imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Collect no garbage while pytest and Python come to their end: that took three seconds."""
    gc.freeze()


REPORTED, TOO_LONG = 2.0, 5.0  # seconds of CPU time of a test that is not marked as slow
cpu_times: dict[str, float] = {}  # of tests that are to be reported


def cpu_time() -> float:
    """Seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    started = cpu_time()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu", cpu_time() - started))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds = dict(report.user_properties).get("cpu", 0)
    if report.when == "call" and "slow" not in report.keywords and seconds > REPORTED:
        cpu_times[report.nodeid] = float(seconds)


def pytest_sessionfinish(session: pytest.Session) -> None:
    strict = session.config.getoption("--strict-cpu")
    if strict and max(cpu_times.values(), default=0) > TOO_LONG:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if cpu_times:
        terminalreporter.section(f"more than {REPORTED:g} s of CPU time, not marked as slow")
    for name, seconds in sorted(cpu_times.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"{seconds:5.1f} s{' !' * (seconds > TOO_LONG)} {name}")


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """What a training run changes in its process is as it was after each test."""
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")  # not every system has all of them
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    environment = os.environ.copy()
    import torch

    random = torch.get_rng_state()
    yield
    torch.set_rng_state(random)
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
