"""Killed, stopped and resumed: the same weights and the same metrics.csv as if nothing had been."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fcn.csv_logger import read_metrics

PROJECT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "data=shapes",
    "data.dataset.size=48",
    "data.dataset.train_length=10",  # epochs end within the run
    "data.dataset.val_length=4",
    "data.scale=[0.7,1.4]",
    "data.crop_size=32",
    "data.jitter=0.2",
    "model.weights=null",
    "model.backbone=vgg11",
    "model.head_width=8",
    "model.head_kernel=3",
    "optimizer=adamw",
    "scheduler=poly",
    "logger=none",
    "trainer.precision=32-true",
    "trainer.max_steps=12",
    "trainer.val_check_interval=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoint_every_n_steps=3",
    "callbacks.panel_images=1",
    "callbacks.average_decay=0.9",
]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "train.py"), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def send_after(process: subprocess.Popen[str], csv: Path, step: int, number: int) -> str:
    """Send a signal once metrics.csv has `step`; the output of the process until it ended."""
    while process.poll() is None:
        if csv.exists() and any(int(row["step"]) >= step for row in read_metrics(csv)):
            process.send_signal(number)
            break
        time.sleep(0.002)
    return process.communicate()[0]


def result(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    rows = read_metrics(run / "metrics.csv")
    for row in rows:
        del row["train/images_per_second"]  # the one column that time decides
    return checkpoint["state_dict"], rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, *SETTINGS, "data.num_workers=0", "hydra.run.dir=run")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return folder / "run"


def assert_same(run: Path, undisturbed: Path) -> None:
    weights, rows = result(run)
    expected_weights, expected_rows = result(undisturbed)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert torch.equal(weights[name], value), name
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 13)]
    assert rows == expected_rows


@pytest.mark.slow
def test_asked_to_stop(tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, *SETTINGS, "data.num_workers=1", "hydra.run.dir=run")
    # Validation follows step 4: the signal arrives before it, in it, or just after it.
    output = send_after(process, run / "metrics.csv", 4, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "go on with: python train.py resume=run" in output
    at = re.search(r"stopped by SIGTERM at step (\d+)", output)
    assert at, output
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == int(at[1])

    again = start(tmp_path, "resume=run", "data.num_workers=0")
    output = send_after(again, run / "metrics.csv", 10, signal.SIGINT)
    assert again.returncode == 128 + signal.SIGINT, output
    resumed = start(tmp_path, "resume=run")
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert_same(run, undisturbed)


def test_resume_without_a_run(tmp_path: Path) -> None:
    process = start(tmp_path, "resume=runs/none")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert output.strip() == "error: resume=runs/none: no run folder (it has no config.yaml)"
    assert list(tmp_path.iterdir()) == []
