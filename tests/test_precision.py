"""The precision that a device is fast at, weights that are cast for good, and malloc's settings."""

import ctypes
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fcn.network import FCN
from fcn.precision import AUTOCAST, PRECISIONS, best_precision, cast_weights, keep_freed_memory


def machine(
    monkeypatch: pytest.MonkeyPatch, *, cuda: bool, bf16: bool = False, mps: bool = False
) -> None:
    """Lets torch report these devices; `bf16` is of the GPU, and of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    able = {"avx512_bf16": bf16, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("auto", {"cuda": True, "bf16": True}, "bf16-mixed"),
        ("gpu", {"cuda": True, "bf16": False}, "16-mixed"),
        ("cpu", {"cuda": True, "bf16": False}, "32-true"),
        ("cpu", {"cuda": True, "bf16": True}, "bf16-mixed"),
        ("auto", {"cuda": False, "bf16": True}, "bf16-mixed"),
        ("auto", {"cuda": False, "bf16": False}, "32-true"),
        ("auto", {"cuda": False, "mps": True}, "32-true"),
        ("mps", {"cuda": False, "mps": True}, "32-true"),
    ],
)
def test_best_precision(
    accelerator: str, devices: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **devices)
    assert best_precision(accelerator) == expected
    assert expected in PRECISIONS


def test_a_torch_that_does_not_know_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert best_precision("cpu") == "32-true"


def test_weights_that_are_cast_give_the_scores_of_autocast() -> None:
    torch.manual_seed(0)
    network = FCN(3, backbone="vgg_tiny", head_width=8, head_kernel=3).eval()
    nn.init.normal_(network.score.weight)
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", AUTOCAST["bf16-mixed"]):
        expected = network(image)
        cast_weights(network, "bf16-mixed")
        assert torch.equal(network(image), expected)
    assert expected.std() > 1e-3
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.mean.dtype == torch.float32  # images are normalised as before


def test_weights_stay_without_autocast() -> None:
    layer = nn.Conv2d(1, 1, 1)
    for precision in ("32-true", "64-true"):
        cast_weights(layer, precision)
        assert layer.weight.dtype == torch.float32


def test_freed_memory_is_kept_where_malloc_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Glibc:
        def mallopt(self, name: int, value: int) -> None:
            calls.append((name, value))

    libraries: dict[str, Any] = {"glibc": Glibc(), "musl": object()}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libraries["musl"])
    keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libraries["glibc"])
    keep_freed_memory()
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(ctypes, "CDLL")
    keep_freed_memory()
