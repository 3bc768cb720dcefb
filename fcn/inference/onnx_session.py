"""Running an ONNX file that export.py has written, as predict.py and evaluate.py do.

    checkpoint, network = open_onnx(Path("export/best.onnx"))
    logits = network(image)     # (N, 3, H, W) uint8 -> (N, K, H, W)

A file that another program has made from one of export.py's, such as onnxruntime's quantiser, will
do if it keeps the metadata.

This needs onnxruntime: pip install -r requirements/export.txt
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcn.datasets import check_labels
from fcn.datasets.value_range import check_range
from fcn.errors import ConfigError, WeightsError, need_packages

# The entries of metadata, in JSON, that export.py adds to the network in a file.
METADATA = ("class_names", "palette", "void", "hyper_parameters", "value_range", "config", "step")
NEW = dict.fromkeys(("value_range", "config", "step"), "null")  # older files do not have these
Program = Callable[[Tensor], Sequence[Tensor]]  # an image -> scores and, if it is there, the mask


class OnnxNetwork(nn.Module):
    """An ONNX file that is called like an FCN. It runs on the CPU, in the precision that it has.

    Args:
        program: from `open_session`.
        path: of the file, for an error.
        classes: K, the number of channels that the file must give.
    """

    def __init__(self, program: Program, path: Path, classes: int) -> None:
        super().__init__()
        self.program, self.path, self.classes = program, path, classes

    def forward(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 -> scores (N, K, H, W)."""
        scores = self.program(image)[0]
        if scores.shape[1:2] != (self.classes,):
            given = tuple(scores.shape)
            raise WeightsError(f"ckpt={self.path} gives {given} for {self.classes} classes")
        return scores


def open_onnx(path: Path) -> tuple[dict[str, Any], OnnxNetwork]:
    """What a checkpoint holds besides weights, from a file of export.py, and the file's network.

    The dict has one entry more than a checkpoint: `value_range`, the values of an image's file that
    are black and white, as `fcn.datasets.pictures.read_image` takes them; or None.

    Raises:
        ConfigError: onnxruntime is not installed.
        WeightsError: the file is missing or broken, or export.py did not write it.
    """
    need_packages("onnxruntime")
    program, metadata = open_session(path)
    try:
        about = {name: json.loads((NEW | metadata)[name]) for name in METADATA}
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"ckpt={path} was not written by export.py, or has lost its metadata: no {error}"
        ) from error
    try:
        check_labels(about["class_names"], about["palette"], about["void"])
        check_range(about["value_range"])
    except ConfigError as error:
        raise WeightsError(f"ckpt={path}: {error}") from error
    checkpoint = {
        "hyper_parameters": {name: about[name] for name in ("class_names", "palette", "void")},
        "config": about["config"],
        "precision": "32-true",
        "global_step": about["step"],
        "value_range": about["value_range"],
    }
    return checkpoint, OnnxNetwork(program, path, len(about["class_names"]))


def open_session(path: Path) -> tuple[Program, dict[str, str]]:
    """Any ONNX file with one input `image`, ready to run, and its metadata.

    Raises:
        WeightsError: the file is missing or broken.
    """
    import onnxruntime

    if not path.is_file():
        raise WeightsError(f"ckpt={path}: no such file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # of many types, none of them public
        raise WeightsError(f"ckpt={path} cannot be read: {str(error).splitlines()[0]}") from error

    def run(image: Tensor) -> list[Tensor]:
        try:
            outputs = session.run(None, {"image": image.numpy()})
        except Exception as error:  # as above; torch's is a RuntimeError that names memory, too
            lines = str(error).replace("std::bad_alloc", "no memory").strip()
            raise RuntimeError(lines) from error
        return [torch.from_numpy(output) for output in outputs]

    return run, session.get_modelmeta().custom_metadata_map
