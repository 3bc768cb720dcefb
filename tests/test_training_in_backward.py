"""SGD inside the backward pass: the same weights as SGD's, without keeping gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_tiny
from torch import nn
from torch.optim import SGD

from fcn.errors import ConfigError
from fcn.runs.metrics import read_column, read_metrics
from fcn.training.in_backward import SGDInBackward

IN_BACKWARD = "optimizer=sgd_in_backward"
SETTINGS = ("optimizer.momentum=0.9", "optimizer.lr=1e-2", "trainer.log_every_n_steps=1")


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal_runs(plain: Path, other: Path) -> None:
    """Both have the same weights and momentum, bit by bit, and the same metrics."""
    one, two = last(plain), last(other)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert torch.equal(state["momentum_buffer"], second["state"][key]["momentum_buffer"])
    rows = [read_metrics(run / "metrics.csv") for run in (plain, other)]
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/miou"):
        (steps, values), (other_steps, others) = (read_column(table, name) for table in rows)
        assert list(steps) == list(other_steps)
        assert list(values) == pytest.approx(list(others), rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_run_is_that_of_sgd(tmp_path: Path, fused: str) -> None:
    more = ("scheduler=poly", "optimizer.nesterov=true", f"optimizer.fused={fused}")
    train_tiny(tmp_path / "plain", *SETTINGS, *more)
    train_tiny(tmp_path / "other", IN_BACKWARD, *SETTINGS, *more)
    assert_equal_runs(tmp_path / "plain", tmp_path / "other")


def two_layers() -> tuple[nn.Sequential, SGDInBackward]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": list(network[0].parameters()), "lr": 0.5}]
    groups += [{"params": list(network[1].parameters())}]
    return network, SGDInBackward(groups, lr=0.1, momentum=0.9)


def test_only_one_gradient_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer = two_layers()
    apply, there = SGDInBackward._apply, []

    def count(self: SGDInBackward, group: Any, parameter: Any) -> None:
        there.append(sum(p.grad is not None for p in network.parameters()))
        apply(self, group, parameter)

    monkeypatch.setattr(SGDInBackward, "_apply", count)
    optimizer.step(lambda: network(torch.ones(1, 3)).sum().backward())
    assert there == [1, 1, 1, 1]
    assert all(p.grad is None for p in network.parameters())


def test_each_group_has_its_own_rate() -> None:
    network, optimizer = two_layers()
    before = [p.detach().clone() for p in network.parameters()]
    network(torch.ones(1, 3)).sum().backward()
    gradients = [p.grad for p in network.parameters()]
    network.zero_grad()
    optimizer.step(lambda: network(torch.ones(1, 3)).sum().backward())
    for old, new, gradient, rate in zip(
        before, network.parameters(), gradients, (0.5, 0.5, 0.1, 0.1), strict=True
    ):
        assert gradient is not None
        torch.testing.assert_close(new.detach(), old - rate * gradient)
    expected = nn.utils.get_total_norm([g for g in gradients if g is not None])
    torch.testing.assert_close(optimizer.gradient_norm(), expected)


def test_without_a_closure_it_is_sgd() -> None:
    """Also after a step: no hook is left that would apply the gradient of another backward pass."""
    networks, optimizers = zip(*(two_layers() for _ in range(2)), strict=True)
    plain = SGD(optimizers[0].param_groups, lr=0.1, momentum=0.9)
    for network, optimizer in zip(networks, (plain, optimizers[1]), strict=True):
        for _ in range(2):
            network(torch.ones(1, 3)).sum().backward()
            assert all(p.grad is not None for p in network.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, two)


def test_an_error_of_the_closure_leaves_no_hooks() -> None:
    network, optimizer = two_layers()

    def closure() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    network(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("trainer.gradient_clip_val=5", "trainer.gradient_clip_val=5: must be null with"),
        (
            "trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches=2: must be 1 with",
        ),
        ("trainer.devices=2", "trainer.devices=2: must be 1 with"),
        # DDP of one process, too, reads the gradients itself.
        ("trainer=ddp trainer.devices=1", "trainer.strategy='?DDPStrategy'?: must be auto with"),
    ],
)
def test_what_needs_all_gradients_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train_tiny(tmp_path / "run", IN_BACKWARD, *setting.split())
    assert "optimizer=sgd keeps them all" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_scaled_losses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl

    # Lightning has 16-mixed on GPUs alone.
    monkeypatch.setattr(pl.Trainer, "precision", property(lambda self: "16-mixed"))
    message = "trainer.precision='?16-mixed'?: must be 32-true or bf16-mixed with optimizer=sgd_in"
    with pytest.raises(ConfigError, match=message):
        train_tiny(tmp_path / "run", IN_BACKWARD, "trainer.precision=16-mixed")


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    from fcn.runs.resume import resumed_config
    from train import train

    train_tiny(tmp_path / "whole", IN_BACKWARD, *SETTINGS)
    train_tiny(tmp_path / "parts", IN_BACKWARD, *SETTINGS, "trainer.max_steps=2")
    parts = tmp_path / "parts"
    train(resumed_config(parts, ["trainer.max_steps=4"]), parts)
    assert_equal_runs(tmp_path / "whole", parts)
