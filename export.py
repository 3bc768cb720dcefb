"""Write a trained network for other programs or people, and compare the file with the network.

    python export.py ckpt=runs/.../checkpoints/best.ckpt                  # export/best.onnx
    python export.py ckpt=... int8=true                              # export/best_int8.onnx
    python export.py ckpt=... int8=true calibrate=photos/
    python export.py ckpt=... format=torch output=model.pt2 argmax=true
    python export.py ckpt=... format=safetensors                          # the folder export/best/

An .onnx or .pt2 file takes uint8 RGB (N, 3, H, W) of any N, H and W. It gives scores (N, K, H, W)
and, with argmax, the mask (N, H, W) uint8. ONNX needs `pip install -r requirements/export.txt`.

With `int8=true`, most layers of the .onnx file compute in 8-bit integers, see
fcn/inference/quantise.py. The file is kept if at least 97 % of the pixels of images that it was not
calibrated with have the class that a float file gives them.

`format=safetensors` writes a folder with weights and settings, a model card (README.md) and
config.json. It is used in place of a checkpoint, and it cannot hold code, so that it is safe to
hand on. fcn/inference/hub.py loads it from Python, and pushes it to the Hugging Face Hub.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from fcn import cli
from fcn.errors import ConfigError, FCNError, check_whole

if TYPE_CHECKING:
    from fcn.inference.quantise import Images

cli.accept_data_changes()


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export as the command line says."""
    with cli.short_messages():
        export(cfg)


def export(cfg: DictConfig) -> Path:
    """Export `cfg.ckpt`.

    Args:
        cfg: composed from conf/export.yaml.

    Returns:
        The file, or the folder of format=safetensors.

    Raises:
        fcn.errors.FCNError: a setting or the checkpoint is wrong, a package is missing, or the
            file disagrees with the network. Nothing is left then.
    """
    from fcn.checkpoint import MODEL_FOLDER, find_checkpoint, read_checkpoint, write_model_folder
    from fcn.inference.export import export_path, export_program
    from fcn.inference.model_card import model_card
    from fcn.inference.quantise import quantise
    from fcn.module import SegmentationModule

    ckpt = find_checkpoint(cfg.ckpt)
    if ckpt.suffix == ".onnx" and ckpt.is_file():
        raise ConfigError(
            f"ckpt={ckpt}: an ONNX file is exported already. evaluate.py and predict.py take it; "
            "here, give the checkpoint that it was made from"
        )
    if cfg.argmax and cfg.format == "safetensors":
        raise ConfigError("argmax=true: format=safetensors writes weights, which give no mask")
    path = export_path(cfg.output, ckpt, cfg.format, int8=cfg.int8)
    written = [path]
    checkpoint = read_checkpoint(ckpt)
    module = SegmentationModule.load_from_checkpoint(ckpt, checkpoint=checkpoint)
    if cfg.format == "safetensors":
        card = model_card(checkpoint, ckpt)
        write_model_folder(checkpoint, module.state_dict(), path, card)
        written = [path / name for name in MODEL_FOLDER]
        says = "takes the place of a checkpoint; its README.md is the model card"
    else:
        write = partial(export_program, module, checkpoint=checkpoint, argmax=cfg.argmax)
        if cfg.int8:
            images = find_images(cfg, ckpt, checkpoint)
            with TemporaryDirectory() as folder:
                exact = Path(folder) / "float.onnx"
                write(exact)
                says = str(quantise(exact, path, images))
        else:
            difference, equal = write(path)
            says = (
                f"agrees with the network; scores differ by {difference:.2g} at most, {equal:.4%} "
                "of the mask's pixels are equal"
            )
    size = sum(file.stat().st_size for file in written)
    print(f"{path}, {size / 2**20:.0f} MB: {says}")
    return path


def find_images(cfg: DictConfig, ckpt: Path, checkpoint: Mapping[str, Any]) -> "Images":
    """The images of `cfg.calibrate`: of a folder, or of the data that the network was trained on.

    Raises:
        fcn.errors.FCNError: they cannot be found.
    """
    from fcn.checkpoint import image_type
    from fcn.evaluation.candidate import chosen_data
    from fcn.files import expanded
    from fcn.inference.predictor import image_settings
    from fcn.inference.quantise import data_images, folder_images

    given = cfg.calibrate
    if isinstance(given, str) and not given.isdecimal():
        value_range, _ = image_settings(checkpoint)
        return folder_images(expanded(given), value_range, image_type(checkpoint))
    count = int(given) if isinstance(given, str) else given
    check_whole("calibrate", count, 1)
    try:
        return data_images(chosen_data(cfg, ckpt, checkpoint)[0], count)
    except FCNError as error:
        raise ConfigError(
            f"{error}. int8=true calibrates with training images: choose a folder of images with "
            "calibrate=FOLDER, or say with data.root=FOLDER where the data is"
        ) from error


if __name__ == "__main__":
    cli.run(main)
