"""Files and names that someone handed over: nothing in them is run, nothing of them breaks out."""

import csv
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
from safetensors.torch import save_file
from test_evaluate import evaluate_checkpoint

from export import export
from fcn.checkpoint import best_checkpoint, read_checkpoint
from fcn.datasets.check import check
from fcn.datasets.folder import Folder
from fcn.errors import DataError, WeightsError
from fcn.module import SegmentationModule
from fcn.runs.metrics import read_metrics
from fcn.weights import find_weights
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


def run_predict(ckpt: Path) -> Any:
    return predict(
        compose_config("predict", f"ckpt={ckpt}", "input=photo.png", "output=out", "device=cpu")
    )


def run_export(ckpt: Path) -> Any:
    options = [f"ckpt={ckpt}", "format=safetensors", "output=handed/x"]
    return export(compose_config("export", *options))


def run_train(ckpt: Path) -> Any:
    return train_tiny(Path("run"), f"model.weights={ckpt}", "trainer.max_steps=1")


def run_evaluate(ckpt: Path) -> Any:
    return evaluate_checkpoint(ckpt, "output=out")


USES = {"train": run_train, "evaluate": run_evaluate, "predict": run_predict, "export": run_export}


@pytest.fixture(scope="module")
def content(finished_run: Path) -> dict[str, Any]:
    return torch.load(best_checkpoint(finished_run), weights_only=True)


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


def claiming(content: dict[str, Any]) -> dict[str, Any]:
    """A layer of 2 GB in a few bytes, whose settings agree."""
    huge = {"network.conv6.weight": torch.zeros(1, 1, 1, 1).expand(2**18, 512, 3, 3)}
    return of_settings(head_width=2**18)(content) | {"state_dict": content["state_dict"] | huge}


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (INSTANTIATOR, "evaluate"),
        (INSTANTIATOR, "predict"),
        (INSTANTIATOR, "export"),
        (of_settings(weights="IMAGENET1K_V1", depth=3), "predict"),
        (of_settings(head_width=40000), "evaluate"),  # 10 GB of weights
        (of_settings(dropout="half"), "export"),
        (claiming, "predict"),
        (of_settings(class_names=list(range(8))), "predict"),
        (of_settings(palette=[1, 2, 3]), "predict"),
        (of_settings(palette=[[999, 0, 0]] * 8), "evaluate"),
        (of_settings(void="a"), "evaluate"),
        (of_settings(void=0), "export"),
        (lambda content: content | {"state_dict": {"network.score.weight": [1]}}, "export"),
    ],
)
def test_settings_of_a_checkpoint_are_not_trusted(
    place: Path,
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    make: Callable[..., Any],
) -> None:
    """No import, no download, no memory beyond the file's; `evil` is not imported."""
    Path("evil.py").write_text("import os; os.mkdir('hacked')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    torch.save(make(content), "x.ckpt")
    with pytest.raises(WeightsError, match=r"x\.ckpt") as error:
        USES[use](place / "x.ckpt")
    assert len(str(error.value).splitlines()) == 1
    assert "evil" not in sys.modules
    assert not Path("hacked").exists()


@pytest.mark.slow
def test_safetensors_takes_the_place_of_a_checkpoint(place: Path, finished_run: Path) -> None:
    ckpt = best_checkpoint(finished_run)
    path = place / run_export(ckpt) / "model.safetensors"
    assert b"import" not in path.read_bytes()[:20_000]
    expected = SegmentationModule.load_from_checkpoint(ckpt)
    found = SegmentationModule.load_from_checkpoint(path)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert found.class_names == expected.class_names
    assert read_checkpoint(path)["global_step"] == read_checkpoint(ckpt)["global_step"]
    metrics = [evaluate_checkpoint(p, "output=out")["miou"] for p in (ckpt, path)]
    assert metrics[0] == metrics[1]
    masks = [(run_predict(p) / "photo.png").read_bytes() for p in (ckpt, path)]
    assert masks[0] == masks[1]
    assert run_train(path)["steps"] == 1
    assert find_weights("vgg11", path.parent) == path
    before = path.read_bytes()
    assert (place / run_export(path) / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("use", USES)
def test_broken_safetensors(place: Path, content: dict[str, Any], use: str) -> None:
    path = place / "x.safetensors"
    save_file({"a": torch.zeros(9)}, path)  # nothing of ours
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        USES[use](path)
    state = {name: value.contiguous() for name, value in content["state_dict"].items()}
    save_file(state, path, {"fcn": "[[[["})
    if use != "train":
        with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read"):
            USES[use](path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"x\.safetensors cannot be read"):
        USES[use](path)
    assert {p.name for p in place.iterdir()} == {"photo.png", "x.safetensors"}


NAMES = [
    "ground",
    "</script><script>alert(1)</script>",
    "two\nlines\tand\ra \"quote\", 'two', a comma",
    "[red]Straße 東京 🦒 \x1b[31m[/]",
    "=HYPERLINK(1)",
    "long " * 700,
]
IDS = ["=1+1", 'a\'b "c"', "<script>alert(1)</script>"[:7], "new\nline", "東京 🦒", "x" * 250]
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
    summary = train(cfg, run)
    assert {f"val/iou/{name}" for name in NAMES} <= set(read_metrics(run / "metrics.csv")[0])
    assert summary["steps"] == 2
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"val/iou/</script>" in log.read_bytes()

    metrics = evaluate_checkpoint(run, "split=all", f"output={place / 'judged'}")
    assert list(metrics["iou"]) == NAMES
    judged = place / "judged"
    assert list(json.loads((judged / "metrics.json").read_text("utf-8"))["iou"]) == NAMES
    with (judged / "images.csv").open(newline="", encoding="utf-8") as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    shown = {"=1+1": "'=1+1", IDS[-1]: "not utf-8 \\udcff"}
    assert ids == [shown.get(name, name) for name in sorted(IDS)]
    with (judged / "confusion.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == [row[0] for row in rows[1:]]
    assert rows[0][1:] == [f"'{name}" if name[0] == "=" else name for name in NAMES]
    report = (judged / "report.html").read_bytes().decode("ascii")
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert" in report

    with pytest.raises(DataError, match="1 of 7 images failed") as error:
        predict(
            compose_config(
                "predict", f"ckpt={run}", "input=root/images", "output=out", "device=cpu"
            )
        )
    assert "xxx.jpg: File name too long" in str(error.value)  # with _overlay.jpg behind it
    sizes = [Image.open(path).size for path in Path("out").glob("*_overlay.jpg")]
    assert len(sizes) == 6
    assert max(width for width, _ in sizes) < 2000  # a name of 3500 characters is cut off
    printed = "".join(capsys.readouterr())
    assert "\x1b[31m" not in printed


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "none"])
def test_ids_of_a_list_stay_in_the_data_root(place: Path, name: str) -> None:
    """VOC's and CamVid's lists: tests/test_voc2012.py, tests/test_camvid.py."""
    write_hostile_data(place / "root")
    Image.new("RGB", (48, 40)).save(place / "secret.jpg")
    Image.new("L", (48, 40)).save(place / "secret.png")
    (place / "root" / "val.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match=r"root.val\.txt: no file of '\w+' \(1 of 1 ids\)"):
        Folder(split="val", root=place / "root", classes=["a", "b"], val="val.txt")
