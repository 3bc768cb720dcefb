"""python -m benchmarks.gpu, with rows of a moment and with a stand-in for CUDA."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY
from test_cards import has_card
from torch.autograd import DeviceType

from fcn import cli
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
    lines = {
        "agree | FAILED | a \\| b | ": failing(Wrong("a | b")),
        "one | out of memory | OutOfMemoryError: CUDA out of memory. | ": failing(
            torch.OutOfMemoryError("CUDA out of memory.\nTried")
        ),
        "two | FAILED | ZeroDivisionError: 1 / 0 | ": failing(ZeroDivisionError("1 / 0")),
        "speed | skipped | it is not installed | ": failing(Skip("it is not installed")),
        "after | ok | 12 | ": lambda bench: left.extend(bench.folder.iterdir()) or "12",
    }
    rows = [gpu.Row(line.partition(" ")[0], 1, run) for line, run in lines.items()]
    rows.append(gpu.Row("compile", 100, lambda bench: pytest.fail("there is no time for it")))
    before, file = torch.backends.cudnn.benchmark, tmp_path / "new" / "gpu.md"
    command = ["--device", "cpu", "--minutes", "1", "--output", str(file.parent)]
    assert gpu.main(command, rows) == 1
    assert torch.backends.cudnn.benchmark == before
    assert left == []  # each row's files are gone before the next
    text = file.read_text(encoding="utf-8")
    assert "**No GPU was used.**" in text
    assert "1 ok, 2 FAILED, 1 out of memory, 2 skipped" in text
    assert "`python -m benchmarks.gpu --device cpu --minutes 1 --output" in text
    for line in (*lines, "compile | skipped | it takes about 100 s, and "):
        assert f"\n| {line}" in text

    assert gpu.main([*command, "--only", "sp", "after"], rows) == 0
    assert "1 ok, 1 skipped" in file.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        gpu.main([*command, "--only", "nothing"], rows)
    assert "--only nothing: no row begins with this" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_ends_early_keeps_the_rows_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Ctrl-C, or because the device does not answer any more."""
    import gpu

    def interrupt(bench: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "about", lambda device: [])  # it asks git
    command, file = ["--device", "cpu", "--output", str(tmp_path)], tmp_path / "gpu.md"
    good = gpu.Row("good", 0, lambda bench: "x")
    assert gpu.main(command, [good, gpu.Row("two", 0, interrupt)]) == 130
    assert "has the table so far" in capsys.readouterr().out
    assert "| good | ok | x |" in file.read_text(encoding="utf-8")
    monkeypatch.setattr(gpu, "answers", lambda bench: False)
    rows = [good, gpu.Row("bad", 1, lambda bench: str(1 / 0))]
    rows += [gpu.Row(name, 1, lambda bench: pytest.fail("asked")) for name in ("one", "two")]
    assert gpu.main(command, rows) == 1
    text = file.read_text(encoding="utf-8")
    assert text.count("cpu does not answer any more since bad") == 2
    with pytest.raises(SystemExit):
        gpu.main([*command, "--output", str(file)], rows)
    assert "File exists" in capsys.readouterr().err


def test_a_device_whose_memory_cannot_be_freed_ends_no_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.device = "cuda"
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    assert gpu.run_row(gpu.Row("bad", 1, fail), bench).outcome == "FAILED"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_be_used_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    with pytest.raises(SystemExit):
        gpu.main(["--device", "cuda"], [])
    assert "--device cuda: torch" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has_card(monkeypatch, "NVIDIA GeForce GTX 1070", (6, 1))  # each row would fail on it
    with pytest.raises(SystemExit):
        gpu.main([], [])
    assert "no code for this card, a NVIDIA GeForce GTX 1070" in capsys.readouterr().err


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
    from gpu_rows import BARE, SyncWatch, Wrong, places_that_wait

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(Wrong, match="would tell of nothing"):  # this torch is no proof
        places_that_wait(bench)
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
    ((place, times),) = places_that_wait(bench, *TINY, *BARE).items()
    assert place.startswith("tests/test_benchmarks_gpu.py:")
    assert times == SyncWatch.LAST - SyncWatch.FIRST
    assert modes[-1] == "default"


def test_a_kernel_is_counted_once() -> None:
    from gpu_speed import time_of_convolutions

    events = [
        SimpleNamespace(
            key=key, device_type=kind, self_device_time_total=time, self_cpu_time_total=5
        )
        for key, kind, time in (
            ("aten::conv2d", DeviceType.CPU, 0),
            ("aten::cudnn_convolution", DeviceType.CPU, 30),
            ("aten::convolution_backward", DeviceType.CPU, 50),
            ("aten::relu_", DeviceType.CPU, 20),
            ("sm80_xmma_fprop_implicit_gemm", DeviceType.CUDA, 30),
        )
    ]
    assert time_of_convolutions(events, "cuda") == (80, 100)
    assert time_of_convolutions(events, "cpu") == (15, 20)


def test_memory_is_held_against_the_plan(monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    """With a stand-in for CUDA's counters, and a step that uses what they say."""
    import gpu_speed
    from gpu_rows import Wrong

    bench.device, gb = "cuda", 2**30
    monkeypatch.setattr(gpu_speed, "best_precision", lambda device: "32-true")
    monkeypatch.setattr(gpu_speed, "compose", list)
    monkeypatch.setattr(gpu_speed, "plan", lambda config: SimpleNamespace(total=gb))
    monkeypatch.setattr(gpu_speed.memory_plan, "take_steps", lambda given, device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)

    def measured(**peaks: float) -> str:
        for kind, size in peaks.items():
            held = 2**20 + int(size * gb)
            monkeypatch.setattr(torch.cuda, f"max_memory_{kind}", lambda held=held: held)
        return gpu_speed.memory(bench)

    wanted = "plan 1.00 GB, allocated 1.05 GB (+5%), reserved by torch 1.20 GB"
    assert measured(allocated=1.05, reserved=1.2) == wanted
    with pytest.raises(Wrong, match="more than the plan"):
        measured(allocated=1.5, reserved=1.9)
    with pytest.raises(Wrong, match="too much"):
        measured(allocated=0.5, reserved=0.6)


@pytest.mark.slow
def test_a_recipe_takes_steps_and_a_broken_one_does_not(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_rows

    narrow = ("model.backbone=vgg_tiny", "model.head_width=8", "model.head_kernel=1")
    monkeypatch.setattr(gpu_rows, "NARROW", narrow)
    for recipe in ("heavy_fcn8s", "tutorial"):  # those that differ most
        assert gpu_rows.steps(bench, recipe, "32-true").startswith("4 steps, loss 2.0")
    monkeypatch.setattr(SegmentationModule, "configure_gradient_clipping", zero_gradients)
    with pytest.raises(gpu_rows.Wrong, match="no step had a finite gradient"):
        gpu_rows.steps(bench, "quickstart", "32-true")


def test_recipes_suit_the_classes_of_the_shapes() -> None:
    """The class weights of CamVid's recipes are 11 numbers, and shapes have 8 classes."""
    import gpu_rows

    cfg = cli.compose(gpu_rows.on_shapes("camvid_fcn8s", stand_in=False))
    assert cfg.data.dataset._target_.endswith("Shapes")
    assert cfg.model.class_weights is None


def test_the_steps_that_are_watched_have_a_name(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's own value for it, the chosen model's, is only known to its command line."""
    import gpu_rows

    asked: list[str] = []
    monkeypatch.setattr(
        gpu_rows, "places_that_wait", lambda _, *given: Counter(asked.extend(given))
    )
    bench.device = "cuda"
    assert gpu_rows.waits(bench, "32-true") == "none in 6 steps; GradScaler's own: 0 in a step"
    assert cli.compose(asked).name == "gpu"


def zero_gradients(module: Any, *_: Any, **__: Any) -> None:
    """In place of the norm of the gradients, which LossStatistics has computed by then."""
    for callback in module.trainer.callbacks:
        if hasattr(callback, "grad_norm"):
            callback.grad_norm = torch.zeros(())


def test_the_last_line_of_a_failed_run_is_its_error(tmp_path: Path) -> None:
    from gpu_processes import _last_line

    log, hint = tmp_path / "log", "Set the environment variable HYDRA_FULL_ERROR=1 for a trace."
    log.write_text(f"Traceback\nValueError: a=1\n\n{hint}\n", encoding="utf-8")
    assert _last_line(log) == "ValueError: a=1"
    log.write_text("\n", encoding="utf-8")
    assert _last_line(log) == "nothing was printed"


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
