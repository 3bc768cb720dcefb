"""Files and names that someone handed over: nothing in them is run, nothing of them breaks out."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config, train_tiny
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from test_train import evaluate_checkpoint

from export import export
from fcn.checkpoints import read_checkpoint
from fcn.errors import ConfigError, FCNError, WeightsError
from fcn.module import SegmentationModule
from fcn.runs import best_checkpoint, last_checkpoint
from predict import predict
from train import resumed_config, train


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
    options = [f"ckpt={ckpt}", "format=safetensors", "output=handed/x.safetensors"]
    return export(compose_config("export", *options))


def run_train(ckpt: Path) -> Any:
    try:
        return train_tiny(Path("run"), f"model.weights={ckpt}", "trainer.max_steps=1")
    except InstantiationException as error:  # Hydra's, which `short_messages` looks into
        raise (error.__cause__ or error) from None


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
    Path("evil.py").write_text("import os; os.mkdir('hacked')")
    monkeypatch.syspath_prepend(str(place))
    torch.save(make(content), "x.ckpt")
    with pytest.raises(WeightsError, match=r"x\.ckpt") as error:
        USES[use](place / "x.ckpt")
    assert len(str(error.value).splitlines()) == 1
    assert "evil" not in sys.modules
    assert not Path("hacked").exists()


def test_safetensors_takes_the_place_of_a_checkpoint(place: Path, finished_run: Path) -> None:
    ckpt = best_checkpoint(finished_run)
    path = place / run_export(ckpt)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
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
    before = path.read_bytes()
    assert (place / run_export(path)).read_bytes() == before


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


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"_target_": "os.mkdir", "_args_": ["hacked"]}},
        {"data": {"dataset": [{"_target_": "evil.make"}]}},
        {"logger": "${oc.create:{_target_: os.mkdir, _args_: [hacked]}}"},
    ],
)
def test_resumed_settings_that_call_code_are_refused(
    place: Path, finished_run: Path, change: dict[str, Any]
) -> None:
    run = Path(shutil.copytree(finished_run, place / "handed"))
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    (run / "config.yaml").write_text(json.dumps(config | change))  # JSON is YAML
    with pytest.raises(ConfigError, match=r"wants to call (os\.mkdir|evil\.make)"):
        train(resumed_config(run, [f"resume={run}"]), run)
    assert not Path("hacked").exists()


def test_own_code_is_resumed_when_it_is_named(place: Path, finished_run: Path) -> None:
    run = Path(shutil.copytree(finished_run, place / "own"))
    text = (run / "config.yaml").read_text().replace("torch.optim.SGD", "torch.optim.sgd.SGD")
    (run / "config.yaml").write_text(text)
    named = "optimizer._target_=torch.optim.sgd.SGD"
    with pytest.raises(FCNError, match=named):
        resumed_config(run, ["trainer.max_steps=5"])
    assert resumed_config(run, [named]).optimizer._target_ == "torch.optim.sgd.SGD"
    assert last_checkpoint(run).is_file()
