"""Loading pretrained weights into an FCN.

They may come from a VGG that was trained on ImageNet, from an FCN of this project with the same or
a coarser stride, or from one of the authors' own Caffe nets (Long et al., CVPR 2015).
`python train.py model.weights=...` takes the same sources.

    load_weights(network, "IMAGENET1K_V1")                          # torchvision's; downloaded
    load_weights(network, "vgg19.safetensors")                      # names as torchvision's
    load_weights(network, "runs/fcn16s/2026-01-31_12-00-00")        # FCN-16s starts FCN-8s
    load_weights(network, "fcn8s_from_caffe.pth")                   # needs alignment="caffe"

Every layer of the VGG must fit, or an error names it. conv6 and conv7 are named in a warning if
they start at random. Score, skip and upsampling layers that the source does not have keep their
first values, and are returned. The last layer of ImageNet's classifier is not used.
"""

import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import VGG16_Weights, WeightsEnum, get_model_weights

from fcn.checkpoint import (
    CAFFE_LAYERS,
    StateDict,
    find_checkpoint,
    from_caffe,
    is_published,
    missing_file,
    read_tensors_and_settings,
    rename,
)
from fcn.datasets.download import TIMEOUT, locked
from fcn.errors import WeightsError, WriteError, check_text
from fcn.network import FCN, SKIPS, head_layers
from fcn.pickles import brief
from fcn.vgg import MEAN, STD

log = logging.getLogger(__name__)

# The one weight set of torchvision's VGGs whose images are normalised in another way than ours.
CAFFE_SCALE = VGG16_Weights.IMAGENET1K_FEATURES
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")


def load_weights(network: FCN, source: str | Path) -> list[str]:
    """Load `source` into `network`.

    Args:
        network: is changed in place.
        source: the name of a torchvision weight set for this VGG; or the path of a .pth or
            .safetensors file whose layers are named as in torchvision or torchfcn; or the path of
            a checkpoint of this project, of a run folder (its best checkpoint), or of a folder
            that export.py wrote.

    Returns:
        The names of the layers of head and decoder that were not loaded, and so keep their first
        values (`FCN.reset_parameters`).

    Raises:
        WeightsError: nothing is found at `source`, or what is there does not fit; nothing has
            been loaded then.
    """
    state, mean, std, settings = read_weights(network.backbone, source)
    warning = ""
    theirs: dict[str, str] = {}  # our layers with the names that the file has for them
    imagenet = any(name.startswith("features.") for name in state)
    if imagenet:
        theirs = torchvision_layers(network)
        state, warning = from_torchvision(network, state)
        optional = [name for name in network.state_dict() if not name.startswith("stages.")]
    else:
        if is_published(state):
            if network.alignment != "caffe":
                raise WeightsError(
                    f"{source} is one of the authors' Caffe nets: they need model.alignment=caffe "
                    "model.backbone=vgg16"
                )
            theirs = {ours: layer for layer, ours in CAFFE_LAYERS.items()}
            state = from_caffe(state)
        warning = _compare_settings(network, source, state, settings)
        optional = _new_in_finer_stride(network, state)

    _refuse_what_does_not_fit(network, source, state, optional, theirs)
    network.load_state_dict(state, strict=False)  # float16 becomes float32
    if imagenet:
        fold_normalization(network, mean, std)
    if warning:
        log.warning("%s: %s", source, warning)
    return [layer for layer in head_layers(network) if f"{layer}.weight" not in state]


def _compare_settings(
    network: FCN, source: str | Path, state: StateDict, settings: Mapping[str, Any]
) -> str:
    """Compare the settings that the shapes of weights do not show with those of a checkpoint.

    Args:
        settings: the arguments of `SegmentationModule` in the file. It is empty for other files.

    Returns:
        A warning that names the checkpoint's own pooling and pool_scales if they differ, or "".

    Raises:
        WeightsError: the alignment differs, with which the weights would be useless.
    """
    alignment = settings.get("alignment", network.alignment)
    if alignment != network.alignment:
        raise WeightsError(
            f"{source} was trained with model.alignment={alignment}, not {network.alignment}"
        )
    others = []
    pooling = "avg" if any(isinstance(m, nn.AvgPool2d) for m in network.modules()) else "max"
    if settings.get("pooling", pooling) != pooling:
        others.append(f"model.pooling={settings['pooling']}")
    scales = settings.get("pool_scales")
    if isinstance(scales, list | tuple) and len(scales) == 3:
        strides = [s for s in SKIPS if f"upsample.to_image_{s}.weight" in state]
        pools = ["pool5", *(SKIPS[strides[0]] if len(strides) == 1 else ())]  # that it has read
        # There are three factors, and pool2 has that of pool3.
        if any(network.pool_scales[p] != scale for p, scale in zip(pools, scales, strict=False)):
            others.append(f"model.pool_scales={list(scales)}")
    return f"trained with {' '.join(others)}, unlike this network" if others else ""


def _refuse_what_does_not_fit(
    network: FCN, source: str | Path, state: StateDict, optional: list[str], theirs: dict[str, str]
) -> None:
    """Name every tensor that is missing, unexpected, of another shape or not finite.

    Args:
        state: what was read, under our names.
        optional: tensors that need not be in both the network and `state`. Still, a layer may not
            be loaded in part, such as its weight without its bias.
        theirs: for each of our layers, its name in the file, for the message.

    Raises:
        WeightsError: there is such a tensor.
    """
    own = network.state_dict()
    both = [name for name in own if name in state]
    loaded = {_layer(name) for name in both}
    missing = [n for n in own if n not in state and (n not in optional or _layer(n) in loaded)]
    misshapen = [n for n in both if state[n].shape != own[n].shape]
    problems = {
        "missing": [rename(n, theirs) for n in missing],
        "unexpected": [rename(n, theirs) for n in state if n not in own and n not in optional],
        "wrong shape": [
            f"{rename(n, theirs)} {tuple(state[n].shape)}, not {tuple(own[n].shape)}"
            for n in misshapen
        ],
        "NaN or Inf": [rename(n, theirs) for n in both if not state[n].isfinite().all()],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise WeightsError(
            f"{source} does not fit a {network.backbone} FCN-{network.stride}s with "
            f"fusion={network.fusion} deep_skips={str(network.deep_skips).lower()} "
            f"skip_kernel={network.skip_kernel}. {listed}. "
            "Backbone, fusion, deep_skips, skip_kernel, number of classes and widths must be those "
            "of the file, whose network must have the same stride or a coarser one"
        )


def find_weights(backbone: str, source: str | Path) -> Path | WeightsEnum:
    """The file or the torchvision weight set that `source` stands for. Nothing is read yet.

    Raises:
        ConfigError: `source` is neither a path nor a text.
        WeightsError: there is neither a file nor a weight set of that name, or the system refuses
            to look for the file.
    """
    check_text("model.weights", source)
    path = find_checkpoint(source, "model.weights")
    if path.is_file():
        return path
    named: Mapping[str, WeightsEnum] = {}
    with suppress(ValueError):  # a VGG of the user's own, registered without weight sets
        named = get_model_weights(backbone).__members__
    if str(source) in named:
        return named[str(source)]
    if path.suffix in FILE_SUFFIXES or len(path.parts) > 1:
        raise missing_file("model.weights", path)
    names = ", ".join(dict.fromkeys(w.name for w in named.values())) or "none"
    raise WeightsError(
        f"model.weights={source}: this is neither a file nor the name of weights that torchvision "
        f"has for {backbone} ({names}). model.weights=null starts from random weights"
    )


def read_weights(
    backbone: str, source: str | Path
) -> tuple[StateDict, Sequence[float], Sequence[float], Mapping[str, Any]]:
    """The tensors at `source`, under the names they have there (ours without `network.`).

    Returns:
        The tensors; the mean and the standard deviation of their normalisation of images; and, for
        a checkpoint of ours, the arguments of its module.

    Raises:
        WeightsError: they cannot be found, fetched or read. The message says what to do.
    """
    weights = find_weights(backbone, source)
    if isinstance(weights, Path):
        state, settings = read_tensors_and_settings(weights)
        # torchvision fills the classifier of that weight set with NaN, whatever the file is called.
        classifier = state.get("classifier.0.weight")
        if classifier is None or not classifier.isnan().all():
            return state, MEAN, STD, settings
        return state, CAFFE_SCALE.transforms().mean, CAFFE_SCALE.transforms().std, settings
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    timeout_before = socket.getdefaulttimeout()
    try:
        # If two runs start at once, only one downloads. A file that exists is complete, and needs
        # no lock, for which this user might have no permission.
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if cached.is_file() else locked(cached):
            socket.setdefaulttimeout(TIMEOUT)  # else torch.hub waits for a silent server for ever
            state = weights.get_state_dict(
                progress=True, check_hash=True, weights_only=True, map_location="cpu"
            )
    except Exception as error:  # a damaged file raises anything
        if cached.exists():
            raise WeightsError(
                f"{cached} cannot be read: {brief(error)}. Delete it, and it is downloaded again"
            ) from error
        if not isinstance(error, OSError | HTTPException | RuntimeError | WriteError):
            raise
        raise WeightsError(
            f"cannot download {weights.url} ({brief(error)}). Put the file at {cached}, or give "
            "a path: model.weights=FILE.pth, or null for a random start. "
            "`experiment=quickstart` needs no download."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
    transforms = weights.transforms()
    return state, transforms.mean, transforms.std, {}


@torch.no_grad()
def fold_normalization(network: FCN, mean: Sequence[float], std: Sequence[float]) -> None:
    """Adapt a VGG that was trained on images normalised with (mean, std) to this network's own.

    The first convolution is changed so that it computes from images in our normalisation what it
    would compute from images in the other one. torchvision's `VGG16_Weights.IMAGENET1K_FEATURES`
    needs this, because it was trained with another normalisation than torchvision's other VGGs; so
    does a network with alignment="caffe", which has another mean. Inside the image the results are
    equal. At the border they differ a little: the zeros that pad a normalised image stand for the
    mean, and the two means differ by almost one grey level (of 255).
    """
    weight = network.get_parameter("stages.0.0.weight")  # (C, 3, 3, 3)
    bias = network.get_parameter("stages.0.0.bias")  # (C,)
    shift = (network.mean.flatten() - torch.tensor(mean)) / torch.tensor(std)
    bias.add_(weight.sum((2, 3)) @ shift)
    weight.mul_(network.std / torch.tensor(std).view(3, 1, 1))


def torchvision_layers(network: FCN) -> dict[str, str]:
    """For each layer that torchvision's VGG has too, its name there.

    torchvision numbers the layers of all stages in one row: stages.1.0 is features.5 in VGG-19.
    """
    stages = [list(stage.children()) for stage in network.stages]
    layers = [f"stages.{i}.{j}" for i, stage in enumerate(stages) for j in range(len(stage))]
    names = {layer: f"features.{number}" for number, layer in enumerate(layers)}
    return names | {"conv6": "classifier.0", "conv7": "classifier.3"}


def from_torchvision(network: FCN, state: StateDict) -> tuple[StateDict, str]:
    """A torchvision VGG's tensors under our names: `features.*`, and the classifier if it fits.

    The classifier's first two linear layers become conv6 (7x7) and conv7 (1x1), as in the paper.
    Its third, for the 1000 classes of ImageNet, is left out.

    Returns:
        The tensors, and a warning if conv6 or conv7 starts at random, because its linear layer is
        missing, holds NaN (as in torchvision's `*_FEATURES`) or has another width. The warning is
        empty if both are loaded.
    """
    ours = {theirs: layer for layer, theirs in torchvision_layers(network).items()}
    state = {n: v for n, v in state.items() if _layer(n) != "classifier.6"}
    random: dict[str, str] = {}  # for each layer that starts at random, why it does
    for linear, layer in (("classifier.0", "conv6"), ("classifier.3", "conv7")):
        weight, bias = state.pop(f"{linear}.weight", None), state.pop(f"{linear}.bias", None)
        shape = network.get_parameter(f"{layer}.weight").shape  # (C_out, C_in, k, k)
        if weight is None or bias is None:
            random[layer] = f"no {linear}"
        elif not (weight.isfinite().all() and bias.isfinite().all()):
            random[layer] = f"{linear} is not finite"
        elif weight.shape != (shape[0], shape[1:].numel()) or bias.shape != shape[:1]:
            random[layer] = f"{linear} is {tuple(weight.shape)}, {layer} {tuple(shape)}"
        else:  # (C_out, C_in * k * k) -> (C_out, C_in, k, k): torchvision flattens (C, 7, 7)
            state |= {f"{linear}.weight": weight.view(shape), f"{linear}.bias": bias}
    renamed = {rename(name, ours): value for name, value in state.items()}
    if not random:
        return renamed, ""
    start = f"{' and '.join(random)} start{'s' if len(random) == 1 else ''}"
    return renamed, f"{start} at random ({', '.join(random.values())})"


def _new_in_finer_stride(network: FCN, state: StateDict) -> list[str]:
    """The tensors that need not match when `state` is of a coarser FCN than the network.

    When FCN-32s starts FCN-16s, the layers that are missing in the file are the skip at pool4, the
    upsampling to pool4 and the upsampling from there to the image. The layer that is left over is
    FCN-32s's upsampling to the image. There are none if `state` is not of a coarser FCN.
    """
    strides = [s for s in SKIPS if f"upsample.to_image_{s}.weight" in state]
    if len(strides) != 1 or strides[0] <= network.stride:
        return []
    new_pools = SKIPS[network.stride][len(SKIPS[strides[0]]) :]
    new_layers = [f"upsample.to_image_{network.stride}"]
    new_layers += [f"{part}{pool}" for pool in new_pools for part in ("skips.", "upsample.to_")]
    missing = [n for n in network.state_dict() if _layer(n) in new_layers]
    return missing + [n for n in state if _layer(n) == f"upsample.to_image_{strides[0]}"]


def _layer(name: str) -> str:
    """The layer of a tensor: "conv6" for "conv6.weight"."""
    return name.rpartition(".")[0]


def _listed(names: Sequence[str]) -> str:
    """The first 40 names in one line, and how many there are beyond these."""
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return ", ".join(names[:40]) + more
