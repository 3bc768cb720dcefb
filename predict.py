"""Segment photographs with a checkpoint, or with a file that export.py made of one.

    python predict.py ckpt=runs/.../checkpoints/best.ckpt input=photo.jpg
    python predict.py ckpt=... input='photos/**/*.jpg' output=masks tta.flip=true
    python predict.py ckpt=... input=panorama.tif tile=768
    python predict.py ckpt=... format=voc data.root=/data        # for VOC's evaluation server

Writes a palette PNG of the classes and an overlay with a legend for each photograph; see
`find_photos` in fcn/prediction.py for their names. Exits with 1 if a photograph could not be done.
"""

import os
import sys
import time
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_values, quoted, short_messages
from fcn.errors import ConfigError, DataError, reason


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Predict as the command line says."""
    with short_messages(HydraException, OmegaConfBaseException):
        predict(cfg)


def predict(cfg: DictConfig) -> Path:
    """Write the classes of `cfg.input`, or of a VOC list.

    Args:
        cfg: composed from conf/predict.yaml.

    Returns:
        The folder that results are in.

    Raises:
        fcn.errors.FCNError: settings or checkpoint are wrong, or, after all others are done,
            photographs are broken.
    """
    check_values(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    if cfg.format not in (None, "voc") or (cfg.format is None) == (cfg.input is None):
        raise ConfigError("choose input=FILE, FOLDER or GLOB, or format=voc for a list of VOC's")

    from fcn.checkpoints import find_checkpoint, read_checkpoint
    from fcn.datasets.voc2012 import VOC2012
    from fcn.prediction import TestTime, find_photos, load_model, predict_files, voc_photos
    from fcn.runs import output_folder

    ckpt, voc = find_checkpoint(cfg.ckpt), cfg.format == "voc"
    output = Path(cfg.output) if cfg.output else output_folder(ckpt, "predictions")
    output = output.expanduser()
    if voc:
        known = {} if ckpt.suffix in (".onnx", ".pt2") else read_checkpoint(ckpt)["config"]["data"]
        jobs = voc_photos(cfg.data.root or known.get("root"), cfg.split, cfg.comp, output)
    else:
        jobs = find_photos(cfg.input, output)
    model = load_model(ckpt, cfg.device, cfg.precision)
    if voc and list(model.class_names) != list(VOC2012.classes):
        raise ConfigError(
            f"format=voc: the {len(model.class_names)} classes of {ckpt} are not VOC's"
        )
    network = TestTime(model.scores, tile=cfg.tile, **cfg.tta)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={output}: {reason(error)}") from error

    started = time.perf_counter()
    failed = predict_files(
        jobs,
        network,
        model.save_mask if voc else model.save,
        batch_size=cfg.batch_size,
        upright=not voc,  # VOC's masks are as the pixels are stored
    )
    speed = len(jobs) / (time.perf_counter() - started)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} images, {speed:.2f} a second; see {output}")
    if failed:
        lines = (f"  {path}: {why}" for path, why in failed.items())
        message = "\n".join((f"{len(failed)} of {len(jobs)} images failed:", *lines))
        raise DataError(message.encode(errors="replace").decode())  # names need not be UTF-8
    return output


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    sys.argv[1:] = map(quoted, sys.argv[1:])
    with short_messages(HydraException, OmegaConfBaseException):
        main()
