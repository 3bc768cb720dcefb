"""The authors' own Caffe nets, as torchfcn has converted them, opened like checkpoints of ours.

    python evaluate.py ckpt=fcn8s_from_caffe.pth split=seg11valid
    python -m fcn.published fcn8s-atonce_from_caffe.pth --at-once   # fcn8s-atonce_from_caffe.ckpt

The second command is for the FCN-8s trained at once alone: its layers are named and shaped as those
of the one trained in stages, and nothing in its file says that it scales its pools.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fcn.checkpoints import VOC_DATA
from fcn.config import short_messages
from fcn.datasets.voc2012 import VOC2012
from fcn.errors import ConfigError, reason
from fcn.module import SegmentationModule
from fcn.weights import read_file

AT_ONCE = (1.0, 0.01, 0.0001)  # scale_pool4, scale_pool3 in the authors' voc-fcn8s-atonce


def is_published(content: Any) -> bool:
    """Whether this is a table of tensors with the names of the Caffe nets."""
    return isinstance(content, dict) and isinstance(content.get("conv1_1.weight"), Tensor)


def as_checkpoint(
    path: Path, state: dict[str, Tensor], pool_scales: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[str, Any]:
    """What a checkpoint of ours would hold for the net at `path`; `weights` is that file itself."""
    network = {
        "stride": next((s for s in (8, 16) if f"upscore{s}.weight" in state), 32),
        "backbone": "vgg16",
        "weights": str(path),
        "head_width": state["fc6.bias"].numel() if "fc6.bias" in state else 4096,
        "pool_scales": tuple(pool_scales),
        "alignment": "caffe",
    }
    return {
        "state_dict": state,
        "hyper_parameters": {"class_names": list(VOC2012.classes), **network},
        "config": {"data": VOC_DATA},
        "precision": "32-true",
        "global_step": 0,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a published net as a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.published",
        description="Write one of the authors' Caffe nets, with torchfcn's names, as a checkpoint.",
    )
    parser.add_argument("file", type=Path, help="such as fcn8s-atonce_from_caffe.pth")
    parser.add_argument("--at-once", action="store_true", help="it is the FCN-8s trained at once")
    parser.add_argument("--output", type=Path, help="(default: FILE, ending with .ckpt)")
    options = parser.parse_args(arguments)
    output = options.output or options.file.with_suffix(".ckpt")
    with short_messages():
        if not is_published(state := read_file(options.file)):
            raise ConfigError(f"{options.file} is none of the Caffe nets: it has no conv1_1.weight")
        checkpoint = as_checkpoint(options.file, state)
        if options.at_once and checkpoint["hyper_parameters"]["stride"] != 8:
            raise ConfigError(f"--at-once: {options.file} is no FCN-8s")
        if options.at_once:
            checkpoint = as_checkpoint(options.file, state, AT_ONCE)
        module = SegmentationModule(**checkpoint["hyper_parameters"])
        checkpoint["state_dict"] = module.state_dict()
        checkpoint["pytorch-lightning_version"] = pl.__version__
        module.on_save_checkpoint(checkpoint)
        try:
            torch.save(checkpoint, output)
        except (OSError, RuntimeError) as error:  # torch raises the latter if the folder is missing
            raise ConfigError(f"--output {output}: {reason(error)}") from error
        print(output)


if __name__ == "__main__":
    main()
