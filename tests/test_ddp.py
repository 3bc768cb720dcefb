"""Two processes with half the batch each are one process: the same weights, the same scores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

from fcn.datamodule import SegmentationDataModule
from fcn.datasets.shapes import Shapes
from fcn.errors import DataError
from fcn.runs.metrics import read_metrics

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[1]
SETTINGS = [
    *TINY,
    "model.dropout=0",  # each process drops other units than one process would
    "data.dataset.val_length=5",  # odd: Lightning's own sampler would count an image twice
    "optimizer.momentum=0.9",
    "trainer.max_epochs=2",  # of 10 images, 4 a step: 5 steps
    "trainer.val_check_interval=5",
    "trainer.gradient_clip_val=1",
    "scheduler=poly",
]
PAIR = ("trainer=ddp", "trainer.devices=2")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *SETTINGS, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def the_run(folder: Path) -> Path:
    """The only run folder that was made."""
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of one process at batch 4, one of two at batch 2, and what the two printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    processes = start(one, "data.batch_size=4"), start(two, "data.batch_size=2", *PAIR)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    return the_run(one), the_run(two), outputs[1]


def test_two_processes_learn_what_one_does(runs: tuple[Path, Path, str]) -> None:
    one, two, _ = runs
    expected = weights(one)
    start = weights_before_training()
    for name, value in weights(two).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        if name in start and "stages" in name:
            assert not torch.equal(value, start[name]), f"{name} has not learned"


def weights_before_training() -> dict[str, torch.Tensor]:
    from conftest import compose_config

    from train import build_module, open_data

    cfg = compose_config("train", *SETTINGS)
    torch.manual_seed(cfg.seed)
    return build_module(cfg, open_data(cfg)).state_dict()


def test_losses_and_gradients_are_of_all_processes(runs: tuple[Path, Path, str]) -> None:
    one, two, _ = (read_metrics(run / "metrics.csv") for run in (*runs[:2], runs[0]))
    assert [row["step"] for row in two] == ["1", "2", "3", "4", "5"]
    for row, expected in zip(two, one, strict=True):
        for name in ("train/loss", "train/loss_smooth", "train/grad_norm", "train/lr"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4), name


def test_scores_of_an_odd_split_are_those_of_one_process(runs: tuple[Path, Path, str]) -> None:
    """The same checkpoint, scored by two processes in training and by one in evaluate.py."""
    _, two, _ = runs
    command = [sys.executable, "evaluate.py", f"ckpt={two}/checkpoints/last.ckpt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True)
    metrics = json.loads((two / "evaluation" / "metrics.json").read_text())
    last = read_metrics(two / "metrics.csv")[-1]
    assert metrics["images"] == 5
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou", "loss"):
        assert float(last[f"val/{name}"]) == metrics[name]


def test_one_process_writes(runs: tuple[Path, Path, str]) -> None:
    _, two, output = runs
    assert output.count("run folder:") == 1
    assert output.count("val loss") == 1
    assert "10 images to train on, 5 to validate on; 2 x cpu" in output
    assert sorted(p.name for p in two.parents[2].iterdir()) == ["runs"]


def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    number = signal.SIGTERM
    process = start(tmp_path, *PAIR, "trainer.max_epochs=100000", "trainer.log_every_n_steps=1")
    csv: list[Path] = []
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        csv = list(tmp_path.glob("runs/tiny/*/metrics.csv"))
        if csv and len(read_metrics(csv[0])) >= 2:
            process.send_signal(number)
            break
        time.sleep(0.01)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"stopped by {signal.Signals(number).name}" in output
    run = the_run(tmp_path)
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert read_metrics(run / "metrics.csv")[-1]["step"] == str(step)


def test_a_sweep_over_several_devices_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, *PAIR, "-m")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "trainer.devices=2 in a sweep" in output
    assert "Traceback" not in output


class Process:
    """Of several, as the data module sees its trainer."""

    def __init__(self, rank: int, world: int) -> None:
        self.global_rank, self.world_size = rank, world


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_image_is_validated_once(world: int) -> None:
    data = SegmentationDataModule(dataset=Shapes, num_workers=0)
    split = Shapes(split="val", size=48, val_length=7)
    seen: list[str] = []
    for rank in range(world):
        data.trainer = Process(rank, world)  # type: ignore[assignment]
        seen += [name for batch in data.eval_dataloader(split) for name in batch["id"]]
    assert seen == split.ids


def test_fewer_images_than_processes() -> None:
    data = SegmentationDataModule(dataset=Shapes, num_workers=0)
    data.trainer = Process(0, 8)  # type: ignore[assignment]
    with pytest.raises(DataError, match="8 processes cannot share 7 images"):
        data.eval_dataloader(Shapes(split="val", size=48, val_length=7))
