"""Files and names that someone handed over: nothing in them is run, nothing of them breaks out."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, compose_config, train_tiny
from hydra.utils import instantiate
from PIL import Image
from test_evaluate import evaluate_checkpoint

from export import export
from fcn.checkpoint import best_checkpoint
from fcn.datasets.check import check
from fcn.datasets.folder import Folder
from fcn.errors import DataError, WeightsError
from fcn.runs.metrics import read_metrics
from predict import predict
from train import train


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hacked",)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a photograph."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("photo.png")
    return tmp_path


def run_predict(ckpt: Path, photos: str = "photo.png") -> Any:
    options = [f"ckpt={ckpt}", f"input={photos}", "output=out", "device=cpu"]
    return predict(compose_config("predict", *options))


def run_export(ckpt: Path) -> Any:
    return export(compose_config("export", f"ckpt={ckpt}", "format=safetensors"))


def run_train(ckpt: Path) -> Any:
    return train_tiny(Path("run"), f"model.weights={ckpt}", "trainer.max_steps=1")


def run_evaluate(ckpt: Path) -> Any:
    return evaluate_checkpoint(ckpt, "output=out")


USES = {"train": run_train, "evaluate": run_evaluate, "predict": run_predict, "export": run_export}


@pytest.mark.parametrize("use", USES)
def test_pickled_code_is_refused(place: Path, use: str) -> None:
    torch.save({"state_dict": {"network.conv6.bias": Bomb()}}, "x.ckpt")
    with pytest.raises(WeightsError, match=r"x\.ckpt.*could run code"):
        USES[use](place / "x.ckpt")
    assert {path.name for path in place.iterdir()} == {"photo.png", "x.ckpt"}
    torch.load("x.ckpt", weights_only=False)  # it is hostile indeed
    assert Path("hacked").is_dir()


def of_settings(**settings: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: content | {"hyper_parameters": content["hyper_parameters"] | settings}


# Lightning's own names: before 2.6.6 it imported and called what the file says
INSTANTIATOR = of_settings(_instantiator="evil.make", _class_path="evil.Module")


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (INSTANTIATOR, "evaluate"),
        (INSTANTIATOR, "predict"),
        (INSTANTIATOR, "export"),
        (of_settings(weights="IMAGENET1K_V1", depth=3), "predict"),
        (of_settings(head_width=40000), "evaluate"),  # 10 GB of weights
    ],
)
def test_settings_of_a_checkpoint_are_not_trusted(
    place: Path,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    make: Callable[..., Any],
) -> None:
    """No import, no download, no memory beyond the file's (more in test_checkpoint.py)."""
    Path("evil.py").write_text("import os; os.mkdir('hacked')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    content = torch.load(best_checkpoint(finished_run), weights_only=True)
    torch.save(make(content), "x.ckpt")
    with pytest.raises(WeightsError, match=r"x\.ckpt") as error:
        USES[use](place / "x.ckpt")
    assert len(str(error.value).splitlines()) == 1
    assert "evil" not in sys.modules
    assert not Path("hacked").exists()


NAMES = ["ground", "</script><script>alert(1)</script>", "=HYPERLINK(1)", "long " * 700]
NAMES += ["two\nlines\tand\ra \"quote\", 'two', a comma", "[red]Straße 東京 🦒 \x1b[31m[/]"]
IDS = ["=1+1", 'a\'b "c"', "<script>", "new\nline", "東京 🦒", "x" * 250]
IDS += [os.fsdecode(b"not utf-8 \xff")]


def write_hostile_data(root: Path) -> list[str]:
    """Pairs with the names above as files'; overrides to train on them."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number, name in enumerate(IDS):
        Image.effect_noise((48, 40), 90).convert("RGB").save(root / "images" / f"{name}.jpg")
        mask = Image.new("L", (48, 40), number % len(NAMES))
        mask.paste(0, (0, 0, 10, 10))
        mask.save(root / "masks" / f"{name}.png")
    return ["data=folder", f"data.root={root}", "data.num_workers=0", "data.crop_size=32"]


@pytest.mark.slow
def test_hostile_names(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through check, training with W&B, evaluation and prediction; all is written and escaped."""
    data = write_hostile_data(place / "root")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny = [o for o in TINY if not o.startswith(("data", "logger"))]
    cfg = compose_config("train", *tiny, *data, "trainer.max_steps=2")
    cfg.data.dataset.classes = NAMES
    assert check(instantiate(cfg.data, _convert_="all"), place / "checked") == 0
    run = place / "run"
    assert train(cfg, run)["steps"] == 2
    assert {f"val/iou/{name}" for name in NAMES} <= set(read_metrics(run / "metrics.csv")[0])
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"val/iou/</script>" in log.read_bytes()

    metrics = evaluate_checkpoint(run, "split=all", "output=judged")
    assert list(metrics["iou"]) == NAMES
    assert list(json.loads(Path("judged/metrics.json").read_text("utf-8"))["iou"]) == NAMES
    assert "'=HYPERLINK(1)," in Path("judged/confusion.csv").read_text("utf-8")
    assert "\n'=1+1," in Path("judged/images.csv").read_text("utf-8")
    report = Path("judged/report.html").read_bytes().decode("ascii")
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert" in report

    with pytest.raises(DataError, match="1 of 7 images failed") as error:
        run_predict(run, "root/images")
    assert "xxx.jpg: File name too long" in str(error.value)  # with _overlay.jpg behind it
    sizes = [Image.open(path).size for path in Path("out").glob("*_overlay.jpg")]
    assert len(sizes) == 6
    assert max(width for width, _ in sizes) < 2000  # a name of 3500 characters is cut off
    assert "\x1b[31m" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "none"])
def test_ids_of_a_list_stay_in_the_data_root(place: Path, name: str) -> None:
    """VOC's and CamVid's lists: tests/test_voc2012.py, tests/test_camvid.py."""
    for part, mode, file in (("images", "RGB", "a.jpg"), ("masks", "L", "a.png")):
        (place / "root" / part).mkdir(parents=True)
        for path in (place / "root" / part / file, place / file.replace("a", "secret")):
            Image.new(mode, (48, 40)).save(path)
    (place / "root" / "val.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match=r"root.val\.txt: '\w+' has neither an image nor a mask"):
        Folder(split="val", root=place / "root", classes=["a", "b"], val="val.txt")
