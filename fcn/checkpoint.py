"""Reads and writes checkpoints and other files of weights. Nothing else does, except that Lightning
opens a checkpoint again when it resumes a run, and torchvision reads its own downloads.

    read_checkpoint(find_checkpoint("runs/fcn8s/2026-01-31_12-00-00"))      # best.ckpt of that run
    read_checkpoint(find_checkpoint("export/best"))                  # what export.py made of one
    read_checkpoint(Path("fcn8s_from_caffe.pth"))                # the authors' own nets, see below
    read_tensors(Path("vgg19.pth"))                              # any table of tensors by name
    write_checkpoint(checkpoint, Path("last.ckpt"))              # complete, or as it was before

Such files may come from anybody. So nothing in them is run: only tensors and plain values are read,
every byte of a .ckpt is compared with the checksums that it holds, and neither its tensors nor its
settings nor a bytearray in it can ask for much more memory than it has bytes.

A checkpoint is a dict with at least these entries:
    state_dict        tensors, under `network.…`
    hyper_parameters  the arguments of `SegmentationModule`
    config            the run's settings as plain values. Where the run's config.yaml has a
                      `_target_`, which Hydra calls, this has a `class`, which is only a name.
                      And `image_type`, the type of the training images (see `image_type`).
    precision         such as "bf16-mixed"
    global_step       the number of optimizer steps that were taken

The authors' Caffe nets (Long et al., CVPR 2015), as torchfcn (github.com/wkentaro/pytorch-fcn) has
converted them, are read as if they were checkpoints of ours. Their layers have other names, and
their first convolution expects BGR from 0 to 255.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fcn.datasets.value_range import FULL_RANGE
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, WeightsError, check_text, reason
from fcn.files import atomic_write, create_folder, expanded
from fcn.pickles import brief, check_pickles, check_written
from fcn.vgg import STD

StateDict = dict[str, Tensor]
SETTINGS = ("hyper_parameters", "config", "precision", "global_step")
MODEL_FOLDER = ("model.safetensors", "config.json", "README.md")  # names that other programs know
# Limits on the settings in a file: levels of nested values, and values on one level. A value that
# is referred to twice counts twice. Otherwise a few bytes could stand for a billion values: 30
# lists, each of which holds the one before it twice.
DEEPEST, MOST_VALUES = 50, 100_000
NESTED = dict | list | tuple
HEAD = {"head_width": 4096, "head_kernel": 7}  # the defaults of `FCN`, where settings lack these
# Scales of (pool5, pool4, pool3) in the authors' voc-fcn8s-atonce, which are not in its file.
AT_ONCE = (1.0, 0.01, 0.0001)
# Names of layers in torchfcn's files, and ours. A ReLU follows each convolution of a stage, so that
# conv3_2 is the layer number 2 of the third stage. VGG-16 goes up to conv5_3, VGG-19 to conv5_4.
CAFFE_LAYERS = {
    f"conv{stage}_{number}": f"stages.{stage - 1}.{2 * (number - 1)}"
    for stage in range(1, 6)
    for number in range(1, 5)
} | {
    "fc6": "conv6",
    "fc7": "conv7",
    "score_fr": "score",
    "score_pool4": "skips.pool4",
    "score_pool3": "skips.pool3",
    "upscore2": "upsample.to_pool4",
    "upscore_pool4": "upsample.to_pool3",
    "upscore": "upsample.to_image_32",
    "upscore16": "upsample.to_image_16",
    "upscore8": "upsample.to_image_8",
}


def last_checkpoint(run: Path) -> Path:
    """The checkpoint that a run is resumed from."""
    return run / "checkpoints" / "last.ckpt"


def best_checkpoint(run: Path) -> Path:
    """The checkpoint with the highest validation mean IoU."""
    return run / "checkpoints" / "best.ckpt"


def find_checkpoint(path: str | Path, key: str = "ckpt") -> Path:
    """The best checkpoint of a run folder, or the weights in a folder that export.py wrote.

    Any other path is that of a checkpoint itself, which need not exist.

    Args:
        path: of a checkpoint or a folder.
        key: the setting that holds `path`, for messages.

    Raises:
        ConfigError: `path` is neither a path nor a text.
        WeightsError: the system refuses to look there, as in a folder of another user.
    """
    check_text(key, path, wanted="a checkpoint, or a run folder")
    path = expanded(path)
    try:
        if path.is_dir():
            exported_weights = path / MODEL_FOLDER[0]
            path = exported_weights if exported_weights.is_file() else best_checkpoint(path)
        path.stat()  # unlike is_dir and is_file, it raises an error in every version of Python
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is up to the caller to say so: `path` may be the name of something else
    except OSError as error:
        raise WeightsError(f"{key}={path}: {reason(error)}") from error
    return path


def missing_file(key: str, path: Path) -> WeightsError:
    """The error that says that there is no checkpoint at `path`, and what there is instead."""
    run, hint = path.parent.parent, ""
    if run.is_dir() and path == best_checkpoint(run):
        last = last_checkpoint(run)
        hint = f", but there is {last}" if last.is_file() else f". Is {run} the folder of a run?"
    return WeightsError(f"{key}={path}: no such file{hint}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, or one of the authors' nets as if it were one.

    Raises:
        WeightsError: there is no file, or it is broken, not ours, or could run code.
    """
    if not path.is_file():
        raise missing_file("ckpt", path)
    if path.suffix == ".pt2":
        raise WeightsError(
            f"ckpt={path}: a .pt2 is a program for other software, and torch.export.load can run "
            "code that is in it, so use it on files that you trust; give the checkpoint here"
        )
    checkpoint = _load(path)
    if is_published(checkpoint):
        return published_checkpoint(checkpoint)
    foreign = f"{path} is no checkpoint of this codebase"
    names = {"state_dict", *SETTINGS}
    missing = names.difference(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise WeightsError(f"{foreign}: it has no {', '.join(sorted(missing))}")
    settings = checkpoint["hyper_parameters"]
    if not is_state_dict(checkpoint["state_dict"]) or not isinstance(settings, dict):
        wanted = "its state_dict must be a table of tensors, and its hyper_parameters a dict"
        raise WeightsError(f"{foreign}: {wanted}")
    if not _are_plain([*map(checkpoint.get, SETTINGS), checkpoint.get("fresh_layers")]):
        limit = f"plain values, in at most {DEEPEST} levels of at most {MOST_VALUES:,}"
        raise WeightsError(f"{foreign}: its settings are not {limit}")
    return checkpoint | {"config": without_targets(checkpoint["config"])}


def read_tensors(path: Path) -> StateDict:
    """The tensors of any file of weights, under the names they have there.

    Of a checkpoint of ours, these are the network's own names, without `network.` in front.

    Raises:
        WeightsError: the file is broken, could run code, or holds no table of tensors.
    """
    return read_tensors_and_settings(path)[0]


def read_tensors_and_settings(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """What `read_tensors` gives, and the arguments of `SegmentationModule` in the file.

    These are empty for a file that is no checkpoint of ours.
    """
    content, settings = _load(path), None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        settings, content = content.get("hyper_parameters"), content["state_dict"]
    if not is_state_dict(content) or not content:
        raise WeightsError(f"{path} holds no state dict (a table of tensors by name)")
    tensors = {name.removeprefix("network."): value for name, value in content.items()}
    return tensors, settings if isinstance(settings, dict) else {}


def is_state_dict(content: Any) -> bool:
    """Whether this is a table of tensors by name, none of them sparse or nested."""
    if not isinstance(content, dict):
        return False
    named = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    return named and all(v.layout == torch.strided and not v.is_nested for v in content.values())


def _are_plain(settings: Any) -> bool:
    """Whether settings hold no tensors, and no more levels and values than those of any run."""
    level = [settings]
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, NESTED))
        level = list(islice(chain.from_iterable(inner), MOST_VALUES + 1))
        if len(level) > MOST_VALUES or any(isinstance(v, Tensor) for v in level):
            return False
    return not level


def newest_checkpoint(run: Path, weights: Mapping[str, Tensor]) -> tuple[Path, int, list[str]]:
    """The newest checkpoint of a run that is undamaged and holds the run's network.

    Args:
        run: the run folder.
        weights: what the network needs, by name; only their shapes matter.

    Returns:
        Its path, its optimizer step, and for each checkpoint that cannot be used a message that
        says why.

    Raises:
        ConfigError: there is no such checkpoint. The message says what is wrong with each file.
    """
    steps: dict[Path, int] = {}
    wrong: list[str] = []
    for path in sorted(run.glob("checkpoints/*.ckpt")):
        try:
            steps[path] = _resumable_step(path, weights)
        except WeightsError as error:
            wrong.append(str(error))
    # On a tie prefer last.ckpt: only it knows whether a validation is still due.
    newest = max(steps, key=lambda path: (steps[path], path == last_checkpoint(run)), default=None)
    if newest is None:
        raise ConfigError(f"resume={run}: " + ("; ".join(wrong) or "there is no checkpoint in it"))
    return newest, steps[newest], wrong


def _resumable_step(path: Path, weights: Mapping[str, Tensor]) -> int:
    """The optimizer step at which a checkpoint was made, if a run can go on from it.

    Raises:
        WeightsError: it is damaged, lacks the state of training, or holds another network.
    """
    checkpoint = read_checkpoint(path)
    missing = ", ".join(sorted({"optimizer_states", "callbacks", "loops"} - set(checkpoint)))
    if missing:
        raise WeightsError(f"{path} cannot be resumed from: it has no {missing}")
    shapes = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise WeightsError(f"{path} holds weights of other names or shapes than this run's network")
    return checkpoint["global_step"]


def check_sizes(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a small file whose settings ask for a huge network, before that network is built.

    Raises:
        WeightsError: the file holds no FCN, or its weights are not of the size that its settings
            or its length allow.
    """
    state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    claimed = tensor_bytes(state)
    conv6, score = (state.get(f"network.{name}.weight") for name in ("conv6", "score"))
    if conv6 is None or score is None or conv6.ndim != 4 or score.ndim != 4:
        raise WeightsError(f"{path} holds no weights of an FCN")
    held = {"head_width": conv6.shape[0], "head_kernel": conv6.shape[2]}
    held["num_classes"] = score.shape[0]
    given = {**HEAD, "num_classes": score.shape[0], **settings}
    wrong = [f"{k}={given[k]}" for k, size in held.items() if given[k] != size]
    if wrong:
        raise WeightsError(f"{path}: its weights are not what its settings say: {', '.join(wrong)}")
    if claimed > path.stat().st_size:
        raise WeightsError(f"{path}: its weights claim {claimed:,} bytes, more than the file has")


def data_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data settings of the run that made a checkpoint: `dataset` and arguments of the loaders.

    `dataset` holds the data set's `class` (`fcn.datasets.find_dataset` takes it) and its arguments.
    None: the checkpoint has no such settings, as that of a network from somebody's own code.
    """
    config = checkpoint["config"]
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("dataset"), dict):
        return None
    return {name: value for name, value in data.items() if name != "class"}


def image_type(checkpoint: Mapping[str, Any]) -> str | None:
    """The type of the images that a network was trained on: "8-bit", "16-bit" or "float".

    It is None if the images were generated, and for older checkpoints, which do not hold it.
    """
    config = checkpoint["config"]
    name = str(config.get("image_type")) if isinstance(config, dict) else ""
    return name if name in FULL_RANGE else None


def without_targets(config: Any) -> Any:
    """Settings as plain values: nothing that Hydra would call is left in them.

    What was a `_target_` becomes a `class`, which is only a name.
    """
    if isinstance(config, dict):
        return {
            "class" if key == "_target_" else key: without_targets(value)
            for key, value in config.items()
            if key != "_partial_"
        }
    return list(map(without_targets, config)) if isinstance(config, list | tuple) else config


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a .ckpt so that a kill leaves either the new file or the one before it.

    Raises:
        WriteError: `path` cannot be written, or the file could not be read again.
    """
    with atomic_write(path, size=tensor_bytes(checkpoint)) as part:
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
            check_written(part)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # such as a full disk, which torch hides
                raise error.__context__ from None
            raise


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a checkpoint. The rest of it takes only some kilobytes."""
    if isinstance(value, Tensor):
        return value.nbytes if value.layout == torch.strided else 0  # sparse ones have no nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def write_safetensors(checkpoint: Mapping[str, Any], state: StateDict, path: Path) -> None:
    """Write weights and settings of a checkpoint into a file that can hold no code.

    Args:
        checkpoint: as `read_checkpoint` gives it.
        state: the tensors to write, under the names of a checkpoint.

    Raises:
        WriteError: `path` cannot be written.
    """
    about = settings_of(checkpoint)
    tensors = {name: value.contiguous() for name, value in state.items()}
    with atomic_write(path, size=tensor_bytes(tensors)) as part:
        try:
            save_file(tensors, part, {"fcn": json.dumps(about)})
        except SafetensorError as error:  # for a full disk or a missing folder, too
            raise OSError(str(error)) from error


def settings_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported checkpoint holds besides its weights, as plain values."""
    about = {name: checkpoint[name] for name in SETTINGS}
    about["hyper_parameters"] = {**about["hyper_parameters"], "weights": None}
    about["fresh_layers"] = checkpoint.get("fresh_layers", [])
    return about


def write_model_folder(
    checkpoint: Mapping[str, Any], state: StateDict, folder: Path, card: str
) -> None:
    """Write a folder for other people: MODEL_FOLDER. All of it is there at the end, or nothing new.

    The settings in config.json are for readers. This project reads those in the weights' own file,
    so that this file is enough.

    Args:
        checkpoint, state: as for `write_safetensors`.
        folder: is made if it does not exist. The files of a network that is in it are replaced.
        card: what README.md says about the network.

    Raises:
        ConfigError: the folder cannot be made, or it has files of these names that belong to
            something else, such as another project or another program's network.
        WriteError: a file cannot be written.
    """
    weights, config, readme = (folder / name for name in MODEL_FOLDER)
    known = weights.is_file() and _is_ours(weights)
    foreign = [path for path in (weights, readme, config) if path.is_file() and not known]
    if foreign:
        raise ConfigError(
            f"output={folder}: {foreign[0]} would be replaced, but belongs to no exported network"
            "; choose another folder"
        )
    # Each of the two small files is complete before the weights get their name, and gets its own
    # right after them.
    with (
        create_folder(folder, *MODEL_FOLDER),
        atomic_write(readme) as readme_part,
        atomic_write(config) as config_part,
    ):
        readme_part.write_text(card, encoding="utf-8")
        # Other programs may not know Python's NaN and Infinity: these become texts.
        strict = json.loads(json.dumps(settings_of(checkpoint)), parse_constant=str)
        about = json.dumps(strict, indent=2, allow_nan=False)
        config_part.write_text(about + "\n", encoding="utf-8")
        write_safetensors(checkpoint, state, weights)


def is_published(content: Any) -> bool:
    """Whether this is a table of tensors with the names of the authors' Caffe nets."""
    return is_state_dict(content) and "conv1_1.weight" in content


def published_checkpoint(
    state: StateDict, pool_scales: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[str, Any]:
    """What a checkpoint of ours would hold for one of the authors' nets.

    Args:
        state: the tensors of its file, under the names they have there.
        pool_scales: `AT_ONCE` for the FCN-8s that was trained at once. Nothing in its file shows
            that it is not the FCN-8s trained in stages, so the user has to say it:
            `python -m fcn.published FILE --at-once`.
    """
    dataset = {"class": "fcn.datasets.voc2012.VOC2012"}
    return {
        "state_dict": {f"network.{name}": value for name, value in from_caffe(state).items()},
        "hyper_parameters": {
            "class_names": list(VOC2012.classes),
            "stride": next((s for s in (8, 16) if f"upscore{s}.weight" in state), 32),
            "backbone": "vgg16",
            "head_width": state["fc6.bias"].numel() if "fc6.bias" in state else HEAD["head_width"],
            "pool_scales": list(pool_scales),
            "alignment": "caffe",
        },
        "config": {"data": {"dataset": dataset, "root": "data", "download": True}},
        "precision": "32-true",
        "global_step": 0,
    }


def from_caffe(state: StateDict) -> StateDict:
    """The tensors of one of the authors' nets under our names, for our normalisation.

    A tensor that has no place in our network keeps its name.
    """
    renamed = {rename(name, CAFFE_LAYERS): value for name, value in state.items()}
    first = renamed["stages.0.0.weight"]
    if first.shape[1:2] == (3,):  # (C, 3, 3, 3); what has another shape will be refused anyway
        # Theirs expects BGR from 0 to 255; ours expects RGB from 0 to 1, divided by STD.
        renamed["stages.0.0.weight"] = first.flip(1) * (255 * torch.tensor(STD).view(3, 1, 1))
    return renamed


def rename(name: str, layers: Mapping[str, str]) -> str:
    """The name of a tensor where its layer has another name; as it is for any other layer."""
    layer, dot, kind = name.rpartition(".")
    return f"{layers.get(layer, layer)}{dot}{kind}"


def _load(path: Path) -> Any:
    """What a file holds, without running any of it.

    Tensors of a .ckpt stay on disk until they are used. So a compressed one cannot unpack to a size
    that the memory does not have.
    """
    try:
        if path.suffix == ".safetensors":
            about, tensors = _metadata(path), load_file(path)
            return {**about, "state_dict": tensors} if about else tensors
        zipped = check_pickles(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # bytes of any kind raise errors of any kind
        raise WeightsError(f"{path} cannot be read: {brief(error)}") from error


def _is_ours(weights: Path) -> bool:
    """Whether a .safetensors file is one that this project has written."""
    try:
        return bool(_metadata(weights))
    except (SafetensorError, OSError, ValueError):  # it is damaged
        return False


def _metadata(path: Path) -> dict[str, Any]:
    """What a .safetensors file of ours says about its network; empty: it is not one of ours."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("fcn", "{}"))
