"""The one opener of checkpoints: what it finds, reads and refuses, also of earlier versions."""

import json
import pickle
import zipfile
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file

import fcn.pickles
from fcn.checkpoint import (
    HEAD,
    SETTINGS,
    best_checkpoint,
    check_sizes,
    data_settings,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_tensors,
    write_safetensors,
)
from fcn.errors import ConfigError, WeightsError, WriteError
from fcn.evaluation.candidate import chosen_data
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.weights import find_weights

Content = dict[str, Any]
FOREIGN = "is no checkpoint of this codebase"
NOT_PLAIN = f"{FOREIGN}: its settings are not plain"
NETWORK: dict[str, Any] = {"backbone": "vgg_tiny", "stride": 16, "head_width": 8, "head_kernel": 3}
# The settings of a run of version 0.1.0 as its checkpoints hold them, with what Hydra calls.
OLD_CONFIG: Content = {
    "name": "fcn16s",
    "data": {
        "_target_": "fcn.datamodule.SegmentationDataModule",
        "batch_size": 2,
        "dataset": {"_target_": "fcn.datasets.shapes.Shapes", "_partial_": True, "size": 48},
    },
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
    "callbacks": {"half_life": 50, "panels": [{"_target_": "x"}, 1]},
}


def old_checkpoint(**changes: Any) -> Content:
    """As version 0.1.0 wrote it."""
    torch.manual_seed(0)
    network = FCN(3, **NETWORK)
    return {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "hyper_parameters": {"num_classes": 3, "weights": None, **NETWORK},
        "config": OLD_CONFIG,
        "precision": "32-true",
        "global_step": 7,
        "fresh_layers": ["score"],
        "optimizer_states": [],
        "callbacks": {},
        "loops": {},
    } | changes


def save(run: Path, name: str = "best.ckpt", **changes: Any) -> Path:
    """Writes a checkpoint of a run."""
    path = run / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    torch.save(old_checkpoint(**changes), path)
    return path


# ---- finding and reading


def test_a_run_folder_means_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "best.ckpt"
    assert find_checkpoint("a/x.safetensors") == Path("a/x.safetensors")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert find_checkpoint("~") == tmp_path / "checkpoints" / "best.ckpt"
    assert find_checkpoint("~no_user/x.ckpt") == Path("~no_user/x.ckpt")  # there is no such user


def test_a_path_that_the_system_refuses_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one in a folder of another user, or one with a name that is too long."""
    refusal = PermissionError(13, "Permission denied", "run")
    monkeypatch.setattr(Path, "stat", MagicMock(side_effect=refusal))
    with pytest.raises(WeightsError, match=r"^ckpt=run: Permission denied$"):
        find_checkpoint("run")
    with pytest.raises(WeightsError, match=r"^model\.weights=run: Permission denied$"):
        find_weights("vgg11", "run")


def test_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    """Its tensors are equal, and nothing in its settings names what could be called."""
    path = save(tmp_path)
    checkpoint, wanted = read_checkpoint(path), old_checkpoint()
    assert "_target_" not in json.dumps(checkpoint["config"])
    assert "_partial_" not in json.dumps(checkpoint["config"])
    assert checkpoint["config"]["callbacks"] == {"half_life": 50, "panels": [{"class": "x"}, 1]}
    assert data_settings(checkpoint) == {
        "batch_size": 2,
        "dataset": {"class": "fcn.datasets.shapes.Shapes", "size": 48},
    }
    for name in ("hyper_parameters", "precision", "global_step", "fresh_layers"):
        assert checkpoint[name] == wanted[name]
    module = SegmentationModule.load_from_checkpoint(path)
    assert module.fresh_layers == ["score"]
    # Lightning's own method has this argument too; "meta" stands for a GPU.
    assert SegmentationModule.load_from_checkpoint(path, map_location="meta").device.type == "meta"
    tensors = {f"network.{name}": value for name, value in read_tensors(path).items()}
    for found in (checkpoint["state_dict"], module.state_dict(), tensors):
        torch.testing.assert_close(dict(found), wanted["state_dict"], rtol=0, atol=0)


def test_safetensors_of_a_checkpoint(tmp_path: Path) -> None:
    """A folder with it takes the place of a checkpoint, and of weights to begin with.

    How a .ckpt is written: test_training_checkpoints.py.
    """
    hyper_parameters = old_checkpoint()["hyper_parameters"] | {"weights": "IMAGENET1K_V1"}
    checkpoint = read_checkpoint(save(tmp_path, hyper_parameters=hyper_parameters))
    path = tmp_path / "model.safetensors"
    write_safetensors(checkpoint, checkpoint["state_dict"], path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", path.name]
    assert find_checkpoint(tmp_path) == find_weights("vgg11", tmp_path) == path
    found = read_checkpoint(path)
    assert set(found) == {"state_dict", "fresh_layers", *SETTINGS}
    assert found["hyper_parameters"] == hyper_parameters | {"weights": None}
    for name in ("config", "precision", "global_step", "fresh_layers"):
        assert found[name] == checkpoint[name]
    torch.testing.assert_close(found["state_dict"], checkpoint["state_dict"], rtol=0, atol=0)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"fcn"}
    for about, message in ((None, FOREIGN), ({"fcn": "[[[["}, "cannot be read: .")):
        save_file({"a": torch.zeros(9)}, path, about)
        with pytest.raises(WeightsError, match=rf"model\.safetensors {message}"):
            read_checkpoint(path)
    with pytest.raises(WriteError, match="there is no folder"):
        write_safetensors(checkpoint, {}, tmp_path / "none" / "x.safetensors")


# ---- what is refused


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


def nested(times: int, inner: Any) -> Any:
    """Lists in lists, each of them in two places of the next one."""
    return nested(times - 1, [inner, inner]) if times else inner


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, f"{FOREIGN}: it has no config, global_step, hyper_parameters"),
        ([1], f"{FOREIGN}: it has no config"),
        (
            old_checkpoint(state_dict={"network.score.weight": [1]}),
            f"{FOREIGN}: its state_dict must",
        ),
        (
            old_checkpoint(state_dict={"x": torch.zeros(2, 2).to_sparse()}),
            f"{FOREIGN}: its state_dict must",
        ),
        (old_checkpoint(hyper_parameters=[1]), f"{FOREIGN}: its state_dict must"),
        ({"conv1_1.weight": torch.zeros(2, 2), "fc6.bias": 1}, FOREIGN),
        (b"", "cannot be read: ."),
        (b"hello", "cannot be read: ."),
        (b"a\nb\n", "cannot be read: not written by torch.save, or damaged"),
        # As in `test_sizes`, few bytes that ask for much: without a limit, these take hours.
        (old_checkpoint(config=nested(40, 1)), NOT_PLAIN),
        (old_checkpoint(fresh_layers=nested(40, 1)), NOT_PLAIN),
        (old_checkpoint(config=[0] * 100_001), NOT_PLAIN),
        (old_checkpoint(hyper_parameters={"head_width": torch.zeros(2)}), NOT_PLAIN),
        (old_checkpoint(config=ENDLESS), NOT_PLAIN),
    ],
)
def test_no_checkpoint_of_ours(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=rf"x\.ckpt {message}"):
        read_checkpoint(path)


def test_missing_checkpoints(tmp_path: Path) -> None:
    best = best_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match=r"^ckpt=.*x\.ckpt: no such file$"):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"t\.ckpt: no such file\. Is .* the folder of a run\?$"):
        read_checkpoint(best)
    save(tmp_path, "last.ckpt")
    with pytest.raises(WeightsError, match=r"best\.ckpt: no such file, but there is .*last\.ckpt$"):
        read_checkpoint(best)


def test_any_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    for content, why in ((data, "it is damaged, .*data/"), (data[:-100], ".")):
        path.write_bytes(content)
        for read in (read_checkpoint, read_tensors, SegmentationModule.load_from_checkpoint):
            with pytest.raises(WeightsError, match=rf"best\.ckpt cannot be read: {why}"):
                read(path)


def test_a_file_that_has_not_changed_is_summed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation opens a checkpoint of 500 MB more than once."""
    path, opened = save(tmp_path), []
    monkeypatch.setattr(fcn.pickles, "ZipFile", lambda p: opened.append(p) or zipfile.ZipFile(p))
    for _ in range(3):
        read_checkpoint(path)
    assert opened == [path]
    save(tmp_path, global_step=800)
    assert read_checkpoint(path)["global_step"] == 800
    assert opened == [path, path]


def test_sizes(tmp_path: Path) -> None:
    path = save(tmp_path)
    checkpoint = read_checkpoint(path)
    check_sizes(path, checkpoint)
    hyper, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    huge = {"network.score.bias": torch.zeros(1).expand(10**9)}
    wrong: dict[str, Content] = {
        "head_width=99": {"hyper_parameters": hyper | {"head_width": 99}},
        "num_classes=4": {"hyper_parameters": hyper | {"num_classes": 4}},
        "head_width=4096, head_kernel=7": {"hyper_parameters": {}},  # nothing said: the widest
        r"its weights claim 4,000,.* bytes, more than": {"state_dict": state | huge},
        "holds no weights of an FCN": {"state_dict": {}},
    }
    for message, change in wrong.items():
        with pytest.raises(WeightsError, match=rf"best\.ckpt.*{message}"):
            check_sizes(path, checkpoint | change)
    assert {name: signature(FCN).parameters[name].default for name in HEAD} == HEAD


def test_a_checkpoint_without_data_settings(tmp_path: Path) -> None:
    for config in ({}, None, {"data": {"dataset": "voc2012"}}, [1]):
        path = save(tmp_path, config=config)
        checkpoint = read_checkpoint(path)
        assert data_settings(checkpoint) is None
        with pytest.raises(WeightsError, match=r"best\.ckpt has no data settings; choose the data"):
            chosen_data(OmegaConf.create({"data": {}}), path, checkpoint)


def write_pickle(path: Path, pickled: bytes, **options: Any) -> Path:
    """A file as torch.save writes it, with this in place of its own pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in parts.items():
            file.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("module", [b"builtins", b"__builtin__"])  # torch takes them for the same
def test_a_bytearray_is_refused_before_it_is_made(tmp_path: Path, module: bytes) -> None:
    pickled = b"\x80\x02c" + module + b"\nbytearray\nJ\x00\x00\x00\x01\x85R."  # of 16 MB
    old = tmp_path / "old.pth"
    magic, version, system = torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (magic, version, system))
    old.write_bytes(head + pickled + pickle.dumps([], protocol=2))  # no tensors
    for path in (write_pickle(tmp_path / "x.ckpt", pickled), old):
        assert path.stat().st_size < 1000
        assert len(torch.load(path, weights_only=True)) == 2**24  # which torch makes
        for read in (read_checkpoint, read_tensors):
            with pytest.raises(WeightsError, match=rf"{path.name} cannot be read: .* a bytearray"):
                read(path)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    text = b"\x80\x02X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"."
    path = write_pickle(tmp_path / "x.ckpt", text, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 5000
    with pytest.raises(WeightsError, match=r"x\.ckpt cannot be read: it is compressed"):
        read_checkpoint(path)


# ---- the newest of a run


def test_newest_checkpoint(tmp_path: Path) -> None:
    """Damaged ones, and those of other networks: test_reliability.py."""
    weights = old_checkpoint()["state_dict"]
    with pytest.raises(ConfigError, match=r"^resume=.*: there is no checkpoint in it$"):
        newest_checkpoint(tmp_path, weights)
    save(tmp_path, "best.ckpt", global_step=9)
    last = save(tmp_path, "last.ckpt", global_step=9)
    assert newest_checkpoint(tmp_path, weights) == (last, 9, [])  # it knows if a validation is due
    best = save(tmp_path, "best.ckpt", global_step=10)
    assert newest_checkpoint(tmp_path, weights) == (best, 10, [])
