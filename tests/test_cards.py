"""Cards that the installed torch has code for, and what is said about the others."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import compose_config, train_tiny, write_onnx

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
    ("known", "fits", "others"),
    [
        (PYPI, "7.5 8.9 10.3 12.1", "6.1 7.0 11.0 13.0"),  # not GTX 10xx and V100; 8.9 by sm_86
        (LINUX, "7.5 8.9 10.3 12.1 13.0", "6.1 7.0 11.0"),  # 13.0 by compute_120
        (CU126, "5.2 6.1 7.0 7.5 8.9", "10.3 11.0 12.1 13.0"),
        (["sm_90a"], "9.0", "9.1 10.0"),
        (["sm_120f"], "12.0 12.1", "13.0"),
        (["compute_80"], "8.0 9.0 12.1", "7.5"),
        (["compute_100f"], "10.0 10.3", "12.0"),
    ],
)
def test_code_for(known: list[str], fits: str, others: str) -> None:
    cards = [(text, tuple(map(int, text.split(".")))) for text in f"{fits} {others}".split()]
    assert [text for text, card in cards if has_code_for(card, known)] == fits.split()


def has_card(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Lets torch's wheel of PyPI find this card."""
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: PYPI)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def test_card_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    for name, capability, message in (
        (
            "NVIDIA GeForce GTX 1070",
            (6, 1),
            r"no code for this card, a NVIDIA GeForce GTX 1070 \(compute capability 6\.1\); it has "
            r"sm_75 sm_80 [\s\S]*torchvision --index-url https://download.pytorch.org/whl/cu126",
        ),
        ("NVIDIA Thor", (11, 0), "pip install --upgrade --force-reinstall torch torchv"),
        ("Tesla K80", (3, 7), "No torch of today has code for cards before Maxwell"),
    ):
        has_card(monkeypatch, name, capability)
        check_card(torch.device("cpu"))
        with pytest.raises(DeviceError, match=message):
            check_card(card)
    has_card(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9))
    check_card(card)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's ROCm
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx1100"])
    check_card(card)


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


def test_onnx_files_need_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on the CPU, so that a GPU for which torch has no code does no harm."""

    def refuse(device: torch.device) -> None:
        raise DeviceError("no code")

    monkeypatch.setattr("fcn.inference.predictor.check_card", refuse)
    write_onnx(tmp_path / "x.onnx", {})
    assert load_predictor(tmp_path / "x.onnx").class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        (None, "is a build without CUDA"),
        ("13.2", "the driver may be too old for the CUDA 13.2"),
    ],
)
def test_warning_about_an_unused_card(
    cuda: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for card, smi in ((True, "/usr/bin/nvidia-smi"), (False, None), (False, "/usr/bin/nvidia-smi")):
        assert caplog.text == ""
        monkeypatch.setattr(torch.cuda, "is_available", lambda card=card: card)
        monkeypatch.setattr(shutil, "which", lambda name, smi=smi: smi)
        warn_about_unused_card()
    assert expected in caplog.text


@pytest.mark.parametrize("layout", [True, False])
def test_checkpoint_is_laid_out_for_its_device(
    layout: bool, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was best where the network was trained, in which each is built first."""
    layouts: list[bool] = []
    monkeypatch.setattr(FCN, "set_layout", lambda network, layout: layouts.append(layout))
    for module in ("evaluation.candidate", "inference.predictor"):
        monkeypatch.setattr(f"fcn.{module}.best_layout", lambda *_, **__: layout)
    load_predictor(last_checkpoint(finished_run), "cpu")
    open_candidate(last_checkpoint(finished_run), accelerator="cpu")
    assert len(layouts) == 4
    assert layouts[1::2] == [layout] * 2


def test_table_of_cards() -> None:
    """That of README.md, without its calculation."""
    chosen = {card.name.partition(" GB")[0]: choice(card) for card in CARDS}
    expected = {
        "GTX 1070 8": ("cu126", "32-true"),
        "GTX 1660 6": ("PyPI", "32-true"),
        "V100 16": ("cu126", "16-mixed"),
        "RTX 4060 8": ("PyPI", "bf16-mixed"),
        "Apple M1 16": ("PyPI", "32-true"),
    }
    assert expected.items() <= chosen.items()
