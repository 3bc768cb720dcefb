"""Write a checkpoint's network as one file for other programs, and check that file.

    python export.py ckpt=runs/.../checkpoints/best.ckpt                  # export/best.onnx
    python export.py ckpt=... format=torch output=model.pt2 argmax=true
    python export.py ckpt=... format=safetensors                          # weights and settings

uint8 RGB (N, 3, H, W) goes in, of any N, H and W; scores (N, K, H, W) come out and, with argmax,
mask (N, H, W) uint8. ONNX needs `pip install -r requirements-export.txt`. A .safetensors is no
program: evaluate.py, predict.py and model.weights take it where they take a checkpoint.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_values, quoted, short_messages
from fcn.errors import ConfigError


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export as the command line says."""
    with short_messages(HydraException, OmegaConfBaseException):
        export(cfg)


def export(cfg: DictConfig) -> Path:
    """Export `cfg.ckpt` and compare what was written with the network.

    Args:
        cfg: composed from conf/export.yaml.

    Returns:
        The file.

    Raises:
        fcn.errors.FCNError: settings or checkpoint are wrong, packages are missing, or the file
            disagrees with the network; there is no file then.
    """
    check_values(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    endings = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
    if cfg.format not in endings:
        raise ConfigError(f"format={cfg.format}: must be onnx, torch or safetensors")

    from fcn.checkpoints import find_checkpoint, write_safetensors
    from fcn.evaluation import open_checkpoint
    from fcn.export import write_checked
    from fcn.runs import output_folder

    ckpt, ending = find_checkpoint(cfg.ckpt), endings[cfg.format]
    default = output_folder(ckpt, "export") / f"{ckpt.stem}{ending}"
    path = Path(cfg.output).expanduser() if cfg.output else default
    if path.suffix != ending:
        raise ConfigError(f"output={path}: the name for format={cfg.format} ends with {ending}")

    module, checkpoint = open_checkpoint(ckpt)
    if cfg.format == "safetensors":
        write_safetensors(checkpoint, module, path)
        print(f"{path}, {path.stat().st_size / 2**20:.0f} MB: takes the place of a checkpoint")
        return path
    difference, equal = write_checked(module, path, argmax=cfg.argmax)
    size = path.stat().st_size / 2**20
    print(
        f"{path}, {size:.0f} MB: agrees with the network; scores differ by {difference:.2g} "
        f"at most, {equal:.4%} of the mask's pixels are equal"
    )
    return path


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    sys.argv[1:] = map(quoted, sys.argv[1:])
    with short_messages(HydraException, OmegaConfBaseException):
        main()
