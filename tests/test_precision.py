"""The precision that a device is fast at, weights that are cast for good, and malloc's settings."""

import ctypes
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fcn.network import FCN
from fcn.precision import (
    AUTOCAST,
    PRECISIONS,
    best_layout,
    best_precision,
    cast_weights,
    keep_freed_memory,
    main_device,
)

CARDS: dict[str, tuple[int, int]] = {  # as torch.cuda reports them
    "NVIDIA GeForce GTX 1070": (6, 1),
    "Tesla P100-PCIE-16GB": (6, 0),
    "Tesla V100-SXM2-16GB": (7, 0),
    "NVIDIA GeForce GTX 1660 SUPER": (7, 5),
    "NVIDIA GeForce GTX 1650 with Max-Q Design": (7, 5),
    "NVIDIA T600 Laptop GPU": (7, 5),
    "NVIDIA GeForce RTX 2060": (7, 5),
    "Tesla T4": (7, 5),
    "NVIDIA A100-SXM4-40GB": (8, 0),
    "NVIDIA GeForce RTX 3060": (8, 6),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA GB10": (12, 1),
}


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    card: str | None = None,
    bf16: bool = False,
    mps: bool = False,
) -> None:
    """Lets torch report one of CARDS, or none; `bf16` is of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    if card is not None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[card])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    able = {"avx512_bf16": bf16, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)


@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("auto", {"card": "NVIDIA GeForce RTX 4090"}, "bf16-mixed"),
        ("gpu", {"card": "Tesla T4"}, "16-mixed"),
        ("cpu", {"card": "NVIDIA GeForce RTX 4090"}, "32-true"),
        ("cpu", {"card": "Tesla T4", "bf16": True}, "bf16-mixed"),
        ("auto", {"bf16": True}, "bf16-mixed"),
        ("auto", {}, "32-true"),
        ("auto", {"mps": True}, "32-true"),
        ("mps", {"mps": True}, "32-true"),
    ],
)
def test_best_precision(
    accelerator: str, devices: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **devices)
    assert best_precision(accelerator) == expected
    assert expected in PRECISIONS


@pytest.mark.parametrize(
    ("cards", "precision", "layout"),
    [
        (("GTX 1070", "P100", "GTX 1660", "GTX 1650", "T600"), "32-true", False),
        (("V100", "RTX 2060", "Tesla T4"), "16-mixed", True),
        (("A100", "RTX 3060", "RTX 4090", "GB10"), "bf16-mixed", True),
    ],
)
def test_generations_of_cards(
    cards: tuple[str, ...], precision: str, layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in cards:
        (card,) = (name for name in CARDS if part in name)
        machine(monkeypatch, card=card)
        device = main_device("auto", [1])
        assert device == torch.device("cuda", 1)
        assert best_precision(device) == precision, card
        assert best_layout(device, precision) == layout, card
        # Asked for all the same: nothing but tensor cores is fast on channels last.
        assert best_layout(device, "16-mixed") == layout, card
        assert best_layout(device, "32-true") == (CARDS[card] >= (8, 0)), card
        assert not best_layout(device, "64-true"), card


def test_layout_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mps=True)
    assert not best_layout(main_device(), "32-true")  # Apple's
    cpu = torch.device("cpu")
    for capability, learns in (("AVX2", False), ("AVX512", True), ("DEFAULT", True)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda name=capability: name)
        assert best_layout(cpu, "32-true") == learns, capability
        assert best_layout(cpu, "64-true") == learns, capability
        assert best_layout(cpu, "bf16-mixed"), capability
        assert best_layout(cpu, "32-true", backward=False), capability


def test_a_torch_that_does_not_know_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
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
