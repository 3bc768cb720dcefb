"""Rows of `python -m benchmarks.gpu` that measure memory, speed, and the share of convolutions."""

import importlib.util
import re
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import memory_plan
import peers
import torch
from gpu_rows import NARROW, Bench, Skip, need
from timing import timed
from torch.autograd import DeviceType

from fcn.memory import GB, RESERVE, compose, plan
from fcn.precision import best_precision, cast_weights


def memory(bench: Bench, *settings: str) -> str:
    """The peak of three steps against the plan of fcn.memory."""
    if bench.stand_in:
        raise Skip("benchmarks/memory_plan.py measures the memory of a CPU")
    given = [*settings, f"trainer.precision={best_precision(bench.device)}"]
    planned = plan(compose(given)).total
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        memory_plan.take_steps(given, bench.device)
        peak = torch.cuda.max_memory_allocated() - before
        reserved = torch.cuda.max_memory_reserved() - before
    else:  # Apple's GPUs: what is reserved stays so, and no peak of what is allocated is kept
        before = torch.mps.driver_allocated_memory()
        memory_plan.take_steps(given, bench.device)
        peak, reserved = None, torch.mps.driver_allocated_memory() - before
    text = f"plan {planned / GB:.2f} GB"
    if peak is not None:
        text += f", allocated {peak / GB:.2f} GB ({peak / planned - 1:+.0%})"
    text += f", reserved by torch {reserved / GB:.2f} GB"
    if peak is not None:
        fits = reserved <= planned + RESERVE
        need(fits, f"{text}; more than the plan and its {RESERVE / GB:.1f} GB for CUDA")
        need(peak > 0.8 * planned, f"{text}; the plan asks for too much")
    return text


def speed(bench: Bench, name: str) -> str:
    """Images per second of a contestant of peers.py, in training and in inference."""
    package = "torchfcn" if name in peers.TORCHFCN else "segmentation_models_pytorch"
    if name not in peers.OURS and importlib.util.find_spec(package) is None:
        file = (
            "requirements/torchfcn.txt" if package == "torchfcn" else "benchmarks/requirements.txt"
        )
        raise Skip(f"{package} is not installed (pip install --no-deps -r {file})")
    contestant = peers.make(name, bench.device)
    training = _images_per_second(bench, contestant)
    if name in peers.OURS:
        cast_weights(contestant.network, peers.OURS[name][1])  # as evaluate.py and predict.py do
    inference = _images_per_second(bench, contestant, train=False)
    bench.rates |= {name: training, f"{name}, inference": inference}
    peer = bench.rates.get(peers.PEER)
    if peer is None or name == peers.PEER:
        return f"{training:.3g} images/s in training, {inference:.3g} in inference"
    times = training / peer, inference / bench.rates[f"{peers.PEER}, inference"]
    parts = (f"{training:.3g} images/s in training", f"{inference:.3g} in inference")
    return ", ".join(f"{p} ({t:.2f} × torchfcn's)" for p, t in zip(parts, times, strict=True))


def lever(bench: Bench, *settings: str) -> str:
    """Images per second in training with a setting, and the ratio to the row without."""
    if "trainer.compile=true" in settings and bench.device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise Skip("triton is not installed, which torch.compile needs on a GPU")
        if torch.cuda.get_device_capability() < (7, 0):
            raise Skip("triton needs a card of compute capability 7.0 or newer")
    torch.backends.cudnn.benchmark = "trainer.benchmark=true" in settings
    contestant = peers.make(ours(bench.device), bench.device, None, *_narrow(bench), *settings)
    rate = _images_per_second(bench, contestant)
    if not settings:
        bench.rates["plain"] = rate
    text = f"{rate:.3g} images/s in training"
    plain = bench.rates.get("plain")
    return text if plain is None or not settings else f"{text}, {rate / plain:.2f} × the plain one"


def convolutions(bench: Bench) -> str:
    """The share of the device's time in a training step that its convolutions take."""
    if bench.device == "mps":
        raise Skip("torch.profiler does not time what runs on an Apple GPU")
    from torch.profiler import ProfilerActivity, profile

    contestant = peers.make(ours(bench.device), bench.device, None, *_narrow(bench))
    step = _step(bench, contestant)
    for _ in range(3):
        step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device == "cuda")
    with profile(activities=kinds) as record:
        for _ in range(3):
            step()
        if bench.device == "cuda":
            torch.cuda.synchronize()
    conv, everything = time_of_convolutions(record.key_averages(), bench.device)
    need(everything > 0, "the profiler has recorded no time on the device")
    return f"{conv / everything:.1%} of {everything / 3e3:.3g} ms that the device works in a step"


def time_of_convolutions(events: Iterable[Any], device: str) -> tuple[float, float]:
    """Microseconds that convolutions and that all operations take, of a profile's averages.

    On a GPU, every kernel is counted once, for the operation that has launched it. The rows of the
    kernels themselves, which are of another `device_type`, would count it again.
    """
    clock = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = re.compile(r"aten::\w*(convolution|conv2d|conv_transpose)")
    conv = sum(getattr(row, clock) for row in rows if kernels.match(row.key))
    return conv, sum(getattr(row, clock) for row in rows)


def ours(device: str) -> str:
    """Our contestant in the precision that `auto` means on this device."""
    flag = best_precision(device)
    return next(name for name, given in peers.OURS.items() if given == ("vgg19", flag))


def _narrow(bench: Bench) -> tuple[str, ...]:
    return NARROW if bench.stand_in else ()


def _step(bench: Bench, contestant: peers.Contestant, *, train: bool = True) -> Callable[[], Any]:
    """A training step, or a forward pass, on one image of 375×500, or 64×64 for the stand-in."""
    contestant.network.train(train)
    size = (1, 64, 64) if bench.stand_in else (1, 375, 500)
    inputs = contestant.prepare(*peers.random_batch(*size))
    return lambda: contestant.step(*inputs) if train else contestant.logits(inputs[0])


def _images_per_second(
    bench: Bench, contestant: peers.Contestant, *, train: bool = True, rounds: int = 5
) -> float:
    """The median over blocks of steps, in which Python does not wait for the device."""
    run = _step(bench, contestant, train=train)
    for _ in range(3):  # memory is allocated, cuDNN chooses, torch.compile compiles
        run()
    calls = max(1, min(50, int(0.3 / timed(run, bench.device))))

    def block() -> None:
        for _ in range(calls):
            run()

    return calls / median(timed(block, bench.device) for _ in range(rounds))
