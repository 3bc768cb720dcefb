"""The benchmarks run; what they measure is for a quiet machine."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, TINY, compose_config
from forks import fork, server, wait
from torch import nn
from torchvision.models import get_model

from fcn.errors import DataError

BENCHMARKS = str(PROJECT / "benchmarks")
SMALL = ("model.head_width=8", "model.head_kernel=1", "model.backbone=vgg_tiny")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def run_script(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: Any) -> None:
    """A benchmark's main(), with these arguments of the command line."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


@pytest.mark.slow
def test_race_goes_on_without_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    import timing

    # These processes have imported torch already.
    context = server()
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda kind: context)
    entrants = {"good": working, "bad": failing}
    seconds, memory, lines = timing.race(entrants, "cpu", rounds=2, warmup=1)
    assert [(name, len(rounds)) for name, rounds in seconds.items()] == [("good", 2)]
    assert 60e6 < memory["good"] < 120e6
    assert lines == ["bad is left out: ImportError: a peer that nobody has"]


def working() -> Callable:
    return lambda: bytearray(b"x" * 32_000_000).copy


def failing() -> Callable:
    raise ImportError("a peer that nobody has")


@pytest.mark.parametrize("name", ["floor", "inference", "levers", "long_run", "training"])
def test_the_others_can_be_imported(name: str) -> None:
    """What they import from the project is there. They measure, which would take minutes."""
    assert callable(import_module(name).main)


def test_results_keep_what_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run
    from timing import Table, speedup

    seconds = {"a": [1, 2, 3], "b": [4, 4, 3]}
    assert speedup(seconds, "a", "b") == 2
    assert speedup(seconds, "a", "c") is None
    for only, value in ((["input", "start"], 1.0), (["start"], 3.0), (["floor"], None)):
        table = Table(f"measured {value}", ("", "x"), [("a", "1")])
        table.bar("much", value, low=2, why="it is little")
        module = SimpleNamespace(main=lambda argv, table=table: [table])
        monkeypatch.setattr(run, "import_module", lambda name, module=module: module)
        run.main(["--only", *only, "--output", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert "| measured 1.0: much | 1.00 | missed: it is little |" in text
    assert "| measured 3.0: much | 3.00 | met |" in text
    assert "| measured None: much | - | not measured: it is little |" in text
    assert text.count("### measured") == 2 + len(run.SIZES)
    assert "| a | 1 |" in text


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
def test_input_loops_and_waiting(tiny_voc: Path) -> None:
    import input as input_pipeline
    import loops
    import waiting

    given = ["--device", "cpu", "--rounds", "1", "--data-root", str(tiny_voc)]
    few = [*given, "--images", "4"]
    (table,) = input_pipeline.main(few)
    assert table.rows[0][0] == "ours"
    (table,) = loops.main([*few, *SMALL])
    names = ["network alone", "evaluate.py's loop", "predict.py's loop"]
    assert [row[0] for row in table.rows] == names
    assert [what.partition(" at least 0.95")[0] for what, *_ in table.bars] == names[1:]
    given += ["--steps", "4", "--batches", "2", "--", *SMALL, "data.num_workers=0"]
    (table,) = waiting.main([*given, "trainer.enable_progress_bar=false"])
    assert 0 < float(table.rows[0][-1]) < 1  # the share of the time that is spent waiting


@pytest.mark.slow
def test_start_ends_at_the_first_step(tmp_path: Path) -> None:
    """Of train.py, and of the bare network that it is compared with."""
    from start import bare, bare_settings

    quickstart = ["experiment=quickstart", "trainer.accelerator=cpu", "data.num_workers=0", *SMALL]
    settings = [
        *quickstart,
        "data.crop_size=32",
        "logger=none",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    process = fork(partial(start, tmp_path / "ours", settings), tmp_path / "log")
    assert wait(process) == 0, (tmp_path / "log").read_text()
    bare(tmp_path / "bare", json.loads(json.dumps(bare_settings("cpu", *quickstart))))
    for name in ("ours", "bare"):
        seconds = json.loads((tmp_path / name).read_text())
        assert list(seconds) == ["imports", "config", "build", "first batch"]
        assert all(s >= 0 for s in seconds.values())


def start(phases: Path, settings: list[str]) -> None:
    sys.path.insert(0, BENCHMARKS)
    from start import child

    child(phases, settings)


def test_frozen_stages_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import KeptStage, keep_frozen_stages

    from fcn.network import FCN

    monkeypatch.setattr(FCN, "__init__", FCN.__init__)  # given back afterwards
    monkeypatch.setattr(KeptStage, "kept", {})
    small = {"backbone": "vgg_tiny", "head_width": 4, "head_kernel": 1}
    plain = FCN(num_classes=3, **small)
    nn.init.normal_(plain.score.weight)
    keep_frozen_stages()
    kept = FCN(num_classes=3, freeze_stages=4, **small)
    kept.load_state_dict(plain.state_dict())
    first, second = torch.rand(2, 1, 3, 40, 50)
    plain.eval(), kept.eval()
    for image in (first, second, first):
        torch.testing.assert_close(kept(image), plain(image))
    assert len(KeptStage.kept) == 2
    assert all(stage.number == n for n, stage in enumerate(kept.stages[:4], start=1))
    deep = FCN(num_classes=3, freeze_stages=4, deep_skips=True, **small)  # reads inside of a stage
    assert not any(isinstance(stage, KeptStage) for stage in deep.stages)


def test_races_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is of one race, and the highest mean IoU comes first in its table."""
    import race

    def result(name: str, args: Any) -> dict[str, Any]:
        points = [(2, 0.1), (4.04, 0.2)]
        taken = {"steps_taken": 1200, "minutes_taken": points[-1][0]}
        return {"name": name, "points": points, "miou": 0.25 + args.seed / 10, **taken}

    monkeypatch.setattr(race, "race", result)
    monkeypatch.setattr(race, "contestants", lambda recipe, device: ["ours"])
    monkeypatch.setattr(race, "draw", lambda *_: None)
    given = ["--recipe", "voc_mini", "--data", "d", "--weights", "w.pth", "--output", tmp_path]
    start = partial(run_script, monkeypatch, race, *given)
    start()
    start("--seed", "1")
    start("--seed", "2", "--rate", "1.2e-4")  # each network may have its own rate
    rows = ["| ours, 2, rate 0.00012 | 4.0 | 1,200 | 45.0 |"]
    rows += ["| ours, 1 | 4.0 | 1,200 | 35.0 |", "| ours, 0 | 4.0 | 1,200 | 25.0 |"]
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == rows
    rates = [json.loads(file.read_text())["rate"] for file in sorted(tmp_path.glob("*.json"))]
    assert rates == [None, None, 1.2e-4]
    for changed, had in (
        (["--minutes", "5"], r"minutes=10\.0"),
        (["--steps", "5"], r"minutes=10\.0, steps=None"),
        (["--workers", "2"], "workers=0"),
        (["--settings", "data.crop_size=9"], r"settings=\[\]"),
        (["--recipe", "camvid_fcn8s"], "recipe=voc_mini"),
    ):
        with pytest.raises(SystemExit, match=rf"ours_0\.json is of another race, with {had}: give"):
            start(*changed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for changed, named in (
        (["--steps", "0"], "--steps: invalid count value: '0'"),
        (["--steps", "3"], "--steps 3: it must be at least --marks, which is 4"),
        (["--steps", "5", "--minutes", "5"], "not allowed with argument"),
        (["--minutes", "-1"], "--minutes: invalid positive value: '-1'"),
        (["--rate", "0"], "--rate: invalid positive value: '0'"),
        (["--workers", "-1"], "--workers -1: it must be at least 0"),
        (["--device", "cuda"], "no GPU"),
    ):
        with pytest.raises(SystemExit, match="2"):
            start(*changed)
        assert named in capsys.readouterr().err
    other = ["--recipe", "voc_mini", "--data", "d", "--output", tmp_path / "without"]
    run_script(monkeypatch, race, *other)
    run = json.loads((tmp_path / "without" / "ours_0.json").read_text())
    assert run["weights"] == "IMAGENET1K_FEATURES"  # what the recipe names
    # torchfcn keeps its authors' rate, so its run is not named after another one.
    monkeypatch.setattr(race, "contestants", lambda recipe, device: ["torchfcn FCN8s vgg16"])
    run_script(monkeypatch, race, *other, "--rate", "1.2e-4")
    assert (tmp_path / "without" / "torchfcn_FCN8s_vgg16_0.json").is_file()


def test_a_race_by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marks are steps, and the last one is the end; all images are judged then."""
    import race

    layer = nn.Conv2d(3, 2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    steps = []
    contestant = SimpleNamespace(
        network=layer,
        optimizer=optimizer,
        prepare=lambda image, mask: (image.float(), mask),
        step=lambda image, mask: steps.append(optimizer.step()),
        logits=lambda image: torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4),
    )
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    batch = {"image": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "mask": mask}
    half = {**batch, "mask": torch.tensor([[[0, 0, 1, 1]] * 4])}
    data = SimpleNamespace(classes=("a", "b"), val_data=[0, 1])
    data.train_dataloader = lambda: iter([batch] * 9)
    data.val_dataloader = lambda: iter([batch, half])
    monkeypatch.setattr(race, "opened", lambda *_: data)
    monkeypatch.setattr(race, "class_weights", lambda *_: [])
    monkeypatch.setattr(race, "make", lambda *_, **__: contestant)
    args = SimpleNamespace(recipe="camvid_fcn8s", settings=[], rate=None, weights="w", seed=0)
    args.steps, args.minutes, args.marks, args.first, args.device = 6, None, 2, 1, "cpu"
    run = race.race("ours vgg16 float32", args)
    assert (len(steps), run["steps_taken"]) == (6, 6)
    assert run["points"] == [(3, pytest.approx(1)), (6, pytest.approx(1))]  # of the first image
    assert run["miou"] == pytest.approx((24 / 32 + 0) / 2)


def test_all_begin_with_the_same_features(tmp_path: Path) -> None:
    """torchvision's own files hold a classifier too, which the others' VGGs have no place for."""
    from peers import features

    torch.manual_seed(0)
    state = get_model("vgg_tiny").features.state_dict()
    state = {f"features.{name}": torch.randn_like(value) for name, value in state.items()}
    classifier = {"classifier.3.weight": torch.ones(2, 2), "classifier.3.bias": torch.ones(2)}
    torch.save(state | classifier, tmp_path / "vgg.pth")
    found = features("vgg_tiny", tmp_path / "vgg.pth")
    assert found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_torchfcn_sees_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from race import TORCHFCN, opened

    asked = []
    data = SimpleNamespace(setup=lambda stage: None)
    monkeypatch.setattr("hydra.utils.instantiate", lambda cfg, **_: asked.append(cfg) or data)
    args = SimpleNamespace(recipe="camvid_fcn8s", settings=["data.rotate=10"], data="d")
    args.seed, args.workers = 0, 0
    opened(next(iter(TORCHFCN)), args)
    names = ("batch_size", "crop_size", "scale", "flip", "jitter", "rotate", "blur")
    assert [asked[0][name] for name in names] == [1, None, None, 0, None, None, None]


def test_a_race_has_the_class_weights_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """They average 1 over the training pixels; "balanced" becomes numbers, for the peers too."""
    import race

    from train import build_data_and_module

    cfg = compose_config("train", *TINY, "model.class_weights=balanced")
    monkeypatch.setattr(race, "configured", lambda *_: (cfg, build_data_and_module(cfg)[1]))
    (setting,) = race.class_weights("a recipe", [], build_data_and_module(cfg)[0])
    name, _, weights = setting.partition("=")
    assert name == "model.class_weights"
    assert len(json.loads(weights)) == 8
    cfg.model.class_weights = None
    assert race.class_weights("a recipe", [], build_data_and_module(cfg)[0]) == []


@pytest.mark.parametrize("channels_last", [False, True])
def test_peers_learn_as_our_recipe_says(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layout, frozen stages and the rate of the head; without smp, which need not be installed."""
    from peers import _smp_our_recipe, composed

    monkeypatch.setattr("fcn.precision.best_layout", lambda *_: channels_last)
    network = nn.Module()
    network.encoder = nn.Module()
    stages = [(nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)) for _ in range(5)]
    network.encoder.features = nn.Sequential(*(layer for stage in stages for layer in stage))
    network.head = nn.Conv2d(3, 8, 3)
    cfg = composed("train", "experiment=camvid_fcn8s", "model.freeze_stages=4")
    contestant = _smp_our_recipe(network, "cpu", cfg)
    weight = network.head.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert [stage[0].weight.requires_grad for stage in stages] == [False] * 4 + [True]
    logits = torch.rand(1, 11, 2, 3)
    mask = torch.tensor([[[2, 0, 255], [5, 2, 9]]])
    each = nn.functional.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    weighted = each * torch.tensor([[[3.0, 1, 0], [1, 3, 1]]])  # a pole counts three times
    network.forward = lambda scores: scores
    loss = contestant.step(logits.requires_grad_(), mask)
    torch.testing.assert_close(loss, weighted.sum() / 5)
    fifth, head = contestant.optimizer.param_groups
    assert set(fifth["params"]) == set(stages[4][0].parameters())
    assert head["lr"] == pytest.approx(20 * fifth["lr"])


def test_peers_learn_in_mixed_precision() -> None:
    from race import compute_as_ours

    network, image = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
    expected = network(image)
    compute_as_ours(network, "cpu")
    scores = network(image)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, expected)  # rounded to bfloat16 on the way
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02)


def test_evened_features_differ_by_a_factor_each() -> None:
    from peers import even_out

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


def test_rows_of_other_settings_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if they were interrupted. A row that only evaluates otherwise needs the base."""
    import recipes

    metrics: dict[str, Any] = dict.fromkeys(("miou", "pixel_acc", "mean_acc", "fwiou"), 0.5)
    metrics |= {"boundary_miou": {"1": 0.25, "2": 0.75}, "iou": {"sky": 0.5}}

    def run_row(name: str, overrides: list[str], output: Path, seed: int, *_: Any) -> Any:
        recipes.folder_of(name, output, seed).mkdir(parents=True, exist_ok=True)
        if "trainer.max_steps=1" in overrides:
            raise KeyboardInterrupt
        return metrics

    def no_data(*_: Any) -> Any:
        raise DataError("CamVid not found")

    monkeypatch.setattr(recipes, "run_row", run_row)
    given = ["--recipe", "camvid_fcn8s", "--data", "d", "--output", tmp_path, "--only"]
    start = partial(run_script, monkeypatch, recipes, *given)
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "run_row", no_data)
        with pytest.raises(DataError):  # nothing was made, so that other settings may begin
            start("base", "--all", "data.root=typo")
    for _ in range(2):  # the same command goes on
        with pytest.raises(KeyboardInterrupt):
            start("base", "--all", "trainer.max_steps=1")
        with pytest.raises(SystemExit, match=r"base_0\.json was made with other settings"):
            start("base")
    (tmp_path / "base_0.json").unlink()
    with pytest.raises(SystemExit, match=r"base.seed0 may have been made with other settings"):
        start("base")
    for _ in range(2):  # again, as after an interruption
        start("flips at test time", "--seeds", "10")
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| base |  | 1 | 50.0 | 50.0 | 50.0 |",
        "| flips at test time | `tta.flip=true` | 1 | 50.0 | 50.0 | 50.0 |",
    ]


def test_pairs_alternate_and_ratios_are_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert all(seconds > 0 for seconds in against.time_steps(32, 1).values())
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
