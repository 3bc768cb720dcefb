"""Two processes with half the batch each are one process: the same weights, the same scores."""

import os
import runpy
import signal
import socket
import sys
import time
import warnings
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY, compose_config, train_tiny
from forks import fork, wait
from hydra.types import RunMode
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from evaluate import evaluate
from fcn.checkpoint import last_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, DataError
from fcn.network import FCN
from fcn.runs.metrics import read_metrics
from train import build_data_and_module, train

pytestmark = pytest.mark.slow
SETTINGS = [
    "model.dropout=0",  # each process drops other units than one process would
    # Odd: Lightning's own sampler would count an image twice. One process has a single batch.
    "data.dataset.val_length=3",
    "optimizer.momentum=0.9",
    "optimizer.lr=1e-2",
    "trainer.max_epochs=4",  # of 10 images, 4 a step: 10 steps
    "trainer.val_check_interval=5",
    "model.channels_last=false",  # in training; a validation on a CPU has the other layout
    "trainer.gradient_clip_val=1",
    "scheduler=poly",
]
PAIR = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


def in_process(rank: int, port: int, run: Path, overrides: list[str]) -> None:
    """Train as torchrun would start it: one process of two."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (ranks | sizes | place).items()})
    rank_zero_only.rank = rank  # Lightning reads it when it is imported
    sys.argv = ["train.py", *TINY, *SETTINGS, *overrides, *PAIR, f"hydra.run.dir={run}"]
    runpy.run_path(str(PROJECT / "train.py"), run_name="__main__")


def start(folder: Path, *overrides: str) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = partial(in_process, port=port, run=folder / "run", overrides=list(overrides))
    return [fork(partial(work, rank), folder / f"{rank}.log") for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of one process at batch 4, one of two at batch 2, and what the two printed."""
    folder = tmp_path_factory.mktemp("ddp")
    monitor = "+callbacks.lr_monitor._target_=pytorch_lightning.callbacks.LearningRateMonitor"
    processes = start(folder, "data.batch_size=2", monitor)  # it wants a logger in each process
    train_tiny(folder / "one", *SETTINGS, "data.batch_size=4")
    codes = [wait(process) for process in processes]
    output = "".join((folder / f"{rank}.log").read_text() for rank in (0, 1))
    assert codes == [0, 0], output
    return folder / "one", folder / "run", output


def test_two_processes_learn_what_one_does(runs: tuple[Path, Path, str]) -> None:
    cfg = compose_config("train", *TINY, *SETTINGS)
    torch.manual_seed(cfg.seed)
    before = build_data_and_module(cfg)[1].state_dict()
    expected, found = (
        torch.load(last_checkpoint(run), weights_only=True)["state_dict"] for run in runs[:2]
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        assert "stages" not in name or not torch.equal(value, before[name]), name  # has learned

    one, two = (read_metrics(run / "metrics.csv") for run in runs[:2])
    assert [row["step"] for row in two] == [str(step) for step in range(1, 11)]
    for row, wanted in zip(two, one, strict=True):
        for name in ("train/loss", "train/loss_smooth", "train/grad_norm", "train/lr"):
            assert float(row[name]) == pytest.approx(float(wanted[name]), rel=1e-4), name


def test_scores_of_an_odd_split_are_those_of_one_process(
    runs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """The same checkpoint, scored by two processes in training and by one in evaluate.py."""
    _, two, _ = runs
    output = f"output={tmp_path}"
    metrics = evaluate(compose_config("evaluate", f"ckpt={last_checkpoint(two)}", output))
    last = read_metrics(two / "metrics.csv")[-1]
    assert metrics["images"] == 3
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss"):
        assert float(last[f"val/{name}"]) == metrics[name]


def test_one_process_writes(runs: tuple[Path, Path, str]) -> None:
    _, two, output = runs
    assert output.count("run folder:") == 1
    assert output.count("val loss") == 2
    assert "sync_dist" not in output  # Lightning's advice about scores that are summed already
    assert "10 images to train on, 3 to validate on; 2 x cpu" in output
    assert {path.name for path in two.parent.iterdir()} == {"0.log", "1.log", "one", "run"}


def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    number, run = signal.SIGTERM, tmp_path / "run"
    processes = start(tmp_path, "trainer.max_epochs=100000", "trainer.log_every_n_steps=1")
    try:
        csv, end = run / "metrics.csv", time.monotonic() + 60
        while not csv.exists() or len(read_metrics(csv)) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert processes[0].pid
        os.kill(processes[0].pid, number)
        # Only the first has an exit code: one of another would kill the first before its end.
        assert [wait(process, 60) for process in processes] == [128 + number, 0]
    finally:
        for process in processes:
            process.kill()
    assert f"stopped by {signal.Signals(number).name}" in (tmp_path / "0.log").read_text()
    step = torch.load(last_checkpoint(run), weights_only=True)["global_step"]
    assert read_metrics(csv)[-1]["step"] == str(step)


def test_a_sweep_over_several_devices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_config("train", *TINY, *PAIR)
    monkeypatch.setattr("train.HydraConfig.initialized", lambda: True)
    monkeypatch.setattr("train.HydraConfig.get", lambda: DictConfig({"mode": RunMode.MULTIRUN}))
    with pytest.raises(ConfigError, match=r"^trainer\.devices=2 in a sweep"):
        train(cfg, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def strides_warned(network: FCN, tmp_path: Path) -> bool:
    """Whether DDP warns that gradients are not laid out as their weights, and must be copied."""
    rank_zero = {"rank": 0, "world_size": 1}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", **rank_zero)
    torch.set_warn_always(True)  # not only the first time in this process
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, torch makes the gradients in another way
    try:
        wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
            wrapped(image).square().sum().backward()
    finally:
        torch.set_num_threads(threads)
        torch.set_warn_always(False)
        distributed.destroy_process_group()
    return any("Grad strides do not match" in str(warning.message) for warning in caught)


def test_gradients_have_the_layout_of_their_weights(tmp_path: Path) -> None:
    network = FCN(5, 8, "vgg_tiny", head_width=8, head_kernel=3, channels_last=True)
    assert not strides_warned(network, tmp_path)
    network.zero_grad()
    for skip in network.skips.values():  # as it would be without the care of `set_layout`
        skip.weight.data = torch.empty(skip.weight.shape).copy_(skip.weight.data)
    assert strides_warned(network, tmp_path)


def test_each_image_is_validated_once() -> None:
    data: Any = SegmentationDataModule(dataset=Shapes, num_workers=0)
    split = Shapes(split="val", size=48, val_length=7)
    for world in (1, 2, 7):
        seen: list[str] = []
        for rank in range(world):
            data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
            seen += [name for batch in data.eval_dataloader(split) for name in batch["id"]]
        assert seen == split.ids
    data.trainer = SimpleNamespace(global_rank=0, world_size=8)
    with pytest.raises(DataError, match="8 processes cannot share 7 images"):
        data.eval_dataloader(split)
