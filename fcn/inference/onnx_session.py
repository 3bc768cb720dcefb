"""Running an ONNX file that export.py has written; predict.py and the check of an export do it.

    scores, class_names, palette, value_range = open_onnx(Path("export/best.onnx"))
    logits = scores(image)      # (N, 3, H, W) uint8 -> (N, K, H, W)

This needs onnxruntime: pip install -r requirements/export.txt
"""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcn.errors import ConfigError, WeightsError
from fcn.inference.tiles import Scores

# The entries of metadata, in JSON, that export.py adds to the network in a file.
METADATA = ("class_names", "palette", "void", "hyper_parameters", "value_range")
Program = Callable[[Tensor], Sequence[Tensor]]  # an image -> scores and, if it is there, the mask


def open_onnx(path: Path) -> tuple[Scores, list[str], Any, Any]:
    """The network of an ONNX file, and three facts that export.py has put beside it.

    Returns:
        The scores; the names of the classes; their colours, or None; and the values of an image's
        file that are black and white, or None, as `fcn.datasets.pictures.read_image` takes them.

    Raises:
        ConfigError: onnxruntime is not installed.
        WeightsError: the file is missing or broken, or export.py did not write it.
    """
    need_packages("onnxruntime")
    program, metadata = open_session(path)
    metadata = {"value_range": "null"} | metadata  # older files do not have it
    if not set(METADATA) <= set(metadata):
        raise WeightsError(f"ckpt={path} was not written by export.py")
    names, palette, value_range = (
        json.loads(metadata[key]) for key in ("class_names", "palette", "value_range")
    )
    return lambda image: program(image)[0], names, palette, value_range


def open_session(path: Path) -> tuple[Program, dict[str, str]]:
    """Any ONNX file with one input `image`, ready to run, and its metadata.

    Raises:
        WeightsError: the file is missing or broken.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # of many types, none of them public
        raise WeightsError(f"ckpt={path} cannot be read: {str(error).splitlines()[0]}") from error

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map


def need_packages(*names: str) -> None:
    """Check that packages are installed.

    Raises:
        ConfigError: one is not. The message says how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install -r requirements/export.txt")
