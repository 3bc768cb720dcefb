"""The one opener of checkpoints: what it finds, reads and refuses, also of earlier versions."""

import errno
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import fcn.pickles
from fcn.checkpoint import (
    HEAD,
    SETTINGS,
    best_checkpoint,
    check_sizes,
    data_settings,
    find_checkpoint,
    last_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_tensors,
    without_targets,
    write_checkpoint,
    write_safetensors,
)
from fcn.errors import ConfigError, WeightsError, WriteError
from fcn.module import SegmentationModule
from fcn.network import FCN

Content = dict[str, Any]
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


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint of a run in `tmp_path`."""

    def _save(name: str = "best.ckpt", **changes: Any) -> Path:
        path = tmp_path / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(old_checkpoint(**changes), path)
        return path

    return _save


# ---- finding and reading


def test_a_run_folder_means_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_checkpoint(tmp_path) == best_checkpoint(tmp_path)
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "best.ckpt"
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "last.ckpt"
    assert find_checkpoint("a/x.safetensors") == Path("a/x.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_checkpoint("~") == best_checkpoint(tmp_path)


def test_checkpoint_of_an_earlier_version(save: Callable[..., Path], tmp_path: Path) -> None:
    """Its tensors are equal, and nothing in its settings names what could be called."""
    path = save()
    checkpoint, wanted = read_checkpoint(path), old_checkpoint()
    assert "_target_" not in json.dumps(checkpoint["config"])
    assert "_partial_" not in json.dumps(checkpoint["config"])
    assert checkpoint["config"]["callbacks"] == {"half_life": 50, "panels": [{"class": "x"}, 1]}
    assert data_settings(path, checkpoint) == {
        "batch_size": 2,
        "dataset": {"class": "fcn.datasets.shapes.Shapes", "size": 48},
    }
    for name in ("hyper_parameters", "precision", "global_step", "fresh_layers"):
        assert checkpoint[name] == wanted[name]
    module = SegmentationModule.load_from_checkpoint(path)
    assert module.fresh_layers == ["score"]
    tensors = read_tensors(path)
    for name, value in wanted["state_dict"].items():
        assert checkpoint["state_dict"][name].equal(value)
        assert module.state_dict()[name].equal(value)
        assert tensors[name.removeprefix("network.")].equal(value)


def test_settings_without_targets() -> None:
    config = {"a": [{"_target_": "os.mkdir", "_partial_": True}, 1], "class": 2, "b": (None, "c")}
    expected = {"a": [{"class": "os.mkdir"}, 1], "class": 2, "b": [None, "c"]}
    assert without_targets(config) == expected
    assert without_targets(expected) == expected


def test_safetensors_of_a_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    hyper_parameters = old_checkpoint()["hyper_parameters"] | {"weights": "IMAGENET1K_V1"}
    checkpoint = read_checkpoint(save(hyper_parameters=hyper_parameters))
    path = tmp_path / "x.safetensors"
    write_safetensors(checkpoint, checkpoint["state_dict"], path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "x.safetensors"]
    found = read_checkpoint(path)
    assert set(found) == {"state_dict", "fresh_layers", *SETTINGS}
    assert found["hyper_parameters"] == hyper_parameters | {"weights": None}
    for name in ("config", "precision", "global_step", "fresh_layers"):
        assert found[name] == checkpoint[name]
    for name, value in checkpoint["state_dict"].items():
        assert found["state_dict"][name].equal(value)
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"fcn"}
    with pytest.raises(WriteError, match="there is no folder"):
        write_safetensors(checkpoint, {}, tmp_path / "none" / "x.safetensors")


def test_writing_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, checkpoint = tmp_path / "x.ckpt", old_checkpoint()
    write_checkpoint(checkpoint, path)
    assert read_checkpoint(path)["global_step"] == 7
    with pytest.raises(WriteError, match=r"x\.ckpt cannot be written: .* no folder .*none$"):
        write_checkpoint(checkpoint, tmp_path / "none" / "x.ckpt")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def save(content: object, file: Any) -> None:
        """As torch does where its file raises an error."""
        try:
            full()
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", save)
    size = f"{sum(t.nbytes for t in checkpoint['state_dict'].values()) / 1e6:.1f}"
    message = rf"^{path} cannot be written: No space left on device; it needs {size} MB, .* free"
    with pytest.raises(WriteError, match=message):
        write_checkpoint(checkpoint, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["global_step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


# ---- what is refused


def test_no_checkpoint_of_ours(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"^ckpt=.*x\.ckpt: no such file$"):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        WeightsError, match=r"best\.ckpt: no such file\. Is .* the folder of a run\?$"
    ):
        read_checkpoint(find_checkpoint(tmp_path))
    for content in ({"state_dict": {}}, [1], torch.zeros(1)):
        torch.save(content, tmp_path / "x.ckpt")
        message = r"x\.ckpt is no checkpoint of this codebase: it has no config, global_step, hyper"
        with pytest.raises(WeightsError, match=message):
            read_checkpoint(tmp_path / "x.ckpt")
    for wrong in ({"state_dict": {"network.score.weight": [1]}}, {"hyper_parameters": [1]}):
        torch.save(old_checkpoint() | wrong, tmp_path / "x.ckpt")
        with pytest.raises(WeightsError, match=r"x\.ckpt is no checkpoint of this codebase$"):
            read_checkpoint(tmp_path / "x.ckpt")
    for text in (b"", b"hello"):
        (tmp_path / "x.ckpt").write_bytes(text)
        with pytest.raises(WeightsError, match=r"x\.ckpt cannot be read: "):
            read_checkpoint(tmp_path / "x.ckpt")


def test_any_changed_bit_is_noticed(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save()
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda info: info.file_size)
        start = entry.header_offset + 30 + len(entry.filename)
    data = bytearray(path.read_bytes())
    data[start + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    for read in (read_checkpoint, read_tensors, SegmentationModule.load_from_checkpoint):
        with pytest.raises(
            WeightsError, match=r"best\.ckpt cannot be read: it is damaged, .*data/"
        ):
            read(path)
    path.write_bytes(data[:-100])
    with pytest.raises(WeightsError, match=r"best\.ckpt cannot be read: "):
        read_checkpoint(path)


def test_a_file_that_has_not_changed_is_summed_once(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation opens a checkpoint of 500 MB more than once."""
    path, opened = save(), []
    monkeypatch.setattr(fcn.pickles, "ZipFile", lambda p: opened.append(p) or zipfile.ZipFile(p))
    for _ in range(3):
        read_checkpoint(path)
    assert opened == [path]
    save(global_step=800)
    assert read_checkpoint(path)["global_step"] == 800
    assert opened == [path, path]


def test_sizes(save: Callable[..., Path]) -> None:
    path = save()
    checkpoint = read_checkpoint(path)
    check_sizes(path, checkpoint)
    hyper, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    huge = {"network.score.bias": torch.zeros(1).expand(10**9)}
    wrong: dict[str, Content] = {
        "head_width=99": {"hyper_parameters": hyper | {"head_width": 99}},
        "num_classes=4": {"hyper_parameters": hyper | {"num_classes": 4}},
        r"of 4,000,.* bytes in a smaller file": {"state_dict": state | huge},
        "holds no weights of an FCN": {"state_dict": {}},
    }
    for message, change in wrong.items():
        with pytest.raises(WeightsError, match=rf"best\.ckpt.*{message}"):
            check_sizes(path, checkpoint | change)


def test_a_checkpoint_without_data_settings(save: Callable[..., Path]) -> None:
    for config in ({}, None, {"data": {"dataset": "voc2012"}}, [1]):
        path = save(config=config)
        with pytest.raises(WeightsError, match=r"best\.ckpt has no data settings; choose the data"):
            data_settings(path, read_checkpoint(path))


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


def test_settings_that_do_not_end(save: Callable[..., Path]) -> None:
    """As `test_sizes`: few bytes that ask for much, here time. Without a limit this takes hours."""
    itself: list[Any] = []
    itself.append(itself)
    doubled: list[Any] = [1]
    for _ in range(40):
        doubled = [doubled, doubled]
    hyper = old_checkpoint()["hyper_parameters"]
    for change in (
        {"config": {"a": itself}},
        {"config": {"a": doubled}},
        {"config": {"a": [0] * 100_001}},
        {"fresh_layers": doubled},
        {"hyper_parameters": hyper | {"stride": doubled}},
        {"hyper_parameters": hyper | {"head_width": torch.zeros(2)}},
        {"precision": doubled},
    ):
        with pytest.raises(WeightsError, match=r"best\.ckpt .* its settings are not plain"):
            read_checkpoint(save(**change))


def test_sparse_tensors_and_tables_of_other_things(save: Callable[..., Path]) -> None:
    sparse = {"network.x.weight": torch.zeros(2, 2).to_sparse()}
    path = save(state_dict=old_checkpoint()["state_dict"] | sparse)
    with pytest.raises(WeightsError, match=r"best\.ckpt is no checkpoint of this codebase$"):
        SegmentationModule.load_from_checkpoint(path)
    with pytest.raises(WeightsError, match=r"best\.ckpt holds no state dict"):
        read_tensors(path)
    torch.save({"conv1_1.weight": torch.zeros(2, 2), "fc6.bias": 1}, path)
    with pytest.raises(WeightsError, match=r"best\.ckpt is no checkpoint of this codebase"):
        read_checkpoint(path)


def test_settings_that_say_nothing_of_the_head_mean_the_widest(save: Callable[..., Path]) -> None:
    defaults = signature(FCN).parameters
    assert {name: defaults[name].default for name in HEAD} == HEAD
    for name, size in HEAD.items():
        settings = {k: v for k, v in old_checkpoint()["hyper_parameters"].items() if k != name}
        path = save(hyper_parameters=settings)
        with pytest.raises(WeightsError, match=rf"not what its settings say: {name}={size}$"):
            SegmentationModule.load_from_checkpoint(path)


# ---- the newest of a run


def test_newest_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    weights = old_checkpoint()["state_dict"]
    with pytest.raises(ConfigError, match=r"^resume=.*: there is no checkpoint in it$"):
        newest_checkpoint(tmp_path, weights)
    best, last = save("best.ckpt", global_step=9), save("last.ckpt", global_step=9)
    assert newest_checkpoint(tmp_path, weights) == (last, 9, [])  # it knows if a validation is due
    best = save("best.ckpt", global_step=10)
    assert newest_checkpoint(tmp_path, weights) == (best, 10, [])
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(WeightsError, match=r"best\.ckpt: no such file, only .*last\.ckpt$"):
        best.rename(tmp_path / "x"), read_checkpoint(best)
    (tmp_path / "x").rename(best)
    found, step, wrong = newest_checkpoint(tmp_path, weights)
    assert (found, step) == (best, 10)
    assert len(wrong) == 1
    assert "last.ckpt cannot be read" in wrong[0]


def test_checkpoints_that_a_run_cannot_go_on_from(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    weights = old_checkpoint()["state_dict"]
    without = {
        name: v for name, v in old_checkpoint().items() if name not in ("loops", "callbacks")
    }
    torch.save(without, save("last.ckpt"))
    shutil.copy(save("best.ckpt", state_dict={"network.score.weight": torch.zeros(1)}), tmp_path)
    with pytest.raises(ConfigError) as caught:
        newest_checkpoint(tmp_path, weights)
    message = str(caught.value)
    assert message.startswith(f"resume={tmp_path}: ")
    assert "last.ckpt is no checkpoint to go on from: no callbacks, loops" in message
    assert "best.ckpt holds another network than this run's" in message
