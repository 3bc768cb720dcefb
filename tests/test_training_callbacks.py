"""Statistics of the loss, checkpoints, pictures: first by hand, then in runs of a few steps."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import FINISHED, train_tiny
from omegaconf import DictConfig
from PIL import Image

from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.errors import Stopped, TrainingError
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.interruption import SIGNALS
from fcn.training.loss_statistics import LossStatistics
from train import train


class Recorder:
    """Stands in for trainer, module and logger of `LossStatistics`."""

    def __init__(self, statistics: LossStatistics, every: int = 1, accumulate: int = 1) -> None:
        self.statistics, self.logged = statistics, dict[int, dict[str, float]]()
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            fit_loop=SimpleNamespace(total_batch_idx=0),
            log_every_n_steps=every,
            accumulate_grad_batches=accumulate,
            world_size=1,
            precision="32-true",
            default_root_dir="run",
            strategy=SimpleNamespace(reduce=lambda numbers, reduce_op: numbers),
            loggers=[SimpleNamespace(log_metrics=lambda m, step: self.logged.update({step: m}))],
        )
        self.module: Any = SimpleNamespace()
        self.batches = 0
        statistics.setup(self.trainer, self.module, "fit")
        statistics.on_train_start(self.trainer, self.module)

    def feed(self, *losses: float, gradient: float = 1.0) -> None:
        """Losses of batches, as Lightning gives them: divided by the accumulated batches."""
        accumulate = self.trainer.accumulate_grad_batches
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), gradient)
        group = {"params": [parameter], "lr": 0.2, "lr_multiplier": 2.0}
        optimizer: Any = SimpleNamespace(param_groups=[group])
        for loss in losses:
            if (self.batches + 1) % accumulate == 0:
                self.statistics.on_before_optimizer_step(self.trainer, self.module, optimizer)
                self.trainer.global_step += 1
            outputs = {"loss": torch.tensor(loss) / accumulate}
            batch = {"image": torch.zeros(3, 1)}
            self.trainer.fit_loop.total_batch_idx = self.batches
            self.statistics.on_train_batch_end(self.trainer, self.module, outputs, batch)
            self.batches += 1


def test_smoothed_loss_by_hand() -> None:
    recorder = Recorder(LossStatistics(half_life=1, window=2))
    recorder.feed(4, 2, 1)
    column = {name: [row[name] for row in recorder.logged.values()] for name in recorder.logged[1]}
    assert column["train/loss"] == [4, 2, 1]
    # weights of 1/2, 1/4, 1/8, ... from the newest back, divided by their sum
    expected = [4, (2 / 2 + 4 / 4) / (3 / 4), (1 / 2 + 2 / 4 + 4 / 8) / (7 / 8)]
    assert column["train/loss_smooth"] == pytest.approx(expected)
    assert recorder.statistics.smooth == column["train/loss_smooth"][-1]
    assert column["train/loss_mean"] == [4, 3, 1.5]
    assert column["train/loss_std"] == [0, 1, 0.5]
    assert column["train/grad_norm"] == [2, 2, 2]
    assert column["train/lr"] == [0.1, 0.1, 0.1]
    assert all(speed > 0 for speed in column["train/images_per_second"])


def test_constant_loss_is_its_own_mean() -> None:
    recorder = Recorder(LossStatistics(half_life=50))
    recorder.feed(*[3.0] * 10)
    assert [row["train/loss_smooth"] for row in recorder.logged.values()] == pytest.approx([3] * 10)


def test_accumulated_batches_count_as_one_step() -> None:
    recorder = Recorder(LossStatistics(), accumulate=3)
    recorder.feed(1, 2, 6, 5, 5)
    assert list(recorder.logged) == [1]
    assert recorder.logged[1]["train/loss"] == pytest.approx(3)
    recorder.feed(2)
    assert recorder.logged[2]["train/loss"] == pytest.approx(4)


@pytest.mark.slow
def test_averaged_weights_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "network.score.weight", dict[str, list[torch.Tensor]](current=[], validated=[])

    def note(kind: str, of: str, module: type) -> None:
        own = getattr(module, of)

        def noted(self: Any, *args: Any) -> Any:
            network = self if isinstance(self, SegmentationModule) else args[1]
            seen[kind].append(network.state_dict()[name].clone())
            return own(self, *args)

        monkeypatch.setattr(module, of, noted)

    note("current", "on_train_batch_end", LossStatistics)
    note("validated", "validation_step", SegmentationModule)
    train_tiny(
        tmp_path / "run",
        "callbacks=ema",
        "callbacks.ema.decay=0.3",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "trainer.accumulate_grad_batches=1",
    )
    average = seen["current"][0]
    for number, current in enumerate(seen["current"][1:], start=1):
        kept = min(0.3, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * current
    assert len(seen["current"]) == 4
    checkpoint = torch.load(best_checkpoint(tmp_path / "run"), weights_only=True)
    torch.testing.assert_close(seen["validated"][-1], average)
    torch.testing.assert_close(checkpoint["state_dict"][name], average)
    assert not torch.equal(average, seen["current"][-1])


def test_read_at_times_but_every_step_has_its_row() -> None:
    each, third = (Recorder(LossStatistics(half_life=2), every=every) for every in (1, 3))
    losses = [5, 1, 4, 2, 8, 3, 7]
    each.feed(*losses)
    third.feed(*losses[:2])
    assert third.logged == {}
    third.feed(*losses[2:])
    assert list(third.logged) == [1, 2, 3, 4, 5, 6]
    third.statistics.on_train_end(third.trainer, third.module)
    assert list(third.logged) == [1, 2, 3, 4, 5, 6, 7]
    for step, row in third.logged.items():
        for name in row:
            if name != "train/images_per_second":
                assert row[name] == each.logged[step][name]


def test_steps_before_a_validation_have_their_own_speed() -> None:
    """They were 0 images/s where no checkpoint reads them first, and summary.json divided by 0."""
    recorder = Recorder(LossStatistics(), every=100)
    recorder.feed(3, 2)
    recorder.statistics.on_validation_start(recorder.trainer, recorder.module)
    recorder.statistics.on_validation_end(recorder.trainer, recorder.module)
    recorder.statistics.on_train_end(recorder.trainer, recorder.module)
    assert [row["train/images_per_second"] > 0 for row in recorder.logged.values()] == [True] * 2


@pytest.mark.parametrize("every", [1, 3])
def test_statistics_go_on_after_a_checkpoint(every: int) -> None:
    losses = [5, 1, 4, 2, 8, 3]
    whole = Recorder(LossStatistics(half_life=2, window=3), every=every)
    whole.feed(*losses)
    first = Recorder(LossStatistics(half_life=2, window=3), every=every)
    first.feed(*losses[:4])  # with every=3, step 4 has not been logged
    second = Recorder(LossStatistics(half_life=2, window=3), every=every)
    second.trainer.global_step = 4
    second.statistics.load_state_dict(first.statistics.state_dict())
    second.feed(*losses[4:])
    names = [name for name in whole.logged[6] if name != "train/images_per_second"]
    for name in names:
        assert second.logged[6][name] == whole.logged[6][name], name


@pytest.mark.parametrize(
    ("loss", "gradient"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))]
)
def test_divergence_is_an_error(loss: float, gradient: float) -> None:
    recorder = Recorder(LossStatistics())
    recorder.feed(1, 1)
    with pytest.raises(TrainingError, match=r"step 3: loss .*none was made.*optimizer\.lr"):
        recorder.feed(loss, gradient=gradient)


def test_no_checkpoint_is_made_of_a_diverged_network() -> None:
    recorder = Recorder(LossStatistics(), every=100)
    recorder.feed(1, 1, float("nan"), float("nan"))
    with pytest.raises(TrainingError, match="step 3: "):
        recorder.statistics.state_dict()


@pytest.mark.slow
def test_run_that_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = tmp_path / "run", 0
    loss = SegmentationModule.loss

    def diverging(self: SegmentationModule, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        return loss(self, *args, **kwargs) * (float("nan") if calls == 3 else 1)

    monkeypatch.setattr(SegmentationModule, "loss", diverging)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingError) as error:
        train_tiny(run, "trainer.log_every_n_steps=10", "callbacks.last_checkpoint.every_n_steps=1")
    message = str(error.value)
    assert message.startswith("step 3: loss nan")
    assert str(last_checkpoint(run)) in message
    checkpoint = torch.load(last_checkpoint(run), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())
    assert not (run / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_accumulated_steps_of_a_run(finished_run: Path) -> None:
    assert "trainer.accumulate_grad_batches=2" in FINISHED
    rows = read_metrics(finished_run / "metrics.csv")
    steps, speeds = read_column(rows, "train/images_per_second")
    assert steps == [1, 2, 3, 4]
    assert min(speeds) > 0
    assert read_column(rows, "train/loss")[1][0] == pytest.approx(np.log(8), rel=1e-5)  # zero score
    assert read_column(rows, "val/miou")[0] == [2, 4]


@pytest.mark.slow
def test_pictures(finished_run: Path) -> None:
    panels = sorted((finished_run / "panels").glob("step_*"))
    assert [path.name for path in panels] == ["step_0000002.png", "step_0000004.png"]
    for path in panels:
        with Image.open(path) as picture:
            width, height = picture.size
            assert width > 3 * 200
            assert height > 2 * 150  # two rows of square images
            colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
            assert colours is not None
            assert len(colours) > 100
    with Image.open(finished_run / "curves.png") as picture:
        assert picture.size[0] > 600
        assert picture.size[1] > 400
    hidden = [path for path in finished_run.rglob(".*") if path.is_file()]
    assert hidden == []  # no temporary file is left


def scripted_scores(monkeypatch: pytest.MonkeyPatch, mious: list[float]) -> None:
    """Each validation gets the next mean IoU of the list."""
    remaining = iter(mious)
    import fcn.module

    real = fcn.module.segmentation_scores
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(remaining)}
    )


@pytest.mark.slow
def test_best_checkpoint_also_of_a_moved_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    scripted_scores(monkeypatch, [0.2, 0.6, 0.4, 0.5])
    summary = train_tiny(run, "trainer.max_steps=3", "trainer.val_check_interval=1")
    assert summary["best/val/miou"] == 0.6
    assert summary["best/step"] == 2
    assert summary["val/miou"] == 0.4
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
    ]
    for _ in range(2):
        assert torch.load(best_checkpoint(run), weights_only=True)["global_step"] == 2
        assert torch.load(last_checkpoint(run), weights_only=True)["global_step"] in (3, 4)
        if run.parent == tmp_path:
            shutil.move(run, tmp_path / "elsewhere" / "moved")
            run = tmp_path / "elsewhere" / "moved"
            summary = train(resumed_config(run, ["trainer.max_steps=4"]), run)
    assert summary["steps"] == 4
    assert summary["best/step"] == 2
    assert summary["val/miou"] == 0.5


def interrupt_when(
    monkeypatch: pytest.MonkeyPatch, condition: Callable[[pl.Trainer], bool], number: int
) -> None:
    """The process gets a signal in the validation where `condition` holds."""
    start = SegmentationModule.on_validation_epoch_start

    def interrupted(self: SegmentationModule) -> None:
        start(self)
        if condition(self.trainer):
            signal.raise_signal(number)  # os.kill would end the process, on Windows

    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_start", interrupted)


@pytest.mark.parametrize(
    "number", [SIGNALS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS[1:])]
)
def test_stopped_in_the_last_validation(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt_when(patch, lambda trainer: trainer.global_step == 4, number)
        with pytest.raises(Stopped) as stopped:
            train_tiny(run, *FINISHED)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == handler
    assert read_column(read_metrics(run / "metrics.csv"), "val/miou")[0] == [2]

    cfg: DictConfig = resumed_config(run, [])
    summary = train(cfg, run)
    assert summary["status"] == "finished"
    assert signal.getsignal(number) == handler
    rows, expected = (read_metrics(folder / "metrics.csv") for folder in (run, finished_run))
    for row in (*rows, *expected):
        del row["train/images_per_second"]
    assert rows == expected
    assert (run / "panels" / "step_0000004.png").exists()


@pytest.mark.slow
def test_time_is_up_between_accumulated_batches(tmp_path: Path) -> None:
    summary = train_tiny(
        tmp_path / "run",
        "trainer.max_steps=-1",
        "trainer.max_time={milliseconds: 1}",
        "trainer.accumulate_grad_batches=3",
        "trainer.val_check_interval=100",
    )
    assert summary["status"] == "finished"
    assert summary["steps"] == 1
    assert summary["val/miou"] > 0
    assert torch.load(last_checkpoint(tmp_path / "run"), weights_only=True)["global_step"] == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == ["1"]
