"""Learning rates, step by step, against their formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from fcn.errors import ConfigError
from fcn.schedules import constant, cosine, poly


def rates(make: Callable[..., LambdaLR], steps: int, **options: object) -> list[list[float]]:
    """The rates that each of `steps` optimizer steps uses, in two groups of 1.0 and 10.0."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups)
    schedule = make(optimizer, total_steps=steps, **options)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return used


def test_constant() -> None:
    assert rates(constant, 5) == [[1.0, 10.0]] * 5


def test_poly() -> None:
    wanted = [(1 - step / 8) ** 0.9 for step in range(8)]
    assert [low for low, _ in rates(poly, 8)] == pytest.approx(wanted)
    assert [low for low, _ in rates(poly, 4, power=2.0)] == [1.0, 0.5625, 0.25, 0.0625]


def test_cosine() -> None:
    wanted = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert [low for low, _ in rates(cosine, 8)] == pytest.approx(wanted)
    assert rates(cosine, 8)[4][0] == pytest.approx(0.5)
    assert rates(cosine, 8, final=0.2)[4][0] == pytest.approx(0.6)


@pytest.mark.parametrize("make", [constant, poly, cosine])
def test_warmup_is_linear_and_never_zero(make: Callable[..., LambdaLR]) -> None:
    used = [low for low, _ in rates(make, 20, warmup_steps=4)]
    assert used[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    plain = [low for low, _ in rates(make, 16)]
    assert used[4:] == pytest.approx(plain)  # the decay takes what is left of the steps


@pytest.mark.parametrize("make", [constant, poly, cosine])
def test_groups_keep_their_ratio(make: Callable[..., LambdaLR]) -> None:
    for low, high in rates(make, 10, warmup_steps=2):
        assert high == pytest.approx(10 * low)
        assert low > 0  # every step learns, the last one too


@pytest.mark.parametrize(("make", "last"), [(constant, 1.0), (poly, 0.0), (cosine, 0.3)])
def test_beyond_the_end(make: Callable[..., LambdaLR], last: float) -> None:
    """A run may go on for longer than planned; a negative base would give complex numbers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"final": 0.3} if make is cosine else {}
    schedule = make(optimizer, total_steps=3, **options)
    for _ in range(6):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last)


def test_run_that_ends_by_time() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = constant(optimizer, total_steps=math.inf, warmup_steps=1)
    used = []
    for _ in range(3):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == [0.5, 1.0, 1.0]


def test_warmup_longer_than_the_run() -> None:
    assert [low for low, _ in rates(poly, 3, warmup_steps=9)] == pytest.approx([0.1, 0.2, 0.3])


def test_resumed_schedule_goes_on() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = poly(optimizer, total_steps=10, warmup_steps=2)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = poly(again, total_steps=10, warmup_steps=2)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        for o, s in ((optimizer, schedule), (again, resumed)):
            o.step()
            s.step()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("make", [poly, cosine])
@pytest.mark.parametrize("total_steps", [16, math.inf])
def test_time_lowers_the_rate_too(make: Callable[..., LambdaLR], total_steps: float) -> None:
    """A run whose time is up after 8 steps, of 16 planned or of any number."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    time = iter(step / 8 for step in range(9))
    schedule = make(optimizer, total_steps=total_steps, time_used=lambda: next(time))
    used = []
    for _ in range(8):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([low for low, _ in rates(make, 8)])


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (poly, {"power": 0}),
        (poly, {"power": "fast"}),
        (cosine, {"final": 1.5}),
        (cosine, {"final": -0.1}),
        (constant, {"warmup_steps": -5}),
        (poly, {"warmup_steps": 0.5}),
        (cosine, {"warmup_steps": None}),
    ],
)
def test_bad_arguments(make: Callable[..., LambdaLR], wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name}=.*: must be "):
        rates(make, 3, **wrong)
