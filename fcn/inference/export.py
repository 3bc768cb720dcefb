"""Writing a trained network for other programs, and comparing the file with the network.

    path = export_path(None, Path("runs/.../checkpoints/best.ckpt"), "onnx")
    export_program(module, path, checkpoint=checkpoint, argmax=True)  # .onnx, or torch's .pt2

A program takes uint8 RGB (N, 3, H, W) of any N, H and W, and gives scores (N, K, H, W) and, with
argmax, the mask (N, H, W) uint8. Before the file gets its name, it is run on images of several
sizes, and its scores are compared with the network's.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as shapes_config
from torch.nn import functional as F

from fcn.errors import ConfigError, FCNError, check_choice, check_flag, check_text, need_packages
from fcn.files import atomic_write, create_folder, expanded
from fcn.inference.onnx_session import METADATA, Program, open_session
from fcn.inference.predictor import image_settings
from fcn.module import SegmentationModule
from fcn.runs.folder import output_folder

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ""}  # and their endings; "": a folder
AXES = {0: "batch", 2: "height", 3: "width"}  # of the image, which may have any length
SIZES = ((1, 97, 131), (2, 33, 64), (3, 50, 31), (1, 32, 224), (1, 1, 1))  # (N, H, W) to compare
EXAMPLE = torch.zeros(2, 3, 70, 101, dtype=torch.uint8)  # an image to trace the network with
# The allowed difference of two scores, as a share of the largest score. Rounding alone makes it
# about 1e-6 for a VGG-19 in float32.
TOLERANCE = 1e-4


class ExportError(FCNError):
    """An exported file does not do what the network does."""


class ExportedNetwork(nn.Module):
    """What the file computes: images (N, 3, H, W) uint8 -> scores (N, K, H, W) and, with argmax,
    the mask (N, H, W) uint8."""

    def __init__(self, network: nn.Module, argmax: bool) -> None:
        super().__init__()
        self.network, self.argmax = network, argmax

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores = self.network(image)
        return (scores, scores.argmax(1).to(torch.uint8)) if self.argmax else (scores,)


def export_path(output: str | None, checkpoint: Path, format: str, *, int8: bool = False) -> Path:
    """The file or folder to write.

    Args:
        output: chosen by the user. None: export/<checkpoint><ending> in the checkpoint's run, with
            _int8 before the ending for a file in int8.
        checkpoint: the checkpoint that is exported.
        format: one of FORMATS.
        int8: whether the file is one in int8, which only ONNX has.

    Raises:
        ConfigError: there is no such format, or `output` does not end as its files do, or is a
            file although the format has a folder.
    """
    check_choice("format", format, tuple(FORMATS))
    check_flag("int8", int8)
    if int8 and format != "onnx":
        raise ConfigError(f"int8=true: only format=onnx has it, and this is format={format}")
    check_text("output", output, wanted="a file or a folder", optional=True)
    ending = FORMATS[format]
    if output is None:
        name = checkpoint.stem + ("_int8" if int8 else "")
        return output_folder(checkpoint, "export") / f"{name}{ending}"
    path = expanded(output)
    if not ending and path.suffix in (".safetensors", ".onnx", ".pt2"):
        raise ConfigError(f"output={path}: format={format} writes a folder of several files")
    if ending and path.suffix != ending:
        raise ConfigError(f"output={path}: the name for format={format} ends with {ending}")
    return path


def export_program(
    module: SegmentationModule, path: Path, *, checkpoint: Mapping[str, Any], argmax: bool = False
) -> tuple[float, float]:
    """Write the network as an ONNX file or a torch.export program, if that agrees with it.

    Args:
        module: stays on the CPU in float32, in evaluation mode.
        path: ends with .onnx or .pt2.
        checkpoint: what the module was built from. The file holds its data settings, so that
            evaluate.py can score it; and their `value_range`, the values of an image's file that
            are 0 and 255 for the program, for whoever reads the image.
        argmax: whether the program also gives the mask.

    Returns:
        As `compare`.

    Raises:
        ConfigError: a package is missing, or the folder cannot be made.
        ExportError: the program disagrees with the network; nothing new is at `path`.
        WriteError: the file cannot be written.
    """
    check_flag("argmax", argmax)
    onnx = path.suffix == ".onnx"
    if onnx:
        need_packages("onnx", "onnxscript", "onnxruntime")
    network = module.network.eval().cpu().float().to(memory_format=torch.contiguous_format)
    exported = ExportedNetwork(network, argmax).eval()
    settings = dict(module.hparams, weights=None)
    about = {
        "class_names": module.class_names,
        "palette": settings.get("palette"),
        "void": module.void,
        "hyper_parameters": settings,
        "value_range": image_settings(checkpoint)[0],
        "config": checkpoint["config"],
        "step": checkpoint["global_step"],
    }
    metadata = {name: json.dumps(about[name]) for name in METADATA}
    with create_folder(path.parent, path.name), atomic_write(path) as part:
        (_write_onnx if onnx else _write_torch)(exported, part, metadata)
        return compare(open_session(part)[0] if onnx else _read_torch(part), network)


def compare(program: Program, network: nn.Module) -> tuple[float, float]:
    """Compare a program with the network that it was made from, on images of several sizes.

    Returns:
        The largest difference of a score, and the share of pixels with the same class, 0 to 1.

    Raises:
        ExportError: a score differs by more than rounding explains, or a pixel has another class
            although its two highest scores are further apart than that.
    """
    random = torch.Generator().manual_seed(0)
    largest, equal, pixels = 0.0, 0, 0
    for n, height, width in SIZES:
        coarse = torch.randint(256, (n, 3, height // 8 + 1, width // 8 + 1), generator=random)
        image = F.interpolate(coarse.to(torch.uint8), (height, width))  # blocks, 8 pixels wide
        with torch.no_grad():
            expected = network(image)  # (N, K, H, W)
            scores, *mask = program(image)
        if scores.shape != expected.shape:
            raise ExportError(f"the file gives {tuple(scores.shape)}, not {tuple(expected.shape)}")
        tolerance = TOLERANCE * expected.abs().max().item() + 1e-6
        difference = (scores - expected).abs().max().item()
        first, second = expected.topk(2, 1).values.unbind(1)  # each (N, H, W)
        certain = first - second > 2 * tolerance
        wrong = (mask[0] if mask else scores.argmax(1)) != expected.argmax(1)  # (N, H, W)
        if not difference <= tolerance or (wrong & certain).any():  # NaN is not <= either
            raise ExportError(
                f"the file disagrees with the network at {width}×{height}: scores differ by "
                f"{difference:.2g} (rounding: {tolerance:.2g}), {wrong.sum()} pixels by their class"
            )
        largest = max(largest, difference)
        equal, pixels = equal + int((~wrong).sum()), pixels + wrong.numel()
    return largest, equal / pixels


def _write_onnx(network: ExportedNetwork, path: Path, metadata: dict[str, str]) -> None:
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log each optimisation
    with torch.no_grad(), _any_size():
        written = torch.onnx.export(
            network,
            (EXAMPLE,),
            dynamo=True,
            dynamic_shapes=(AXES,),
            input_names=["image"],
            output_names=["scores", "mask"] if network.argmax else ["scores"],
            verbose=False,
        )
    assert written is not None
    # Name the axes of the outputs. They would show the arithmetic of the last crop instead.
    for value in written.model.graph.outputs:
        assert value.shape is not None
        channels = value.shape[1:-2]
        value.shape = type(value.shape)([AXES[0], *channels, AXES[2], AXES[3]])
    written.model.metadata_props.update(metadata)
    written.save(path, external_data=False)


def _write_torch(network: ExportedNetwork, path: Path, metadata: dict[str, str]) -> None:
    dynamic = (dict.fromkeys(AXES, Dim.DYNAMIC),)
    with torch.no_grad(), _any_size():
        program = torch.export.export(network, (EXAMPLE,), dynamic_shapes=dynamic)
    with path.open("wb") as file:  # torch refuses a path without the ending .pt2
        torch.export.save(program, file, extra_files=metadata)


def _read_torch(path: Path) -> Program:
    """The program in a .pt2 file.

    Loading may run code that is in the file, so this is only for a file that this process has just
    written.
    """
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _any_size() -> Any:
    """A context in which torch exports a program for images of any size.

    Otherwise torch assumes that no size is ever 1. That is wrong for a batch of one image, and for
    an image with a side of at most 32 pixels, whose coarsest map has a side of 1. There is no
    public name for this setting (torch 2.14).
    """
    return shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
