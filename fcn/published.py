"""Convert one of the authors' own Caffe nets, in torchfcn's format, to a checkpoint of ours.

    python -m fcn.published fcn8s-atonce_from_caffe.pth --at-once   # fcn8s-atonce_from_caffe.ckpt

evaluate.py, predict.py and export.py open these files without a conversion. Only the FCN-8s that
was trained "at once", with all skips from the first step, needs this command. That net scales its
pools, but nothing in its file says so: its names and shapes are those of the FCN-8s that was
trained in stages.
"""

import argparse
from collections.abc import Sequence

import pytorch_lightning as pl

from fcn.checkpoint import (
    AT_ONCE,
    is_published,
    published_checkpoint,
    read_tensors,
    write_checkpoint,
)
from fcn.cli import short_messages
from fcn.errors import ConfigError
from fcn.files import expanded
from fcn.module import SegmentationModule


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a published net as a checkpoint, and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.published",
        description="Write one of the authors' Caffe nets, with torchfcn's names, as a checkpoint.",
    )
    parser.add_argument("file", type=expanded, help="such as fcn8s-atonce_from_caffe.pth")
    parser.add_argument("--at-once", action="store_true", help="it is the FCN-8s trained at once")
    parser.add_argument("--output", type=expanded, help="(default: FILE, ending with .ckpt)")
    options = parser.parse_args(arguments)
    output = options.output or options.file.with_suffix(".ckpt")
    with short_messages():
        state = read_tensors(options.file)
        if output.exists() and output.samefile(options.file):
            raise ConfigError(f"--output={output}: is the file to convert; choose another name")
        if not is_published(state):
            raise ConfigError(f"{options.file} is none of the Caffe nets: it has no conv1_1.weight")
        checkpoint = published_checkpoint(state, AT_ONCE if options.at_once else (1.0, 1.0, 1.0))
        settings = checkpoint["hyper_parameters"]
        if options.at_once and settings["stride"] != 8:
            raise ConfigError(f"--at-once: {options.file} is no FCN-8s")
        # This names what does not fit. Nothing is written then.
        module = SegmentationModule(**settings, weights=options.file)
        checkpoint["pytorch-lightning_version"] = pl.__version__
        module.on_save_checkpoint(checkpoint)
        write_checkpoint(checkpoint, output)
        print(output)


if __name__ == "__main__":
    main()
