"""The benchmarks run; what they measure is for a quiet machine."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT
from forks import fork, server, wait

BENCHMARKS = str(PROJECT / "benchmarks")
SMALL = ("model.head_width=8", "model.head_kernel=1", "model.backbone=vgg_tiny")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.slow
def test_race_goes_on_without_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import timing
    from timing import race

    # These processes have imported torch already.
    context = server()
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda kind: context)

    entrants = {"good": working, "bad": failing}
    seconds, memory, lines = race(entrants, "cpu", rounds=2, warmup=1)
    assert [(name, len(rounds)) for name, rounds in seconds.items()] == [("good", 2)]
    assert 60e6 < memory["good"] < 120e6
    assert lines == ["bad is left out: ImportError: a peer that nobody has"]


def working() -> Callable:
    return lambda: bytearray(b"x" * 32_000_000).copy


def failing() -> Callable:
    raise ImportError("a peer that nobody has")


def test_speedup_and_bars() -> None:
    from timing import Table, speedup

    seconds = {"a": [1, 2, 3], "b": [4, 4, 3]}
    assert speedup(seconds, "a", "b") == 2
    assert speedup(seconds, "a", "c") is None
    table = Table("title", ("", "x"), [("a", "1")])
    for value in (2, 0.5, None):
        table.bar("twice as fast", value, low=2, why="old CPU")
    verdicts = [verdict for *_, verdict in table.bars]
    assert verdicts == ["met", "missed: old CPU", "not measured: old CPU"]
    assert "| a | 1 |" in str(table)


def test_what_is_not_measured_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run
    from timing import Table

    class Module:
        def __init__(self, value: float) -> None:
            self.value = value

        def main(self, argv: list[str]) -> list[Table]:
            table = Table(f"measured {self.value}", ("", "x"), [("a", "1")])
            table.bar("much", self.value, low=2, why="it is little")
            return [table]

    for only, value in ((["input", "start"], 1.0), (["start"], 3.0)):
        monkeypatch.setattr(run, "import_module", lambda name, value=value: Module(value))
        run.main(["--only", *only, "--output", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert "| measured 1.0: much | 1.00 | missed: it is little |" in text
    assert "| measured 3.0: much | 3.00 | met |" in text
    assert text.count("### measured") == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_our_step_learns(precision: str) -> None:
    from peers import make, random_batch

    ours = make(f"ours vgg16 {precision}", "cpu", None, *SMALL, "optimizer.lr=1e-2")
    batch = ours.prepare(*random_batch(1, 40, 50))
    losses = [ours.step(*batch).item() for _ in range(5)]
    assert losses[0] == pytest.approx(math.log(21), rel=1e-2)
    assert losses[-1] < losses[0]
    assert ours.logits(batch[0]).shape == (1, 21, 40, 50)


@pytest.mark.slow
def test_input_and_loops(tiny_voc: Path) -> None:
    import input as input_pipeline
    import loops

    few = ["--device", "cpu", "--rounds", "1", "--images", "4", "--data-root", str(tiny_voc)]
    (table,) = input_pipeline.main(few)
    assert table.rows[0][0] == "ours"
    (table,) = loops.main([*few, *SMALL])
    names = ["network alone", "evaluate.py's loop", "predict.py's loop"]
    assert [row[0] for row in table.rows] == names
    assert [what.partition(" at least 0.95")[0] for what, *_ in table.bars] == names[1:]


@pytest.mark.slow
def test_waiting_is_what_lightning_measured(
    tiny_voc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import waiting

    real = waiting.train
    found = []
    monkeypatch.setattr(waiting, "train", lambda *given: found.append(real(*given)) or found[-1])
    settings = [*SMALL, "data.num_workers=0", "trainer.enable_progress_bar=false"]
    given = ["--device", "cpu", "--steps", "4", "--batches", "2", "--data-root", str(tiny_voc)]
    (table,) = waiting.main([*given, "--", *settings])
    ((waits, steps),) = found
    assert len(waits) == len(steps) == 3  # without the first one
    assert all(seconds > 0 for seconds in waits + steps)
    assert float(table.rows[0][-1]) == pytest.approx(sum(waits) / sum(waits + steps), abs=1e-3)


@pytest.mark.slow
def test_start_ends_at_the_first_step(tmp_path: Path) -> None:
    phases = tmp_path / "phases.json"
    settings = ["experiment=quickstart", "data.crop_size=32", "data.num_workers=0", *SMALL]
    settings += ["logger=none", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / 'run'}"]
    log = tmp_path / "log"
    assert wait(fork(partial(start, phases, settings), log)) == 0, log.read_text()
    seconds = json.loads(phases.read_text())
    assert list(seconds) == ["imports", "config", "build", "first batch"]
    assert all(0 < s < 120 for s in seconds.values())


@pytest.mark.slow
def test_bare_step_is_one_of_the_same_network(tmp_path: Path) -> None:
    from start import bare, bare_settings

    quickstart = ["experiment=quickstart", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    settings = json.loads(json.dumps(bare_settings("cpu", *quickstart, *SMALL)))
    assert settings["batch"] == [8, 3, 96, 96]
    assert settings["network"]["dropout"] == 0.1
    assert settings["network"]["num_classes"] == 8
    bare(tmp_path / "phases.json", settings)
    seconds = json.loads((tmp_path / "phases.json").read_text())
    assert list(seconds) == ["imports", "config", "build", "first batch"]
    assert all(0 <= s < 60 for s in seconds.values())


def start(phases: Path, settings: list[str]) -> None:
    sys.path.insert(0, BENCHMARKS)
    from start import child

    child(phases, settings)


def test_frozen_stages_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from recipes import KeptStage, keep_frozen_stages

    from fcn.network import FCN

    monkeypatch.setattr(FCN, "__init__", FCN.__init__)  # given back afterwards
    monkeypatch.setattr(KeptStage, "kept", {})
    small = {"backbone": "vgg_tiny", "head_width": 4, "head_kernel": 1}
    plain = FCN(num_classes=3, **small)
    torch.nn.init.normal_(plain.score.weight)
    keep_frozen_stages()
    kept = FCN(num_classes=3, freeze_stages=4, **small)
    kept.load_state_dict(plain.state_dict())
    first, second = torch.rand(2, 1, 3, 40, 50)
    plain.eval(), kept.eval()
    for image in (first, second, first):
        torch.testing.assert_close(kept(image), plain(image))
    assert len(KeptStage.kept) == 2
    assert all(stage.number == n for n, stage in enumerate(kept.stages[:4], start=1))


def test_peers_rate_falls_with_the_time() -> None:
    import torch
    from peers import SMP
    from race import schedule

    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    progress = [0.0]
    contestant = SimpleNamespace(optimizer=optimizer)
    falling = schedule(next(iter(SMP)), contestant, lambda: progress[0])
    for progress[0], rate in ((0.0, 2e-4), (0.5, 1.05e-4), (1.0, 1e-5)):
        optimizer.step()
        falling.step()
        assert falling.get_last_lr() == [pytest.approx(rate)]


def test_race_is_won_by_mean_iou() -> None:
    from race import table

    runs = [
        {"name": "slow", "seed": 0, "steps": 1200, "points": [(2, 0.1), (4, 0.2)], "miou": 0.25},
        {"name": "fast", "seed": 1, "steps": 300, "points": [(2, 0.3), (4.04, 0.3)], "miou": 0.3},
    ]
    assert table(runs).splitlines()[2:] == [
        "| fast, 1 | 4.0 | 300 | 30.0 |",
        "| slow, 0 | 4.0 | 1,200 | 25.0 |",
    ]


def test_races_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import race

    run = {"name": "ours", "steps": 9, "points": [(1, 0.5)], "images": 1, "miou": 0.5}
    monkeypatch.setattr(race, "race", lambda *_: run)
    monkeypatch.setattr(race, "contestants", lambda recipe: ["ours"])
    monkeypatch.setattr(race, "draw", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def start(recipe: str, *options: str) -> list[str]:
        command = ["race.py", "--recipe", recipe, "--data", "d", "--weights", "w.pth", *options]
        monkeypatch.setattr(sys, "argv", command)
        race.main()
        return (tmp_path / "runs" / "race" / recipe / "table.md").read_text().splitlines()[2:]

    assert start("voc_mini") == ["| ours, 0 | 1.0 | 9 | 50.0 |"]
    assert len(start("voc_mini", "--seed", "1")) == 2
    assert len(start("camvid_fcn8s")) == 1
    row = json.loads((tmp_path / "runs" / "race" / "voc_mini" / "ours_1.json").read_text())
    assert (row["recipe"], row["seed"], row["minutes"], row["settings"]) == ("voc_mini", 1, 10, [])
    for change, had in (
        (["--minutes", "5"], "minutes=10"),
        (["--settings", "data.crop_size=9"], r"settings=\[\]"),
        (["--rate", "1e-3"], "rate=None"),
    ):
        with pytest.raises(SystemExit, match=rf"ours_0\.json is of another race, with {had}: give"):
            start("voc_mini", *change)


def test_torchfcn_sees_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from race import TORCHFCN, opened

    asked = []
    data = SimpleNamespace(setup=lambda stage: None)
    monkeypatch.setattr("hydra.utils.instantiate", lambda cfg, **_: asked.append(cfg) or data)
    args = SimpleNamespace(recipe="camvid_fcn8s", settings=["data.rotate=10"], data="d", seed=0)
    for name in ("ours", next(iter(TORCHFCN))):
        opened(name, args)
    names = ("batch_size", "crop_size", "scale", "flip", "jitter", "rotate", "blur")
    ours, theirs = ([cfg[name] for name in names] for cfg in asked)
    assert ours[3:] == [0.5, 0.2, 10, None]
    assert theirs == [1, None, None, 0, None, None, None]


@pytest.mark.parametrize("channels_last", [False, True])
def test_peers_have_the_layout_that_ours_has(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peers import _smp_our_recipe, composed
    from torch import nn

    monkeypatch.setattr("fcn.precision.best_layout", lambda *_: channels_last)
    network = nn.Module()
    network.encoder = nn.Module()
    stage = (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    network.encoder.features = nn.Sequential(*stage, *(nn.MaxPool2d(2) for _ in range(4)))
    network.head = nn.Conv2d(4, 8, 3)
    _smp_our_recipe(network, "cpu", composed("train", "experiment=camvid_fcn8s"))
    weight = network.head.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_peers_learn_in_mixed_precision() -> None:
    import torch
    from race import compute_as_ours

    network = torch.nn.Conv2d(3, 4, 3)
    image = torch.rand(1, 3, 8, 8)
    expected = network(image)
    compute_as_ours(network)
    scores = network(image)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)  # rounded to bfloat16 on the way
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02)
    scores.sum().backward()
    assert network.weight.grad.abs().min() > 0


def test_evened_features_differ_by_a_factor_each() -> None:
    import torch
    from peers import even_out
    from torch import nn

    vgg = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    vgg.requires_grad_(False)[0].weight *= 500
    image, other = torch.rand(2, 1, 3, 20, 24)
    before = vgg[:3](other), vgg(other)
    even_out(vgg, image)
    assert vgg[:2](image).std() == pytest.approx(1, rel=1e-3)
    assert vgg(image).relu().std() == pytest.approx(1, rel=1e-3)
    for was, now in zip(before, (vgg[:3](other), vgg(other)), strict=True):
        factor = now.norm() / was.norm()
        torch.testing.assert_close(now, factor * was, rtol=1e-3, atol=1e-4)
        assert not 0.9 < factor < 1.1


def test_peers_of_our_recipe_freeze_what_ours_does() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    from peers import SMP_OUR_RECIPE, make, random_batch

    contestant = make(next(iter(SMP_OUR_RECIPE)), "cpu")
    features = contestant.network.encoder.features
    before = [p.detach().clone() for p in features.parameters()]
    contestant.step(*contestant.prepare(*random_batch(1, 40, 50)))
    changed = [not p.equal(b) for p, b in zip(features.parameters(), before, strict=True)]
    assert changed == [False] * 24 + [True] * 8  # 12 convolutions of four stages, 4 of the fifth
    head, stage5 = (contestant.optimizer.param_groups[i]["lr"] for i in (1, 0))
    assert head == pytest.approx(20 * stage5)


def test_rows_of_other_settings_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recipes

    scores = dict.fromkeys(("miou", "pixel_acc", "mean_acc", "fwiou"), 0.5)
    metrics = {**scores, "boundary_miou": {"1": 0.25, "2": 0.75}, "iou": {"sky": 0.5}}
    monkeypatch.setattr(recipes, "run_row", lambda *given: metrics)
    monkeypatch.setattr(recipes, "keep_frozen_stages", lambda: None)
    command = ["recipes.py", "--recipe", "camvid_fcn8s", "--data", "d", "--output", str(tmp_path)]
    command += ["--only", "base", "flips at test time"]
    for _ in range(2):  # again, as after an interruption
        monkeypatch.setattr(sys, "argv", command)
        recipes.main()
    row = json.loads((tmp_path / "base_0.json").read_text())
    assert row["boundary_miou"] == 0.5
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:] == [
        "| base |  | 1 | 50.0 | 50.0 | 50.0 |",
        "| flips at test time | `tta.flip=true` | 1 | 50.0 | 50.0 | 50.0 |",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--all", "trainer.max_steps=400"])
    with pytest.raises(SystemExit, match=r"base_0\.json was made with other settings"):
        recipes.main()


def test_interrupted_rows_and_other_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun with other settings is refused; the base comes before its like."""
    import recipes

    scores = dict.fromkeys(("miou", "pixel_acc", "mean_acc", "fwiou"), 0.5)
    metrics = {**scores, "boundary_miou": {"1": 0.5}, "iou": {}}
    ran: list[str] = []

    def run_row(name: str, overrides: list[str], output: Path, seed: int, *_: Any) -> Any:
        recipes.folder_of(name, output, seed).mkdir(parents=True, exist_ok=True)
        ran.append(name)
        if "trainer.max_steps=1" in overrides:
            raise KeyboardInterrupt
        return metrics

    def start(*options: str) -> None:
        command = ["recipes.py", "--recipe", "camvid_fcn8s", "--data", "d", "--output"]
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path), *options])
        recipes.main()

    monkeypatch.setattr(recipes, "run_row", run_row)
    with pytest.raises(KeyboardInterrupt):
        start("--only", "base", "--all", "trainer.max_steps=1")
    with pytest.raises(SystemExit, match=r"base_0\.json was made with other settings"):
        start("--only", "base")
    with pytest.raises(KeyboardInterrupt):  # the same command goes on
        start("--only", "base", "--all", "trainer.max_steps=1")
    (tmp_path / "base_0.json").unlink()
    with pytest.raises(SystemExit, match=r"base.seed0 may have been made with other settings"):
        start("--only", "base")
    assert recipes.table(tmp_path, recipes.CAMVID_ROWS).count("\n") == 2

    ran.clear()
    start("--only", "flips at test time", "--seeds", "10")
    assert ran == ["base", "flips at test time"]
    assert "| base |  | 1 | 50.0 |" in (tmp_path / "table.md").read_text()


def test_pairs_alternate_and_ratios_are_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import against

    order = []

    def child(checkout: Path, job: str, *given: str) -> dict[str, float]:
        order.append((job, checkout == tmp_path))
        return (
            {"train": 2.0, "forward": 1.0} if checkout == tmp_path else {"train": 1, "forward": 2}
        )

    monkeypatch.setattr(against, "child", child)
    monkeypatch.setattr(against, "evaluation", lambda *given: 4.0)
    (table,) = against.main(["--other", str(tmp_path), "--pairs", "2"])
    of_other = [other for job, other in order if job == "steps"]
    assert of_other == [False, True, True, False]
    assert [row[-1].partition(" ")[0] for row in table.rows] == ["2.000", "0.500", "1.000"]
    verdicts = [verdict.partition(":")[0] for *_, verdict in table.bars]
    assert verdicts == ["met", "missed", "met"]


def test_both_checkouts_take_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import against

    from fcn.checkpoint import read_checkpoint
    from fcn.module import SegmentationModule

    monkeypatch.setattr(against, "BACKBONE", {"backbone": "vgg_tiny", "head_width": 8})
    assert all(0 < seconds < 60 for seconds in against.time_steps(32, 1).values())
    monkeypatch.chdir(against.HERE)
    against.save_checkpoint(tmp_path / "made.ckpt")
    assert read_checkpoint(tmp_path / "made.ckpt")["config"]["name"] == "against"
    assert SegmentationModule.load_from_checkpoint(tmp_path / "made.ckpt").network.stride == 8


def run_as_scripts(scripts: list[Path]) -> None:
    """Import each as `python benchmarks/NAME.py` does: only its own folder is on the path."""
    for script in scripts:
        others = [p for p in sys.path if Path(p).resolve() != PROJECT]
        sys.path[:] = [str(script.parent), *others]
        own = ("fcn", "train", "evaluate", "timing", "peers")
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        runpy.run_path(str(script))


@pytest.mark.slow
def test_scripts_find_the_project(tmp_path: Path) -> None:
    scripts = [PROJECT / "benchmarks" / f"{name}.py" for name in ("recipes", "race")]
    log = tmp_path / "log"
    assert wait(fork(partial(run_as_scripts, scripts), log)) == 0, log.read_text("utf-8")
