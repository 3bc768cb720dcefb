"""Write a trained network for other programs or people, and compare the file with the network.

    python export.py ckpt=runs/.../checkpoints/best.ckpt                  # export/best.onnx
    python export.py ckpt=... format=torch output=model.pt2 argmax=true
    python export.py ckpt=... format=safetensors                          # the folder export/best/

An .onnx or .pt2 file takes uint8 RGB (N, 3, H, W) of any N, H and W. It gives scores (N, K, H, W)
and, with argmax, the mask (N, H, W) uint8. ONNX needs `pip install -r requirements/export.txt`.

`format=safetensors` writes a folder with weights and settings, a model card (README.md) and
config.json. It is used in place of a checkpoint, and it cannot hold code, so that it is safe to
hand on. fcn/inference/hub.py loads it from Python, and pushes it to the Hugging Face Hub.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from fcn import cli


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
    from fcn.checkpoint import find_checkpoint, read_checkpoint, write_model_folder
    from fcn.inference.export import export_path, export_program
    from fcn.inference.model_card import model_card
    from fcn.inference.predictor import image_settings
    from fcn.module import SegmentationModule

    ckpt = find_checkpoint(cfg.ckpt)
    path = export_path(cfg.output, ckpt, cfg.format)
    module, checkpoint = SegmentationModule.load_from_checkpoint(ckpt), read_checkpoint(ckpt)
    if cfg.format == "safetensors":
        card = model_card(checkpoint, ckpt)
        write_model_folder(checkpoint, module.state_dict(), path, card)
        says = "takes the place of a checkpoint; its README.md is the model card"
    else:
        value_range, _ = image_settings(ckpt, checkpoint)
        difference, equal = export_program(
            module, path, argmax=cfg.argmax, value_range=value_range, checkpoint=checkpoint
        )
        says = (
            f"agrees with the network; scores differ by {difference:.2g} at most, {equal:.4%} of "
            "the mask's pixels are equal"
        )
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    print(f"{path}, {size / 2**20:.0f} MB: {says}")
    return path


if __name__ == "__main__":
    cli.run(main)
