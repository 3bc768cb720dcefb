"""conf/experiment/: each recipe is what its head and its source say, and trains."""

from pathlib import Path

import pytest
from conftest import compose_config
from test_training_settings import check

from fcn.errors import WeightsError
from fcn.network import FCN
from fcn.weights import find_weights

FOLDER = Path(__file__).parents[1] / "conf" / "experiment"
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
PIXELS = 169_903  # not void, in a mean image: 510 of VOC2012, see heavy_fcn8s


@pytest.fixture(autouse=True)
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first weights of a network cost most, and nothing here looks at them."""
    monkeypatch.setattr(FCN, "reset_parameters", lambda self: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_say_how_to_run_them(name: str) -> None:
    cfg = compose_config("train", f"experiment={name}", "model.weights=null")
    check(cfg)
    assert cfg.name == name
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"python train.py experiment={name}" in text
    assert "mean IoU" in " ".join(text.replace("#", " ").split())


@pytest.mark.parametrize(
    ("stride", "learned"),
    [(32, set()), (16, {"to_pool4.weight"}), (8, {"to_pool4.weight", "to_pool3.weight"})],
)
def test_paper(stride: int, learned: set[str]) -> None:
    cfg = compose_config("train", f"experiment=paper_fcn{stride}s")
    if stride < 32:  # the coarser net is trained first
        missing = rf"paper_fcn{2 * stride}s.*best\.ckpt: no such file"
        with pytest.raises(WeightsError, match=missing):
            find_weights(cfg.model.backbone, cfg.model.weights)
    assert (cfg.model.stride, cfg.model.backbone) == (stride, "vgg16")
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (1e-4, 0.9)
    assert (cfg.optimizer.weight_decay, cfg.model.bias_lr_multiplier) == (5e-4, 2)
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == 20
    assert (cfg.data.dataset._target_, cfg.data.val_split) == ("fcn.datasets.sbd.SBD", "seg11valid")
    small = {"backbone": "vgg_tiny", "head_width": 4, "head_kernel": 1}
    network = FCN(**{k: cfg.model[k] for k in ("stride", "learn_last_upsampling")}, **small)
    assert {n for n, p in network.upsample.named_parameters() if p.requires_grad} == learned


def test_heavy_learning_is_caffes_step() -> None:
    cfg = compose_config("train", "experiment=heavy_fcn8s")
    assert cfg.optimizer.lr == pytest.approx(1e-10 * PIXELS, rel=0.02)
    assert cfg.optimizer.weight_decay == pytest.approx(5e-4 / PIXELS, rel=0.02)
    assert (cfg.optimizer.momentum, cfg.data.batch_size) == (0.99, 1)
    assert cfg.trainer.accumulate_grad_batches == 1
    assert not cfg.model.learn_upsampling
    at_once = compose_config("train", "experiment=atonce_fcn8s")
    assert list(at_once.model.pool_scales) == [1, 0.01, 0.0001]
    assert at_once.optimizer == cfg.optimizer


def test_tutorial() -> None:
    cfg = compose_config("train", "experiment=tutorial")
    assert (cfg.model.pooling, cfg.model.fusion, cfg.model.backbone) == ("avg", "feature", "vgg19")
    assert (cfg.data.crop_size, cfg.data.batch_size, cfg.trainer.max_epochs) == (224, 3, 175)
