"""The precision that a device is fast at, weights that are cast for good, and malloc's settings."""

import ctypes
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fcn.checkpoint import best_checkpoint
from fcn.errors import ConfigError
from fcn.evaluation.candidate import open_candidate
from fcn.inference.predictor import load_predictor
from fcn.network import FCN
from fcn.precision import (
    PRECISIONS,
    best_layout,
    best_precision,
    cast_weights,
    keep_freed_memory,
    main_device,
    precisions_of,
)
from fcn.runs.process import quiet_lightning

Card = tuple[str, tuple[int, int]]
T4, RTX_4090 = ("Tesla T4", (7, 5)), ("NVIDIA GeForce RTX 4090", (8, 9))


def machine(
    monkeypatch: pytest.MonkeyPatch, card: Card | None = None, bf16: bool = False, mps: bool = False
) -> None:
    """Lets torch report a card, or none; `bf16` is of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    if card is not None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card[1])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    able = {"avx512_bf16": bf16, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)


def test_a_first_step_left_out_by_the_scaler_is_no_mistake_of_the_user() -> None:
    """In 16-mixed, GradScaler may leave out the optimizer's first step, and the rate goes on."""
    parameter = nn.Parameter(torch.zeros(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_lightning()
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        torch.optim.lr_scheduler.ConstantLR(optimizer).step()
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


def test_best_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: dict[str, dict[str, Any]] = {
        "16-mixed": {"gpu": {"card": T4}},
        "bf16-mixed": {"auto": {"card": RTX_4090}, "cpu": {"card": T4, "bf16": True}},
        "32-true": {"cpu": {"card": RTX_4090}, "auto": {}, "mps": {"mps": True}},
    }
    for precision, cases in expected.items():
        for accelerator, devices in cases.items():
            machine(monkeypatch, **devices)
            assert best_precision(accelerator) == precision, (accelerator, devices)


@pytest.mark.parametrize(
    ("card", "precision", "layout"),
    [
        (("NVIDIA GeForce GTX 1070", (6, 1)), "32-true", False),
        (("NVIDIA GeForce GTX 1660 SUPER", (7, 5)), "32-true", False),
        (("NVIDIA GeForce GTX 1650 with Max-Q Design", (7, 5)), "32-true", False),
        (("NVIDIA T600 Laptop GPU", (7, 5)), "32-true", False),
        (("Tesla V100-SXM2-16GB", (7, 0)), "16-mixed", True),
        (("NVIDIA GeForce RTX 2060", (7, 5)), "16-mixed", True),
        (T4, "16-mixed", True),
        (("NVIDIA A100-SXM4-40GB", (8, 0)), "bf16-mixed", True),
        (RTX_4090, "bf16-mixed", True),
        (("NVIDIA GB10", (12, 1)), "bf16-mixed", True),
    ],
)
def test_generations_of_cards(
    card: Card, precision: str, layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, card=card)
    device = main_device("auto", [1])
    assert device == torch.device("cuda", 1)
    assert main_device("auto", OmegaConf.create([1])) == device  # as conf/ has it
    assert best_precision(device) == precision
    assert best_layout(device, precision) == layout
    # Asked for all the same: nothing but tensor cores is fast on channels last.
    assert best_layout(device, "16-mixed") == layout
    assert best_layout(device, "32-true") == (card[1] >= (8, 0))
    assert not best_layout(device, "64-true")


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


def test_apples_gpus_have_no_float64(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained in float64 is predicted in float32 there; who asks for 64-true is told."""
    assert "64-true" not in precisions_of(torch.device("mps"))
    assert precisions_of(torch.device("cpu")) == PRECISIONS
    message = r"^precision=64-true: must be 32-true on the device mps"
    monkeypatch.setattr("fcn.inference.predictor.find_device", lambda name: torch.device("mps"))
    with pytest.raises(ConfigError, match=message):
        load_predictor(best_checkpoint(finished_run), "mps", "64-true")
    strategy = "pytorch_lightning.strategies.SingleDeviceStrategy.root_device"
    monkeypatch.setattr(strategy, property(lambda self: torch.device("mps")))
    with pytest.raises(ConfigError, match=message):
        open_candidate(best_checkpoint(finished_run), accelerator="cpu", precision="64-true")


def test_weights_of_64_bits_are_not_rounded(finished_run: Path, tmp_path: Path) -> None:
    """So evaluate.py gives the scores of a validation in 64-true, to the last digit."""
    checkpoint = torch.load(best_checkpoint(finished_run), weights_only=True)
    state = {name: value.double() / 3 for name, value in checkpoint["state_dict"].items()}
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint | {"state_dict": state, "precision": "64-true"}, path)
    module = open_candidate(path, accelerator="cpu").module
    for name, value in module.state_dict().items():
        assert value.equal(state[name]), name
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.inference_mode():
        assert load_predictor(path, "cpu").scores(image).equal(module.network.eval()(image))


def test_weights_that_are_cast_give_the_scores_of_autocast() -> None:
    torch.manual_seed(0)
    network = FCN(3, backbone="vgg_tiny", head_width=8, head_kernel=3).eval()
    nn.init.normal_(network.score.weight)
    image = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network(image)
        cast_weights(network, "32-true")
        assert network.conv6.weight.dtype == torch.float32
        cast_weights(network, "bf16-mixed")
        assert torch.equal(network(image), expected)
    assert expected.std() > 1e-3
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.mean.dtype == torch.float32  # images are normalised as before


def test_freed_memory_is_kept_where_malloc_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda name, value: calls.append((name, value)))
    monkeypatch.setattr(sys, "platform", "linux")
    for library in (object(), glibc):  # musl, for one, has no mallopt
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        keep_freed_memory()
    assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(ctypes, "CDLL")
    keep_freed_memory()
