"""Every way into a network's weights, and every misfit: loaded, warned about, or refused."""

import io
import logging
import os
import pickle
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from fcn.errors import ConfigError, WeightsError
from fcn.network import FCN
from fcn.weights import find_weights, fold_normalization, load_weights

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def vgg_state(backbone: str = "vgg_tiny", thinner: int = 1) -> State:
    """Random features with torchvision's names, as wide as that VGG or so many times thinner."""
    with torch.device("meta"):
        features = torchvision.models.get_model(backbone).features
    state = {}
    for name, value in features.state_dict().items():
        first = name == "0.weight"  # (C, 3, 3, 3)
        shape = [max(1, n // thinner) for n in value.shape[:2]] + list(value.shape[2:])
        state[f"features.{name}"] = torch.randn(shape[0], 3, 3, 3) if first else torch.randn(shape)
    return {name: value * 0.05 for name, value in state.items()}


def classifier(width: int = 8, kernel: int = 7) -> State:
    """Random linear layers as torchvision has them, but narrow."""
    return {
        "classifier.0.weight": torch.randn(width, 16 * kernel**2),
        "classifier.0.bias": torch.randn(width),
        "classifier.3.weight": torch.randn(width, width),
        "classifier.3.bias": torch.randn(width),
        "classifier.6.weight": torch.randn(10, width),
        "classifier.6.bias": torch.randn(10),
    }


def small(**changes: Any) -> FCN:
    options: dict[str, Any] = {"num_classes": 5, "stride": 32, "backbone": "vgg_tiny"}
    return FCN(**options | {"head_width": 8} | changes)


def loaded(source: str | Path, **changes: Any) -> tuple[FCN, list[str]]:
    """A network with these weights, and the layers that keep their fresh start."""
    network = small(**changes)
    return network, load_weights(network, source)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Writes weights to a file."""

    def _save(content: Any, name: str = "weights.pth") -> str:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(content, path)
        else:
            torch.save(content, path)
        return str(path)

    return _save


def checkpoint(network: FCN) -> dict[str, object]:
    """As Lightning writes ours."""
    return {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "hyper_parameters": {"stride": network.stride, "weights": None},
        "epoch": 0,
        "global_step": 7,
    }


def randomised(**options: Any) -> FCN:
    network = small(**options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


# ---- torchvision's names


@pytest.mark.parametrize("name", ["weights.pth", "float16.pth", "weights.safetensors"])
def test_torchvision_file(name: str, save: Callable, caplog: pytest.LogCaptureFixture) -> None:
    state = vgg_state() | classifier()
    if name == "float16.pth":
        state = {layer: value.half() for layer, value in state.items()}
    network, fresh = loaded(save(state, name))
    assert caplog.records == []
    state = {layer: value.float() for layer, value in state.items()}
    features = [n for n in state if n.startswith("features.")]
    ours = [n for n in network.state_dict() if n.startswith("stages.")]
    assert len(features) == len(ours) == 16
    for theirs, own in zip(features, ours, strict=True):
        assert network.state_dict()[own].equal(state[theirs])
    assert network.conv6.weight.equal(state["classifier.0.weight"].view(8, 16, 7, 7))
    assert network.get_parameter("conv6.bias").equal(state["classifier.0.bias"])
    assert network.conv7.weight.equal(state["classifier.3.weight"].view(8, 8, 1, 1))
    assert network.get_parameter("conv7.bias").equal(state["classifier.3.bias"])
    assert fresh == ["score", "upsample.to_image_32"]
    assert network.score.weight.eq(0).all()


def without(state: State, prefix: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


def with_nan(state: State, name: str) -> State:
    state[name].view(-1)[3] = torch.nan
    return state


@pytest.mark.parametrize(
    ("part", "options", "random", "why"),
    [
        ({}, {}, ["conv6", "conv7"], "no classifier.0, no classifier.3"),
        (classifier(16), {}, ["conv6", "conv7"], "0 is (16, 784), conv6 (8, 16, 7, 7)"),
        (classifier(), {"head_kernel": 3}, ["conv6"], "classifier.0 is (8, 784)"),
        (with_nan(classifier(), "classifier.0.weight"), {}, ["conv6"], "0 is not finite"),
        (with_nan(classifier(), "classifier.3.bias"), {}, ["conv7"], "3 is not finite"),
        (without(classifier(), "classifier.3"), {}, ["conv7"], "no classifier.3"),
    ],
)  # fmt: skip
def test_one_warning_names_the_layers_that_start_at_random(
    part: State,
    options: dict[str, object],
    random: list[str],
    why: str,
    save: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = save(vgg_state() | part)
    network, fresh = loaded(path, **options)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    message = caplog.messages[0]
    subject = message.removeprefix(f"{path}: ").split(" (")[0]
    verb = "start" if len(random) > 1 else "starts"
    assert subject == f"{' and '.join(random)} {verb} at random"
    assert why in message
    assert fresh == [*random, "score", "upsample.to_image_32"]
    assert all(p.isfinite().all() for p in network.parameters())
    for layer, linear in (("conv6", "classifier.0"), ("conv7", "classifier.3")):
        if layer not in random:
            weight = network.get_parameter(f"{layer}.weight")
            assert weight.flatten().equal(part[f"{linear}.weight"].flatten())


def test_real_features(caplog: pytest.LogCaptureFixture) -> None:
    path = Path(__file__).resolve().parents[2] / "shared" / "weights" / "vgg19_features_fp16.pth"
    if not path.is_file():
        pytest.skip(f"real VGG-19 features not found at {path}")
    network, _ = loaded(path, backbone="vgg19", head_kernel=1)
    state = torch.load(path, weights_only=True)
    convolutions = [m for m in network.stages.modules() if isinstance(m, nn.Conv2d)]
    kernels = [name for name in state if name.endswith("weight")]
    assert len(convolutions) == len(kernels) == 16
    for layer, name in zip(convolutions, kernels, strict=True):
        assert layer.weight.equal(state[name].float())
        assert layer.bias is not None
        assert layer.bias.equal(state[name.replace("weight", "bias")].float())
    assert len(caplog.records) == 1
    assert "conv6 and conv7 start at random" in caplog.text


# ---- our own checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["score", "feature"])
@pytest.mark.parametrize(
    ("coarse", "fine", "pools"),
    [
        (32, 16, ["pool4"]),
        (16, 8, ["pool3"]),
        (32, 8, ["pool4", "pool3"]),
        (32, 32, []),
        (16, 16, []),
        (8, 8, []),
    ],
)
def test_coarser_checkpoint_starts_finer(
    fusion: str, coarse: int, fine: int, pools: list[str], save: Callable
) -> None:
    source = randomised(stride=coarse, fusion=fusion, head_kernel=1)
    path = save(checkpoint(source), "last.ckpt")
    network, fresh = loaded(path, stride=fine, fusion=fusion, head_kernel=1)
    new = [f"skips.{pool}" for pool in pools] if fusion == "score" else []
    new += [f"upsample.to_{pool}" for pool in pools]
    new += [f"upsample.to_image_{fine}"] if pools else []
    assert fresh == new
    old, untouched = source.state_dict(), small(stride=fine, fusion=fusion).state_dict()
    for name, value in network.state_dict().items():
        if name.rpartition(".")[0] not in new:
            assert value.equal(old[name]), name
        elif fusion == "score":  # these starts draw nothing at random
            assert value.equal(untouched[name]), name


def test_finer_start_predicts_at_once_what_the_coarser_did(save: Callable) -> None:
    """Skips start at zero and upsampling bilinear, so FCN-8s starts as a smoothed FCN-32s."""
    source = randomised(head_kernel=1).eval()
    for name, value in small(head_kernel=1).upsample.state_dict().items():
        source.upsample.load_state_dict({name: value})
    finer = loaded(save(checkpoint(source)), stride=8, head_kernel=1)[0].eval()
    image = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        coarse, fine = source(image), finer(image)
    assert coarse.std() > 0
    inside = (..., slice(32, 64), slice(32, 64))
    assert (coarse - fine)[inside].abs().mean() < 0.25 * coarse[inside].std()


# ---- misfits


def from_checkpoint(**options: object) -> Callable[[], object]:
    return lambda: checkpoint(small(head_kernel=1, **options))


def edited(change: Callable[[State], object], **options: object) -> Callable[[], object]:
    def make() -> object:
        state = small(head_kernel=1, **options).state_dict()
        change(state)
        return state

    return make


def vgg_edited(change: Callable[[State], object]) -> Callable[[], object]:
    def make() -> object:
        state = vgg_state() | classifier(kernel=1)
        change(state)
        return state

    return make


MISFITS: dict[str, tuple[Callable[[], object], dict[str, object], list[str]]] = {
    "vgg16 in vgg19": (
        lambda: vgg_state("vgg16", 16),
        {"backbone": "vgg19"},
        ["missing: features.16.weight", "features.34.bias", "unexpected: features.17.weight"],
    ),
    "missing feature": (
        vgg_edited(lambda s: s.pop("features.8.weight")), {}, ["missing: features.8.weight"],
    ),
    "batch norm": (
        vgg_edited(lambda s: s.update({"features.1.running_mean": torch.zeros(1)})),
        {},
        ["unexpected: features.1.running_mean"],
    ),
    "feature of wrong shape": (
        vgg_edited(lambda s: s.update({"features.0.weight": torch.zeros(4, 1, 3, 3)})),
        {},
        ["wrong shape: features.0.weight (4, 1, 3, 3), not (4, 3, 3, 3)"],
    ),
    "other number of classes": (
        from_checkpoint(num_classes=7), {}, ["score.weight (7, 8, 1, 1), not (5, 8, 1, 1)"],
    ),
    "finer in coarser": (
        from_checkpoint(stride=8),
        {"stride": 16},
        ["missing: upsample.to_image_16", "skips.pool3.weight", "upsample.to_image_8.weight"],
    ),
    "score in feature": (
        from_checkpoint(stride=16),
        {"stride": 16, "fusion": "feature"},
        ["unexpected: skips.pool4.weight", "to_pool4.weight (5, 5, 4, 4), not (5, 16, 4, 4)"],
    ),
    "old layer missing at all in coarser": (
        edited(lambda s: [s.pop("upsample.to_pool4.weight")], stride=16),
        {"stride": 8},
        ["missing: upsample.to_pool4.weight"],
    ),
    "half of a new layer": (
        edited(lambda s: s.update({"skips.pool4.weight": torch.zeros(5, 16, 1, 1)})),
        {"stride": 16},
        ["missing: skips.pool4.bias"],
    ),
    "odd stride": (
        edited(lambda s: s.update({"upsample.to_image_x.weight": torch.zeros(1)})),
        {"stride": 16},
        ["unexpected: upsample.to_image_x.weight. "],
    ),
    "Inf": (
        edited(lambda s: s["conv7.weight"].fill_(torch.inf)), {}, ["NaN or Inf: conv7.weight"],
    ),
    "several at once": (
        edited(lambda s: (s.pop("conv7.bias"), s["conv6.bias"].fill_(torch.nan))),
        {},
        ["missing: conv7.bias", "NaN or Inf: conv6.bias"],
    ),
    "another network": (
        lambda: {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)},
        {},
        ["missing: stages.0.0.weight", "unexpected: conv1.weight, fc.bias"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_misfit_lists_layers_and_leaves_the_network_alone(
    case: str, save: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    make, options, named = MISFITS[case]
    network = small(head_kernel=1, **options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = save(make())
    with pytest.raises(WeightsError) as caught:
        load_weights(network, path)
    for part in [path, *named]:
        assert part in str(caught.value)
    for name, value in network.state_dict().items():
        assert value.equal(before[name]), name
    assert caplog.records == []  # nothing was loaded


# ---- files that are no weights, or hostile


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, save: Callable) -> None:
    target = tmp_path / "was_here"
    path = save(vgg_state() | {"features.99.weight": Hostile(target)})
    with pytest.raises(WeightsError, match=r"holds posix\.mkdir.*could run code"):
        loaded(path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Hostile(target), protocol=2))
    with pytest.raises(WeightsError, match="cannot be read"):
        loaded(plain)
    assert not target.exists()
    torch.load(path, weights_only=False)  # it is hostile indeed
    assert target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("damage", [b"", None, b"hello"])
def test_damaged_file(suffix: str, damage: bytes | None, save: Callable) -> None:
    path = Path(save({"a": torch.zeros(100)}, f"weights{suffix}"))
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    with pytest.raises(WeightsError, match=r"cannot be read: .") as caught:
        loaded(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to switch it off
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"features.0.weight": torch.zeros(1)}},
        {"state_dict": [1, 2]},
        [torch.zeros(1)],
        {},
        {"state_dict": {}},
    ],
)
def test_no_state_dict(content: object, save: Callable) -> None:
    with pytest.raises(WeightsError, match="holds no state dict"):
        loaded(save(content))


def test_old_format_of_torch_save(tmp_path: Path) -> None:
    """torchvision's VGG files are of this kind."""
    state = vgg_state() | classifier(kernel=1)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network, _ = loaded(tmp_path / "old.pth", head_kernel=1)
    assert network.get_parameter("conv7.bias").equal(state["classifier.3.bias"])


# ---- names and downloads


def test_unknown_name_and_missing_file() -> None:
    for wrong in ("", True):
        with pytest.raises(ConfigError, match=r"^model\.weights=.*: must be a text"):
            find_weights("vgg11", wrong)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V2.*vgg11.*IMAGENET1K_V1"):
        find_weights("vgg11", "IMAGENET1K_V2")
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1, IMAGENET1K_FEATURES"):
        find_weights("vgg16", "imagenet")
    for path in ("nowhere/vgg", "vgg19.pth", "runs/a/checkpoints/best.ckpt"):
        with pytest.raises(WeightsError, match=re.escape(f"model.weights={path}: no such file")):
            loaded(path)


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_without_network(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(WeightsError) as caught:
        loaded("IMAGENET1K_V1")
    message = str(caught.value)
    file = torch_home / "vgg11-8a719046.pth"
    assert "https://download.pytorch.org/models/vgg11-8a719046.pth" in message
    assert f"Put the file at {file}" in message
    assert "Name or service not known" in message
    assert "model.weights=FILE.pth" in message
    assert "experiment=quickstart" in message
    assert not file.exists()


def test_a_server_that_says_nothing(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub alone would wait for ever."""
    monkeypatch.setattr("fcn.weights.TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            torchvision.models.VGG11_Weights.IMAGENET1K_V1.value,
            "url",
            f"http://127.0.0.1:{silent.getsockname()[1]}/vgg11-8a719046.pth",
        )
        with pytest.raises(WeightsError, match=r"cannot download .*timed out"):
            loaded("IMAGENET1K_V1")
    assert socket.getdefaulttimeout() == before
    assert not list(torch_home.glob("vgg*"))


def test_two_runs_at_once_download_once(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = vgg_state() | classifier(kernel=1)
    fetched: list[str] = []

    def download(url: str, file: str, *args: object, **kwargs: object) -> None:
        fetched.append(url)
        time.sleep(0.2)
        torch.save(state, file)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(loaded, "IMAGENET1K_V1", head_kernel=1) for _ in range(2)]
        networks = [run.result()[0] for run in runs]
    assert len(fetched) == 1
    assert [path.name for path in torch_home.iterdir()] == ["vgg11-8a719046.pth"]  # and no lock
    for network in networks:
        assert network.get_parameter("conv7.bias").equal(state["classifier.3.bias"])


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_name_takes_the_cached_file(name: str, torch_home: Path) -> None:
    state = vgg_state() | classifier(kernel=1)
    torch.save(state, torch_home / "vgg11-8a719046.pth")
    network, _ = loaded(name, head_kernel=1)
    assert network.get_parameter("conv7.bias").equal(state["classifier.3.bias"])


def test_damaged_or_hostile_cache(torch_home: Path, tmp_path: Path) -> None:
    file = torch_home / "vgg11-8a719046.pth"
    buffer = io.BytesIO()
    torch.save({"a": Hostile(tmp_path / "was_here")}, buffer)
    for content in (b"", b"<html>", buffer.getvalue()[:-40], buffer.getvalue()):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=r"cannot be read.*Delete it") as caught:
            loaded("IMAGENET1K_V1", head_kernel=1)
        assert str(file) in str(caught.value)
    assert not (tmp_path / "was_here").exists()


def test_normalisation_of_the_features_weights(
    torch_home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG16_Weights.IMAGENET1K_FEATURES wants (image - 0.48..) * 255, and has a NaN classifier."""
    thin = [n if n == "M" else n // 32 for n in torchvision.models.vgg.cfgs["D"]]
    monkeypatch.setitem(torchvision.models.vgg.cfgs, "D", thin)  # of VGG-16
    state = vgg_state("vgg16")
    state["features.0.weight"] /= 100
    nan = {name: torch.full_like(v, torch.nan) for name, v in classifier(kernel=1).items()}
    torch.save(state | nan, torch_home / "vgg16_features-amdegroot-88682ab5.pth")
    network, _ = loaded("IMAGENET1K_FEATURES", backbone="vgg16", head_kernel=1)
    assert "conv6 and conv7 start at random" in caplog.text

    image = torch.rand(1, 3, 20, 20)
    preset = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES.transforms()
    theirs = (image - torch.tensor(preset.mean).view(3, 1, 1)) / torch.tensor(preset.std).view(
        3, 1, 1
    )
    wanted = nn.functional.conv2d(theirs, state["features.0.weight"], state["features.0.bias"])
    ours = network.get_submodule("stages.0.0")(network.normalize(image))[..., 1:-1, 1:-1]
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)

    usual = torchvision.models.VGG16_Weights.IMAGENET1K_V1.transforms()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fold_normalization(network, usual.mean, usual.std)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
