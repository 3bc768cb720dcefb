"""python -m benchmarks.gpu, with rows of a moment and with a stand-in for CUDA."""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY
from test_cards import has_card
from torch.autograd import DeviceType

from fcn.module import SegmentationModule


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    from gpu_rows import global_settings_kept

    with global_settings_kept():
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    from gpu_rows import Bench

    return Bench("cpu", tmp_path, time.monotonic() + 1000)


@pytest.mark.slow
def test_a_row_that_fails_is_a_line_of_the_table_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu
    from gpu_rows import Skip, Wrong

    def failing(error: Exception) -> Any:
        def run(bench: Any) -> str:
            torch.backends.cudnn.benchmark = True
            (bench.new_folder() / "big").write_text("x")
            raise error

        return run

    left = []
    rows = [
        gpu.Row("agree", 1, failing(Wrong("a | b"))),
        gpu.Row("recipe one", 1, failing(torch.OutOfMemoryError("CUDA out of memory.\nTried"))),
        gpu.Row("recipe two", 1, failing(ZeroDivisionError("division by zero"))),
        gpu.Row("speed", 1, failing(Skip("torchfcn is not installed"))),
        gpu.Row("compile", 100, lambda bench: "never"),
        gpu.Row("after", 1, lambda bench: left.extend(bench.folder.iterdir()) or "12 images/s"),
    ]
    before = torch.backends.cudnn.benchmark
    command = ["--device", "cpu", "--minutes", "1", "--output", str(tmp_path / "new")]
    assert gpu.main(command, rows) == 1
    assert torch.backends.cudnn.benchmark == before
    assert left == []  # each row's files are gone before the next
    text = (tmp_path / "new" / "gpu.md").read_text(encoding="utf-8")
    assert "**No GPU was used.**" in text
    assert "1 ok, 2 FAILED, 1 out of memory, 2 skipped" in text
    assert "`python -m benchmarks.gpu --device cpu --minutes 1 --output" in text
    cells = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [[name.strip("| "), *rest] for name, *rest in cells] == [
        ["agree", "FAILED", "a \\|  b".replace("  ", " ")],
        ["recipe one", "out of memory", "OutOfMemoryError: CUDA out of memory."],
        ["recipe two", "FAILED", "ZeroDivisionError: division by zero"],
        ["speed", "skipped", "torchfcn is not installed"],
        ["compile", "skipped", cells[4][2]],
        ["after", "ok", "12 images/s"],
    ]
    assert cells[4][2].startswith("it takes about 100 s, and ")

    assert gpu.main([*command, "--only", "sp", "after"], rows) == 0
    assert "1 ok, 1 skipped" in (tmp_path / "new" / "gpu.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        gpu.main([*command, "--only", "nothing"], rows)
    assert "--only nothing: no row begins with this" in capsys.readouterr().err


@pytest.mark.slow
def test_a_device_that_does_not_answer_is_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    monkeypatch.setattr(gpu, "answers", lambda bench: False)
    monkeypatch.setattr(gpu, "about", lambda device: [])  # it asks git
    rows = [gpu.Row("good", 1, lambda bench: "x"), gpu.Row("bad", 1, lambda bench: str(1 / 0))]
    rows += [gpu.Row(name, 1, lambda bench: pytest.fail("asked")) for name in ("one", "two")]
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)], rows) == 1
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.count("cpu does not answer any more since bad") == 2


def test_a_device_whose_memory_cannot_be_freed_ends_no_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.device = "cuda"
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    result = gpu.run_row(gpu.Row("bad", 1, lambda bench: fail()), bench)  # type: ignore[arg-type]
    assert (result.outcome, result.text.partition(":")[0]) == ("FAILED", "RuntimeError")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    with pytest.raises(SystemExit):
        gpu.main(["--device", "cuda"], [])
    assert "--device cuda: torch" in capsys.readouterr().err
    assert gpu.find_device("auto") in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has_card(monkeypatch, "NVIDIA GeForce GTX 1070", (6, 1))  # each row would fail on it
    with pytest.raises(SystemExit):
        gpu.main([], [])
    assert "no code for this card, a NVIDIA GeForce GTX 1070" in capsys.readouterr().err


def test_ctrl_c_keeps_the_rows_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    def interrupt(bench: Any) -> str:
        raise KeyboardInterrupt

    command = ["--device", "cpu", "--output", str(tmp_path)]
    rows = [gpu.Row("one", 0, lambda bench: "good"), gpu.Row("two", 0, interrupt)]
    assert gpu.main(command, rows) == 130
    assert "has the table so far" in capsys.readouterr().out
    assert "| one | ok | good |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu.main([*command, "--output", str(tmp_path / "file")], rows)
    assert "File exists" in capsys.readouterr().err


def test_the_rows_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_rows
    import gpu_speed

    def names(device: str, best: str) -> list[str]:
        monkeypatch.setattr(gpu_rows, "best_precision", lambda device: best)
        monkeypatch.setattr(gpu_speed, "best_precision", lambda device: best)
        return [row.name for row in gpu.rows_for(device)]

    turing = names("cuda", "16-mixed")
    recipes = sorted(path.stem for path in (PROJECT / "conf" / "experiment").glob("*.yaml"))
    for recipe in ("default", *recipes):
        for precision in ("16-mixed", "bf16-mixed", "32-true"):
            assert f"recipe {recipe}, {precision}" in turing
    kinds = [name.partition(", ")[0].partition(" ")[0] for name in turing]
    assert {"agree", "sync", "memory", "speed", "convolutions", "recipe"} == set(kinds[:10])
    assert len(set(turing)) == len(turing)
    assert not any("16-mixed" in name for name in names("cpu", "32-true") if "bf16" not in name)


def test_agreement_sees_an_error_of_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_rows
    from gpu_rows import BARS, STRICT, agreement
    from peers import random_batch

    torch.manual_seed(0)
    module = SegmentationModule(num_classes=21, backbone="vgg_tiny", head_width=8, head_kernel=3)
    batch = random_batch(1, 40, 50)
    assert agreement(module, batch, "cpu", STRICT)[:4] == (0, 0, 0, 0)
    mixed = agreement(module, batch, "cpu", "bf16-mixed")
    assert 0 < mixed.logits < BARS["bf16-mixed"][0]
    assert 0 < mixed.gradients < BARS["bf16-mixed"][2]

    def wrong(module: torch.nn.Module) -> torch.nn.Module:
        module.network.stages[3][0].weight.data *= 1.01  # type: ignore[index, union-attr]
        return module

    monkeypatch.setattr(gpu_rows.copy, "deepcopy", wrong)
    assert agreement(module, batch, "cpu", STRICT).gradients > BARS[STRICT][2]


@pytest.mark.slow
def test_a_step_that_waits_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's debug mode, which knows the loss's `.item()` and nothing else."""
    from gpu_rows import BARE, SyncWatch, places_that_wait

    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    item, step = torch.Tensor.item, SegmentationModule.training_step

    def telling(self: torch.Tensor) -> Any:
        if modes[-1] == "warn" and (self.requires_grad or self.numel() == 1 == self.ndim):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return item(self)

    def waiting(self: SegmentationModule, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        loss.item()
        return loss

    monkeypatch.setattr(torch.Tensor, "item", telling)
    monkeypatch.setattr(SegmentationModule, "training_step", waiting)
    places = places_that_wait(bench, *TINY, *BARE)
    ((place, times),) = places.items()
    assert place.startswith("tests/test_benchmarks_gpu.py:")
    assert times == SyncWatch.LAST - SyncWatch.FIRST
    assert modes[-1] == "default"


def test_a_torch_that_does_not_tell_of_waiting_is_no_proof(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_rows import Wrong, places_that_wait

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with pytest.raises(Wrong, match="would tell of nothing"):
        places_that_wait(bench)


def test_a_kernel_is_counted_once() -> None:
    from gpu_speed import time_of_convolutions

    def event(key: str, on: DeviceType, device_time: float, cpu_time: float = 5) -> Any:
        times = {"self_device_time_total": device_time, "self_cpu_time_total": cpu_time}
        return SimpleNamespace(key=key, device_type=on, **times)

    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("aten::conv2d", cpu, 0),
        event("aten::cudnn_convolution", cpu, 30),
        event("aten::convolution_backward", cpu, 50),
        event("aten::cudnn_convolution_transpose", cpu, 10),
        event("aten::relu_", cpu, 10),
        event("sm80_xmma_fprop_implicit_gemm", cuda, 30),
        event("vectorized_elementwise_kernel", cuda, 10),
    ]
    assert time_of_convolutions(events, "cuda") == (90, 100)
    assert time_of_convolutions(events, "cpu") == (20, 25)


def test_memory_is_held_against_the_plan(monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    """With a stand-in for CUDA's counters, and a step that uses what they say."""
    import gpu_speed
    from gpu_rows import Wrong

    bench.device, peaks = "cuda", {"allocated": 0.0, "reserved": 0.0}
    planned = 2**30
    monkeypatch.setattr(gpu_speed, "best_precision", lambda device: "32-true")
    monkeypatch.setattr(gpu_speed, "compose", list)
    monkeypatch.setattr(gpu_speed, "plan", lambda config: SimpleNamespace(total=planned))
    monkeypatch.setattr(gpu_speed.memory_plan, "take_steps", lambda given, device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    for kind in peaks:
        held = lambda kind=kind: 2**20 + int(peaks[kind] * planned)  # noqa: E731
        monkeypatch.setattr(torch.cuda, f"max_memory_{kind}", held)

    peaks |= {"allocated": 1.05, "reserved": 1.2}
    wanted = "plan 1.00 GB, allocated 1.05 GB (+5%), reserved by torch 1.20 GB"
    assert gpu_speed.memory(bench) == wanted
    for allocated, reserved, why in ((1.5, 1.9, "more than the plan"), (0.5, 0.6, "too much")):
        peaks |= {"allocated": allocated, "reserved": reserved}
        with pytest.raises(Wrong, match=why):
            gpu_speed.memory(bench)


@pytest.mark.slow
def test_a_recipe_takes_steps_and_a_broken_one_does_not(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_rows

    narrow = ("model.backbone=vgg_tiny", "model.head_width=8", "model.head_kernel=1")
    monkeypatch.setattr(gpu_rows, "NARROW", narrow)
    assert gpu_rows.steps(bench, "paper_fcn16s", "32-true").startswith("4 steps, loss 2.0")
    monkeypatch.setattr(SegmentationModule, "configure_gradient_clipping", zero_gradients)
    with pytest.raises(gpu_rows.Wrong, match="no step had a finite gradient"):
        gpu_rows.steps(bench, "quickstart", "32-true")


def zero_gradients(module: SegmentationModule, *_: Any, **__: Any) -> None:
    """In place of the norm of the gradients, which LossStatistics has computed by then."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "grad_norm"):
            callback.grad_norm = torch.zeros(())


@pytest.mark.slow
def test_a_process_that_fails_or_lasts_too_long(bench: Any, tmp_path: Path) -> None:
    from gpu_processes import _finish, _start
    from gpu_rows import Skip

    code = "import os, sys; print(os.environ['GPU_TESTS_ON']); sys.exit(3)"
    log = tmp_path / "log"
    assert _finish(bench, _start([sys.executable, "-c", code], log, GPU_TESTS_ON="cpu")) == 3
    assert log.read_text(encoding="utf-8") == "cpu\n"
    bench.ends = 0
    process = _start([sys.executable, "-c", "import time; time.sleep(60)"], log)
    with pytest.raises(Skip, match="the time was over"):
        _finish(bench, process)
    assert process.poll() is not None
