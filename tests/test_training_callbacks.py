"""Statistics of the loss, checkpoints, signals: first by hand, then in runs of a few steps."""

import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FINISHED, train_tiny
from forks import at_call
from pytorch_lightning.strategies import SingleDeviceStrategy

import fcn.module
from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.datamodule import SegmentationDataModule
from fcn.errors import Stopped, TrainingError
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import read_summary, resumed_config
from fcn.training.interruption import SIGNALS, Interruption
from fcn.training.loss_statistics import LossStatistics
from train import train


class Recorder:
    """Stands in for trainer, module and logger of `LossStatistics`."""

    def __init__(self, every: int = 1, accumulate: int = 1, **options: Any) -> None:
        self.statistics, self.logged = LossStatistics(**options), dict[int, dict[str, float]]()
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            fit_loop=SimpleNamespace(total_batch_idx=-1),
            log_every_n_steps=every,
            accumulate_grad_batches=accumulate,
            world_size=1,
            precision="32-true",
            default_root_dir="run",
            strategy=SimpleNamespace(reduce=lambda numbers, reduce_op: numbers),
            loggers=[SimpleNamespace(log_metrics=lambda m, step: self.logged.update({step: m}))],
        )
        self.statistics.setup(self.trainer)
        self.statistics.on_train_start()

    def feed(self, *losses: float, gradient: float = 1.0) -> None:
        """Losses of batches, as Lightning gives them: divided by the accumulated batches."""
        accumulate = self.trainer.accumulate_grad_batches
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), gradient)
        group = {"params": [parameter], "lr": 0.2, "lr_multiplier": 2.0}
        optimizer: Any = SimpleNamespace(param_groups=[group])
        for loss in losses:
            self.trainer.fit_loop.total_batch_idx += 1
            if (self.trainer.fit_loop.total_batch_idx + 1) % accumulate == 0:
                self.statistics.on_before_optimizer_step(self.trainer, None, optimizer)
                self.trainer.global_step += 1
            outputs = {"loss": torch.tensor(loss) / accumulate}
            batch = {"image": torch.zeros(3, 1)}
            self.statistics.on_train_batch_end(self.trainer, None, outputs, batch)

    def rows(self, first: int = 1) -> dict[int, dict[str, float]]:
        """What was logged from a step on, without the one number that depends on time."""
        speed = "train/images_per_second"
        rows = {step: dict(row) for step, row in self.logged.items() if step >= first}
        assert all(row.pop(speed) > 0 for row in rows.values())
        return rows


def test_smoothed_loss_by_hand() -> None:
    recorder = Recorder(half_life=1, window=2)
    recorder.feed(4, 2, 1)
    rows = recorder.rows()
    column = {name: [row[name] for row in rows.values()] for name in rows[1]}
    assert column["train/loss"] == [4, 2, 1]
    # weights of 1/2, 1/4, 1/8, ... from the newest back, divided by their sum
    expected = [4, (2 / 2 + 4 / 4) / (3 / 4), (1 / 2 + 2 / 4 + 4 / 8) / (7 / 8)]
    assert column["train/loss_smooth"] == pytest.approx(expected)
    assert recorder.statistics.smooth == column["train/loss_smooth"][-1]
    assert column["train/loss_mean"] == [4, 3, 1.5]
    assert column["train/loss_std"] == [0, 1, 0.5]
    assert column["train/grad_norm"] == [2, 2, 2]
    assert column["train/lr"] == [0.1, 0.1, 0.1]


def test_accumulated_batches_count_as_one_step() -> None:
    recorder = Recorder(accumulate=3)
    recorder.feed(1, 2, 6, 5, 5)
    assert list(recorder.logged) == [1]
    recorder.feed(2)
    assert [row["train/loss"] for row in recorder.rows().values()] == pytest.approx([3, 4])


def test_read_at_times_but_every_step_has_its_row() -> None:
    """Also in a run that goes on from the checkpoint of step 4, which no reading was due at."""
    losses = [5, 1, 4, 2, 8, 3, 7]
    each, third, again = (Recorder(every, half_life=2, window=3) for every in (1, 3, 3))
    each.feed(*losses)
    third.feed(*losses[:2])
    assert third.logged == {}
    third.feed(*losses[2:4])
    assert list(third.logged) == [1, 2, 3]
    again.trainer.global_step = 4
    again.statistics.load_state_dict(third.statistics.state_dict())
    for recorder in (third, again):
        recorder.feed(*losses[4:])
        assert max(recorder.logged) == 6
        recorder.statistics.on_train_end()
    assert third.rows() == each.rows()
    assert again.rows() == each.rows(5)


def test_steps_before_a_validation_have_their_own_speed() -> None:
    """They were 0 images/s where no checkpoint reads them first, and summary.json divided by 0."""
    recorder = Recorder(every=100)
    recorder.feed(3, 2)
    recorder.statistics.on_validation_start()
    recorder.statistics.on_validation_end()
    recorder.statistics.on_train_end()
    assert [*recorder.rows()] == [1, 2]  # with a speed above 0


@pytest.mark.parametrize(("loss", "gradient"), [(float("inf"), 1.0), (1.0, float("nan"))])
def test_divergence_is_an_error(loss: float, gradient: float) -> None:
    recorder = Recorder()
    recorder.feed(1, 1)
    with pytest.raises(TrainingError, match=r"step 3: loss .*none was made.*optimizer\.lr"):
        recorder.feed(loss, gradient=gradient)


@pytest.mark.slow
def test_run_that_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint is made of it, although its losses are read seldom."""
    run, step = tmp_path / "run", SegmentationModule.training_step

    def diverging(self: SegmentationModule, *args: Any) -> torch.Tensor:
        return step(self, *args) * (float("nan") if self.trainer.global_step == 2 else 1)

    monkeypatch.setattr(SegmentationModule, "training_step", diverging)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingError, match=r"^step 3: loss nan") as error:
        train_tiny(run, "trainer.log_every_n_steps=10", "callbacks.last_checkpoint.every_n_steps=1")
    assert str(last_checkpoint(run)) in str(error.value)
    checkpoint = torch.load(last_checkpoint(run), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())
    assert not (run / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_averaged_weights_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is what is validated and kept in best.ckpt; training goes on from the weights."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # training or not
    forward = FCN.forward

    def noted(self: FCN, image: torch.Tensor) -> torch.Tensor:
        seen[self.training].append(self.score.weight.detach().clone())
        return forward(self, image)

    monkeypatch.setattr(FCN, "forward", noted)
    run, ema = tmp_path / "run", ("callbacks=ema", "callbacks.ema.decay=0.3")
    train_tiny(run, *ema, "trainer.val_check_interval=4")
    checkpoint = torch.load(best_checkpoint(run), weights_only=True)
    _, average, *others = [*seen[True], checkpoint["current_model_state"]["network.score.weight"]]
    assert len(others) == 3
    for number, current in enumerate(others, start=1):
        kept = min(0.3, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * current
    torch.testing.assert_close(seen[False][-1], average)
    torch.testing.assert_close(checkpoint["state_dict"]["network.score.weight"], average)
    assert not torch.equal(average, others[-1])


@pytest.mark.slow
def test_best_checkpoint_of_a_moved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mious, real = iter([0.2, 0.6, 0.4, 0.5]), fcn.module.segmentation_scores  # of each validation
    monkeypatch.setattr(
        fcn.module, "segmentation_scores", lambda c: real(c) | {"miou": next(mious)}
    )
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    names = ("best/val/miou", "best/step", "val/miou", "steps")
    summary = train_tiny(run, "trainer.max_steps=3", "trainer.val_check_interval=1")
    assert [summary[name] for name in names] == [0.6, 2, 0.4, 3]
    shutil.move(run, moved)
    summary = train(resumed_config(moved, ["trainer.max_steps=4"]), moved)
    assert [summary[name] for name in names] == [0.6, 2, 0.5, 4]
    for path, step in ((best_checkpoint(moved), 2), (last_checkpoint(moved), 4)):
        assert torch.load(path, weights_only=True)["global_step"] == step
    assert len([*(moved / "checkpoints").iterdir()]) == 2


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_while_a_run_lasts(number: signal.Signals) -> None:
    before, interruption = signal.getsignal(number), Interruption()
    trainer: Any = SimpleNamespace(received_sigterm=False)
    with interruption.signals_kept():
        interruption.on_train_start(trainer)
        signal.raise_signal(number)  # os.kill would end the process, on Windows
    assert interruption.received == number
    assert signal.getsignal(number) == before


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="this system has no SIGCHLD")
def test_torchs_handler_is_called_when_a_fit_has_started_twice() -> None:
    """The callback's own handler must not take the place of the one that it calls."""
    called: list[int] = []
    trainer: Any = SimpleNamespace(received_sigterm=False)
    before, interruption = signal.getsignal(signal.SIGCHLD), Interruption()
    signal.signal(signal.SIGCHLD, lambda number, frame: called.append(number))
    try:
        with interruption.signals_kept():
            interruption.on_train_start(trainer)
            interruption.on_train_start(trainer)
            signal.raise_signal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert called == [signal.SIGCHLD]
    assert interruption.error is None


@pytest.mark.slow
def test_stopped_in_the_last_validation(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, which Lightning would leave ignored. The run that goes on validates alone.

    It does so when Lightning has moved the network from the GPU to the CPU.
    """
    run, start = tmp_path / "run", SegmentationModule.on_validation_epoch_start
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self: SegmentationModule) -> None:
        start(self)
        if self.trainer.global_step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "on_validation_epoch_start", interrupted)
        with pytest.raises(Stopped) as stopped:
            train_tiny(run, *FINISHED)
    assert stopped.value.exit_code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == handler
    assert read_column(read_metrics(run / "metrics.csv"), "val/miou")[0] == [2]

    calls: list[str] = []

    def note(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), method(*args))[1])

    note(SingleDeviceStrategy, "teardown")
    note(SingleDeviceStrategy, "model_to_device")
    note(SegmentationModule, "on_validation_epoch_start")
    summary = train(resumed_config(run, []), run)
    assert summary["status"] == "finished"
    assert calls[-3:] == ["teardown", "model_to_device", "on_validation_epoch_start"]
    assert signal.getsignal(signal.SIGINT) == handler
    rows, expected = (read_metrics(folder / "metrics.csv") for folder in (run, finished_run))
    for row in (*rows, *expected):
        del row["train/images_per_second"]
    assert rows == expected
    assert (run / "panels" / "step_0000004.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there, Lightning leaves SIGTERM alone")
@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [(SegmentationModule, "validation_step", 0), (SegmentationDataModule, "train_dataloader", 1)],
)
def test_sigterm_before_the_first_step(
    owner: type, name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning gets it, in its sanity check or while loaders start, and exits with code 0."""
    run, options = tmp_path / "run", ["callbacks.loss_statistics=null", "data.eval_batch_size=1"]
    at_call(owner, name, partial(signal.raise_signal, signal.SIGTERM), patch=monkeypatch)
    with pytest.raises(Stopped, match=f"^SIGTERM at step {step}$"):
        train_tiny(run, *options, "+trainer.num_sanity_val_steps=2")
    summary = read_summary(run)  # its steps are counted without rows of metrics.csv, too
    assert (summary["status"], summary["steps"]) == ("stopped", step)
    assert last_checkpoint(run).is_file() == (step > 0)


@pytest.mark.slow
def test_time_is_up_between_accumulated_batches(tmp_path: Path) -> None:
    run, end = tmp_path / "run", ["trainer.max_steps=-1", "trainer.max_time={milliseconds: 1}"]
    end += ["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=100"]
    handlers = [signal.getsignal(number) for number in SIGNALS]
    summary = train_tiny(run, *end)
    assert (summary["status"], summary["steps"]) == ("finished", 1)
    assert summary["val/miou"] > 0
    assert torch.load(last_checkpoint(run), weights_only=True)["global_step"] == 1
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == ["1"]
    # One of Lightning's would swallow a SIGTERM that comes between two jobs of a sweep.
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
