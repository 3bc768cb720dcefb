"""Every way into a network's weights, and every misfit: loaded, warned about, or refused.

The authors' Caffe nets are in test_published.py.
"""

import io
import os
import pickle
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models._api import BUILTIN_MODELS

from fcn.errors import ConfigError, WeightsError, WriteError
from fcn.network import FCN
from fcn.weights import find_weights, load_weights

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vgg_state(backbone: str = "vgg_tiny") -> State:
    """Random features with torchvision's names."""
    with torch.device("meta"):
        state = torchvision.models.get_model(backbone).features.state_dict()
    return {f"features.{name}": 0.05 * torch.randn(value.shape) for name, value in state.items()}


def classifier(width: int = 8, kernel: int = 7) -> State:
    """Random linear layers as torchvision has them, but narrow."""
    shapes = {"0": (width, 16 * kernel**2), "3": (width, width), "6": (10, width)}
    state = {f"classifier.{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
    return state | {f"classifier.{n}.bias": torch.randn(out) for n, (out, _) in shapes.items()}


def small(**changes: Any) -> FCN:
    options: dict[str, Any] = {"num_classes": 5, "stride": 32, "backbone": "vgg_tiny"}
    return FCN(**options | {"head_width": 8, "head_kernel": 1} | changes)


def loaded(source: str | Path, **changes: Any) -> tuple[FCN, list[str]]:
    """A network with these weights, and the layers that keep their fresh start."""
    network = small(**changes)
    return network, load_weights(network, source)


def save(folder: Path, content: Any, name: str = "weights.pth") -> str:
    """Writes weights to a file."""
    writer = save_file if name.endswith(".safetensors") else torch.save
    writer(content, folder / name)
    return str(folder / name)


# ---- torchvision's names


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("x.pth", torch.float32), ("x.pth", torch.float16), ("x.safetensors", torch.float32)],
)
def test_torchvision_file(
    name: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {layer: value.to(dtype) for layer, value in (vgg_state() | classifier()).items()}
    network, fresh = loaded(save(tmp_path, state, name), head_kernel=7)
    assert caplog.records == []
    own = list(network.state_dict().values())[:20]  # as many layers, in the same order
    theirs = [value for layer, value in state.items() if layer.startswith("features.")]
    for layer in ("classifier.0", "classifier.3"):
        theirs += [state[f"{layer}.weight"], state[f"{layer}.bias"]]
    for found, expected in zip(own, theirs, strict=True):
        assert found.equal(expected.float().view(found.shape))
    assert fresh == ["score", "upsample.to_image_32"]
    assert network.score.weight.eq(0).all()


def without(state: State, prefix: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


NOT_FINITE = classifier() | {"classifier.3.bias": torch.full((8,), torch.nan)}


@pytest.mark.parametrize(
    ("part", "kernel", "message"),
    [
        ({}, 7, "conv6 and conv7 start at random (no classifier.0, no classifier.3)"),
        (without(classifier(), "classifier.3"), 7, "conv7 starts at random (no classifier.3)"),
        (
            classifier(16),
            7,
            "conv6 and conv7 start at random (classifier.0 is (16, 784), conv6 (8, 16, 7, 7), ",
        ),
        (classifier(), 3, "conv6 starts at random (classifier.0 is (8, 784), conv6 (8, 16, 3, 3))"),
        (NOT_FINITE, 7, "conv7 starts at random (classifier.3 is not finite)"),
    ],
)
def test_one_warning_names_the_layers_that_start_at_random(
    part: State, kernel: int, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, vgg_state() | part)
    network, fresh = loaded(path, head_kernel=kernel)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"{path}: {message}")
    random = [layer for layer in ("conv6", "conv7") if layer in message.partition(" start")[0]]
    assert fresh == [*random, "score", "upsample.to_image_32"]
    assert all(p.isfinite().all() for p in network.parameters())


# ---- our own checkpoints


@pytest.mark.parametrize("decoder", [{}, {"fusion": "feature"}, {"deep_skips": True}])
@pytest.mark.parametrize(
    ("coarse", "fine", "pools"),
    [
        (32, 16, ["pool4"]),
        (16, 8, ["pool3"]),
        (32, 8, ["pool4", "pool3"]),
        (8, 4, ["pool2"]),
        (16, 16, []),
    ],
)
def test_coarser_checkpoint_starts_finer(
    decoder: dict[str, Any], coarse: int, fine: int, pools: list[str], tmp_path: Path
) -> None:
    old = small(stride=coarse, **decoder).state_dict()
    for value in old.values():
        value.normal_(std=0.1)
    path = save(tmp_path, {"state_dict": {f"network.{name}": value for name, value in old.items()}})
    network, fresh = loaded(path, stride=fine, **decoder)
    scored = "fusion" not in decoder
    new = [f"skips.{pool}" for pool in pools] if scored else []
    new += [f"upsample.to_{pool}" for pool in pools]
    new += [f"upsample.to_image_{fine}"] if pools else []
    assert fresh == new
    untouched = small(stride=fine, **decoder).state_dict()
    for name, value in network.state_dict().items():
        if name.rpartition(".")[0] not in new:
            assert value.equal(old[name]), name
        elif scored:  # these starts draw nothing at random
            assert value.equal(untouched[name]), name


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"pool_scales": [1.0, 0.01, 0.0001], "pooling": "max"}, ""),  # a 32s reads pool5 alone
        ({"pool_scales": [0.4, 1.0, 1.0]}, "model.pool_scales=[0.4, 1.0, 1.0]"),
        (
            {"pool_scales": [0.4, 1, 1], "pooling": "avg"},
            "model.pooling=avg model.pool_scales=[0.4, 1, 1]",
        ),
        ({"pool_scales": "x"}, ""),  # of another program
        (["x"], ""),
    ],
)
def test_a_checkpoint_of_a_network_that_computes_otherwise(
    settings: Any, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"network.{name}": value for name, value in small().state_dict().items()}
    path = save(tmp_path, {"state_dict": state, "hyper_parameters": settings})
    loaded(path, stride=8)
    wanted = [f"{path}: trained with {warning}, unlike this network"] if warning else []
    assert caplog.messages == wanted


@pytest.mark.parametrize(("scale", "warned"), [(0.1, True), (1.0, False)])
def test_a_checkpoint_of_an_fcn4s_with_another_scale_of_pool3(
    scale: float, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"network.{name}": value for name, value in small(stride=4).state_dict().items()}
    settings = {"pool_scales": [1.0, 1.0, scale]}
    loaded(save(tmp_path, {"state_dict": state, "hyper_parameters": settings}), stride=4)
    assert [f"model.pool_scales=[1.0, 1.0, {scale}]" in text for text in caplog.messages] == (
        [True] if warned else []
    )


def test_a_checkpoint_of_another_alignment(tmp_path: Path) -> None:
    state = {f"network.{name}": value for name, value in small().state_dict().items()}
    path = save(tmp_path, {"state_dict": state, "hyper_parameters": {"alignment": "caffe"}})
    with pytest.raises(WeightsError, match=r"trained with model\.alignment=caffe, not centered"):
        loaded(path)


# ---- misfits

VGG = vgg_state() | classifier(kernel=1)
DEEP = {"deep_skips": True}
FCN_32S, FCN_16S, FCN_8S = (small(stride=stride).state_dict() for stride in (32, 16, 8))
ONE, INF = torch.zeros(1), torch.full((8,), torch.inf)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (without(VGG, "features.8.weight"), {}, r"missing: features.8.weight\."),
        (VGG | {"features.1.running_mean": ONE}, {}, r"unexpected: features.1.running_mean\."),
        (FCN_32S, {"num_classes": 7}, r"shape: score.weight \(5, 8, 1, 1\), not \(7, 8, 1, 1\)"),
        (FCN_8S, {"stride": 16}, r"missing: .*to_image_16.*unexpected: skips.pool3.*to_image_8"),
        (
            FCN_16S,
            {"stride": 16, "fusion": "feature"},
            "unexpected: skips.pool4.*shape: .*to_pool4",
        ),
        (
            FCN_16S,
            {"stride": 16} | DEEP,
            r"skips.pool4.weight \(5, 16, 1, 1\), not \(5, 32, 1, 1\)",
        ),
        (FCN_16S, {"stride": 8, "skip_kernel": 3}, r" skip_kernel=3\. .*not \(5, 16, 3, 3\)"),
        # A coarser one in a finer one, but with a layer too few, half a layer, or an odd one.
        (without(FCN_16S, "upsample.to_pool4"), {"stride": 8}, "missing: upsample.to_pool4.weight"),
        (FCN_32S | {"skips.pool4.weight": ONE}, {"stride": 16}, "missing: skips.pool4.bias"),
        (FCN_16S | {"upsample.to_image_x.weight": ONE}, {"stride": 16}, "unexpected: .*to_image_x"),
        (
            without(FCN_32S, "conv7.b") | {"conv6.bias": INF},
            {},
            "missing: conv7.bias; NaN or Inf: conv6.bias",
        ),
        ({"conv1.weight": ONE}, {}, "missing: stages.0.0.weight.*unexpected: conv1.weight"),
    ],
)
def test_misfit_lists_layers_and_leaves_the_network_alone(
    state: State, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network = small(**options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = save(tmp_path, state)
    with pytest.raises(WeightsError, match=f"{re.escape(path)} does not fit .*{message}"):
        load_weights(network, path)
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


# ---- files that are no weights, or hostile


class Hostile:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("was_here",)


@pytest.mark.parametrize(
    ("name", "content"),  # None: the end is missing
    [
        ("x.pth", b""),
        ("x.ckpt", None),
        ("x.safetensors", None),
        ("x.pth", pickle.dumps(Hostile(), protocol=2)),
    ],
)
def test_damaged_or_hostile_file(
    name: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(save(tmp_path, {"a": torch.zeros(100)}, name))
    monkeypatch.chdir(path.parent)
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    with pytest.raises(WeightsError, match=r"cannot be read: .") as caught:
        loaded(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to switch it off
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_no_state_dict(tmp_path: Path) -> None:
    for content in (
        {"model": {"features.0.weight": torch.zeros(1)}},
        {"state_dict": [1, 2]},
        {"state_dict": {}},
        {"a": torch.zeros(2, 2).to_sparse()},
        [torch.zeros(1)],
    ):
        with pytest.raises(WeightsError, match="holds no state dict"):
            loaded(save(tmp_path, content))


# ---- names and downloads


def test_unknown_name_and_missing_file() -> None:
    for wrong in ("", True):
        with pytest.raises(ConfigError, match=r"^model\.weights=.*: must be a text"):
            find_weights("vgg11", wrong)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V2.*vgg16.*IMAGENET1K_V1, IMAGENET1K_FEAT"):
        find_weights("vgg16", "IMAGENET1K_V2")
    for path in ("nowhere/vgg", "vgg19.pth"):
        with pytest.raises(WeightsError, match=re.escape(f"model.weights={path}: no such file")):
            find_weights("vgg16", path)


def test_run_folder(tmp_path: Path) -> None:
    """Its best checkpoint, as for ckpt=RUN."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    last = save(folder, FCN_32S, "last.ckpt")
    with pytest.raises(WeightsError) as error:
        find_weights("vgg11", tmp_path)
    best = folder / "best.ckpt"
    assert str(error.value) == f"model.weights={best}: no such file, but there is {last}"
    save(folder, FCN_32S, "best.ckpt")
    assert find_weights("vgg11", str(tmp_path)) == best


def test_vgg_of_a_user_without_named_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def vgg_mine(weights=None, progress=True):  # type: ignore[no-untyped-def]
        """torchvision finds the weight sets of a VGG by the type of `weights`."""

    monkeypatch.setitem(BUILTIN_MODELS, "vgg_mine", vgg_mine)
    with pytest.raises(WeightsError, match=r"V1: this is neither .* for vgg_mine \(none\)"):
        find_weights("vgg_mine", "IMAGENET1K_V1")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps the weights of VGG-11 once they are downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "hub" / "checkpoints" / "vgg11-8a719046.pth"
    path.parent.mkdir(parents=True)
    return path


def test_without_network(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(WeightsError) as caught:
        loaded("IMAGENET1K_V1")
    assert str(caught.value) == (
        "cannot download https://download.pytorch.org/models/vgg11-8a719046.pth (Name or service "
        f"not known). Put the file at {cached}, or give a path: model.weights=FILE.pth, or null "
        "for a random start. `experiment=quickstart` needs no download."
    )
    assert not cached.exists()


def test_a_server_that_says_nothing(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub alone would wait for ever."""
    monkeypatch.setattr("fcn.weights.TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        weights = torchvision.models.VGG11_Weights.IMAGENET1K_V1.value
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{cached.name}"
        monkeypatch.setattr(weights, "url", url)
        with pytest.raises(WeightsError, match=r"cannot download .*timed out"):
            loaded("IMAGENET1K_V1")
    assert socket.getdefaulttimeout() == before
    assert not list(cached.parent.glob("vgg*"))


def test_a_cache_that_others_have_filled(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in a folder in which no lock can be made."""
    torch.save(VGG, cached)
    monkeypatch.setattr(
        "fcn.weights.locked", MagicMock(side_effect=WriteError("a read-only folder"))
    )
    assert loaded("IMAGENET1K_V1")[0].get_parameter("conv7.bias").equal(VGG["classifier.3.bias"])
    cached.unlink()
    with pytest.raises(
        WeightsError, match=r"cannot download .*\(a read-only folder\)\. Put the file at"
    ):
        loaded("IMAGENET1K_V1")
    monkeypatch.setenv("TORCH_HOME", __file__)  # a folder that cannot be made
    with pytest.raises(WeightsError, match=r"cannot download .*model\.weights=FILE"):
        loaded("IMAGENET1K_V1")


def test_two_runs_at_once_download_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones take the file that is there; DEFAULT is torchvision's other name for it."""
    fetched: list[str] = []

    def download(url: str, file: str, *args: object, **kwargs: object) -> None:
        fetched.append(url)
        time.sleep(0.2)
        torch.save(VGG, file)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with ThreadPoolExecutor(2) as pool:
        networks = [network for network, _ in pool.map(loaded, ["IMAGENET1K_V1"] * 2)]
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]  # and no lock
    for network in (*networks, loaded("DEFAULT")[0]):
        assert network.get_parameter("conv7.bias").equal(VGG["classifier.3.bias"])
    assert len(fetched) == 1


def test_damaged_or_hostile_cache(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cached.parent)
    buffer = io.BytesIO()
    torch.save({"a": Hostile()}, buffer)
    for content in (b"", b"<html>", buffer.getvalue()[:-40], buffer.getvalue()):
        cached.write_bytes(content)
        with pytest.raises(WeightsError, match=r"cannot be read.*Delete it") as caught:
            loaded("IMAGENET1K_V1")
        assert str(cached) in str(caught.value)
    assert [*cached.parent.iterdir()] == [cached]


@pytest.mark.parametrize("by_name", [True, False])
def test_normalisation_of_the_features_weights(
    by_name: bool, cached: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG16_Weights.IMAGENET1K_FEATURES wants (image - 0.48..) * 255, and has a NaN classifier."""
    thin = [n if n == "M" else n // 32 for n in torchvision.models.vgg.cfgs["D"]]
    monkeypatch.setitem(torchvision.models.vgg.cfgs, "D", thin)  # of VGG-16
    state = vgg_state("vgg16")
    state["features.0.weight"] /= 100
    nan = {name: torch.full_like(v, torch.nan) for name, v in classifier(kernel=1).items()}
    name = "vgg16_features-amdegroot-88682ab5.pth" if by_name else "renamed.pth"
    file = cached.with_name(name)
    torch.save(state | nan, file)
    network, _ = loaded("IMAGENET1K_FEATURES" if by_name else file, backbone="vgg16")
    assert "conv6 and conv7 start at random" in caplog.text

    image = torch.rand(1, 3, 20, 20)
    preset = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    theirs = (image - mean) / std
    wanted = nn.functional.conv2d(theirs, state["features.0.weight"], state["features.0.bias"])
    ours = network.get_submodule("stages.0.0")(network.normalize(image))[..., 1:-1, 1:-1]
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
