"""Cards that the installed torch has code for, and what is said about the others."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import compose_config, train_tiny

from benchmarks.cards import CARDS, choice
from evaluate import evaluate
from fcn.cards import check_card, has_code_for, warn_about_unused_card
from fcn.checkpoint import last_checkpoint
from fcn.errors import DeviceError
from fcn.evaluation.candidate import open_candidate
from fcn.inference.predictor import load_predictor
from fcn.network import FCN

# torch.cuda.get_arch_list() of torch 2.14: PyPI's wheel on Windows, on Linux, and PyTorch's cu126.
PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
LINUX = [*PYPI, "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("capability", "pypi", "linux", "cu126"),
    [
        ((5, 2), False, False, True),  # Maxwell
        ((6, 1), False, False, True),  # GTX 10xx
        ((7, 0), False, False, True),  # V100
        ((7, 5), True, True, True),
        ((8, 9), True, True, True),  # by sm_86
        ((10, 3), True, True, False),
        ((11, 0), False, False, False),  # none of this first number, and compute_120 is newer
        ((12, 1), True, True, False),
        ((13, 0), False, True, False),  # by compute_120
    ],
)
def test_code_for(capability: tuple[int, int], pypi: bool, linux: bool, cu126: bool) -> None:
    assert has_code_for(capability, PYPI) == pypi
    assert has_code_for(capability, LINUX) == linux
    assert has_code_for(capability, CU126) == cu126


@pytest.mark.parametrize(
    ("arch", "fits", "others"),
    [
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_120f", [(12, 0), (12, 1)], [(13, 0)]),
        ("compute_80", [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
    ],
)
def test_kinds_of_code(
    arch: str, fits: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    assert all(has_code_for(capability, [arch]) for capability in fits)
    assert not any(has_code_for(capability, [arch]) for capability in others)


def has_card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Lets torch's wheel of PyPI find this card."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: PYPI)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def test_card_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    has_card(monkeypatch, "NVIDIA GeForce GTX 1070", (6, 1))
    check_card(torch.device("cpu"))
    with pytest.raises(DeviceError) as error:
        check_card(torch.device("cuda", 0))
    message = str(error.value)
    assert "no code for this card, a NVIDIA GeForce GTX 1070 (compute capability 6.1)" in message
    assert "sm_75 sm_80" in message
    assert "torchvision --index-url https://download.pytorch.org/whl/cu126" in message
    has_card(monkeypatch, "NVIDIA Thor", (11, 0))
    with pytest.raises(DeviceError, match="pip install --upgrade --force-reinstall torch torchv"):
        check_card(torch.device("cuda", 0))
    has_card(monkeypatch, "Tesla K80", (3, 7))
    with pytest.raises(DeviceError, match=r"No torch of today has code for cards before Maxwell"):
        check_card(torch.device("cuda", 0))
    has_card(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9))
    check_card(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's ROCm
    has_no_list = ["gfx1100"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: has_no_list)
    check_card(torch.device("cuda", 0))


def test_refused_before_anything_is_computed(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By train.py, evaluate.py and predict.py, which all ask about the device that they found."""
    asked: list[torch.device] = []

    def refuse(device: torch.device) -> None:
        asked.append(device)
        raise DeviceError("no code")

    for module in ("training.trainer", "evaluation.candidate", "inference.predictor"):
        monkeypatch.setattr(f"fcn.{module}.check_card", refuse)
    ckpt, out = last_checkpoint(finished_run), tmp_path / "out"
    with pytest.raises(DeviceError):
        train_tiny(out)
    with pytest.raises(DeviceError):
        evaluate(compose_config("evaluate", f"ckpt={ckpt}", "accelerator=cpu", f"output={out}"))
    with pytest.raises(DeviceError):
        load_predictor(ckpt, "cpu")
    assert asked == [torch.device("cpu")] * 3
    assert not out.exists()


@pytest.mark.parametrize(
    ("smi", "card", "cuda", "expected"),
    [
        ("/usr/bin/nvidia-smi", False, None, "is a build without CUDA"),
        ("/usr/bin/nvidia-smi", False, "13.2", "the driver may be too old for the CUDA 13.2"),
        ("/usr/bin/nvidia-smi", True, "13.2", ""),
        (None, False, None, ""),
    ],
)
def test_warning_about_an_unused_card(
    smi: str | None,
    card: bool,
    cuda: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: smi)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    warn_about_unused_card()
    assert expected in caplog.text
    assert bool(caplog.text) == bool(expected)


@pytest.mark.parametrize("layout", [True, False])
def test_checkpoint_is_laid_out_for_its_device(
    layout: bool, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was best where the network was trained."""
    networks: list[FCN] = []
    set_layout = FCN.set_layout

    def noted(network: FCN, channels_last: bool) -> None:
        set_layout(network, channels_last)
        networks.append(network)

    monkeypatch.setattr(FCN, "set_layout", noted)
    for module in ("evaluation.candidate", "inference.predictor"):
        monkeypatch.setattr(f"fcn.{module}.best_layout", lambda *_, **__: layout)
    load_predictor(last_checkpoint(finished_run), "cpu")
    open_candidate(last_checkpoint(finished_run), accelerator="cpu")
    assert len(networks) == 4  # each is built in the layout of its training, and then changed
    for network in networks[1::2]:
        weight = network.stages[2].get_parameter("0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == layout


def test_table_of_cards() -> None:
    """That of README.md, without its calculation."""
    chosen = {card.name.partition(" GB")[0]: choice(card) for card in CARDS}
    assert chosen["GTX 1070 8"] == ("cu126", "32-true")
    assert chosen["GTX 1660 6"] == ("PyPI", "32-true")
    assert chosen["V100 16"] == ("cu126", "16-mixed")
    assert chosen["T4 16"] == ("PyPI", "16-mixed")
    assert chosen["RTX 4060 8"] == ("PyPI", "bf16-mixed")
    assert chosen["Apple M1 16"] == ("PyPI", "32-true")
