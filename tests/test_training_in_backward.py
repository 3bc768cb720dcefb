"""SGD inside the backward pass: the same weights as SGD's, without keeping gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_tiny
from torch import nn
from torch.optim import SGD

from fcn.checkpoint import last_checkpoint
from fcn.errors import ConfigError
from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.resume import resumed_config
from fcn.training.in_backward import SGDInBackward, check_trainer
from train import train


@pytest.mark.slow
def test_a_run_is_that_of_sgd(tmp_path: Path) -> None:
    """The weights and momentum bit by bit, and the metrics; also when it was resumed."""
    more = ("optimizer.momentum=0.9", "optimizer.lr=1e-2", "trainer.log_every_n_steps=1")
    more += ("scheduler.warmup_steps=3", "optimizer.nesterov=true", "optimizer.fused=true")
    plain, other = tmp_path / "plain", tmp_path / "other"
    train_tiny(plain, *more)
    train_tiny(other, "optimizer=sgd_in_backward", *more, "trainer.max_steps=2")
    train(resumed_config(other, ["trainer.max_steps=4"]), other)
    one, two = (torch.load(last_checkpoint(run), weights_only=True) for run in (plain, other))
    exactly: dict[str, Any] = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(two["state_dict"], one["state_dict"], **exactly)
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert "momentum_buffer" in first["state"][0]
    torch.testing.assert_close(second["state"], first["state"], **exactly)
    rows = [read_metrics(run / "metrics.csv") for run in (plain, other)]
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/miou"):
        (steps, values), (other_steps, others) = (read_column(table, name) for table in rows)
        assert steps == other_steps
        assert values == pytest.approx(others, rel=1e-6), name


def two_layers() -> tuple[nn.Sequential, SGDInBackward]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": list(network[0].parameters()), "lr": 0.5}]
    groups += [{"params": list(network[1].parameters())}]
    return network, SGDInBackward(groups, lr=0.1, momentum=0.9)


def backward(network: nn.Module) -> list[torch.Tensor]:
    """The gradients of a backward pass that still exist after it."""
    network(torch.ones(1, 3)).sum().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def test_one_gradient_at_a_time_with_the_rate_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer = two_layers()
    apply, there = SGDInBackward._apply, []

    def count(self: SGDInBackward, group: Any, parameter: Any) -> None:
        there.append(sum(p.grad is not None for p in network.parameters()))
        apply(self, group, parameter)

    monkeypatch.setattr(SGDInBackward, "_apply", count)
    before = [p.detach().clone() for p in network.parameters()]
    gradients = [gradient.clone() for gradient in backward(network)]
    network.zero_grad()
    optimizer.step(lambda: backward(network))
    assert there == [1, 1, 1, 1]
    assert all(p.grad is None for p in network.parameters())
    for old, new, gradient, rate in zip(
        before, network.parameters(), gradients, (0.5, 0.5, 0.1, 0.1), strict=True
    ):
        torch.testing.assert_close(new.detach(), old - rate * gradient)
    torch.testing.assert_close(optimizer.gradient_norm(), nn.utils.get_total_norm(gradients))


def test_without_a_closure_it_is_sgd() -> None:
    """Also after a step, or an error: no hook is left that would apply other gradients."""
    networks, optimizers = zip(*(two_layers() for _ in range(2)), strict=True)
    plain = SGD(optimizers[0].param_groups, lr=0.1, momentum=0.9)
    with pytest.raises(ZeroDivisionError):
        optimizers[1].step(lambda: 1 // 0)
    for network, optimizer in zip(networks, (plain, optimizers[1]), strict=True):
        for _ in range(2):
            assert len(backward(network)) == 4
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("gradient_clip_val", 5, "null"),
        ("accumulate_grad_batches", 2, "1"),
        ("devices", 2, "1"),
        ("precision", "16-mixed", "32-true or bf16-mixed"),
    ],
)
def test_what_needs_all_gradients_is_refused(setting: str, value: Any, wanted: str) -> None:
    fine = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "precision": "32-true"}
    check_trainer(fine)
    message = rf"^trainer\.{setting}={value}: must be {wanted} with .*optimizer=sgd keeps them all"
    with pytest.raises(ConfigError, match=message):
        check_trainer(fine | {setting: value})


def test_ddp_of_one_process_reads_the_gradients_itself(tmp_path: Path) -> None:
    ddp = ("optimizer=sgd_in_backward", "trainer=ddp", "trainer.devices=1")
    with pytest.raises(ConfigError, match=r"trainer\.strategy=DDPStrategy: must be auto with"):
        train_tiny(tmp_path / "run", *ddp)
    assert not (tmp_path / "run").exists()
