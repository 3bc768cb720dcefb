"""Segment photographs and videos with a trained network.

    python predict.py ckpt=runs/.../checkpoints/best.ckpt input=photo.jpg
    python predict.py ckpt=... input='photos/**/*.jpg' output=masks tta.flip=true
    python predict.py ckpt=... input=panorama.tif tile=768
    python predict.py ckpt=... input=street.mp4 batch_size=4
    python predict.py ckpt=... format=voc data.root=/data        # for VOC's evaluation server

`ckpt` is a checkpoint, a run folder, one of the authors' nets (fcn8s_from_caffe.pth), or a folder,
.onnx or .safetensors that export.py wrote. Each photograph gets a palette PNG of its classes and an
overlay with a legend, and each video an overlay without its sound and a legend; `find_photos` in
fcn/inference/photos.py says how they are named. The exit code is 1 if one could not be segmented.
"""

import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fcn import cli
from fcn.errors import ConfigError, DataError, check_choice, check_text, check_whole


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Predict as the command line says."""
    with cli.short_messages():
        predict(cfg)


def predict(cfg: DictConfig) -> Path:
    """Write masks and overlays of `cfg.input`, or the masks of a VOC list.

    Args:
        cfg: composed from conf/predict.yaml.

    Returns:
        The folder that the results are in.

    Raises:
        fcn.errors.FCNError: a setting or the checkpoint is wrong; or some photographs or videos
            could not be segmented, which is raised after all others were.
    """
    check_choice("format", cfg.format, ("voc",), optional=True)
    voc = cfg.format == "voc"
    if voc == (cfg.input is not None):
        wrong = f"format=voc excludes input={cfg.input}" if voc else "input= is missing"
        raise ConfigError(
            f"{wrong}: give input=FILE, FOLDER or GLOB, or else format=voc for images of a VOC list"
        )

    from fcn.checkpoint import find_checkpoint
    from fcn.datasets.pictures import MAX_PIXELS
    from fcn.datasets.voc2012 import VOC2012
    from fcn.files import create_folder, expanded
    from fcn.inference import photos
    from fcn.inference.predictor import load_predictor, predict_files
    from fcn.inference.tta import TestTime, view_settings
    from fcn.inference.video import predict_videos
    from fcn.precision import keep_freed_memory
    from fcn.runs.folder import output_folder

    keep_freed_memory()
    check_whole("max_pixels", cfg.max_pixels, 1, 2**40, optional=True)
    ckpt = find_checkpoint(cfg.ckpt)
    check_text("output", cfg.output, wanted="a folder", optional=True)
    output = expanded(cfg.output or output_folder(ckpt, "predictions"))
    predictor = load_predictor(ckpt, cfg.device, cfg.precision)
    if voc:
        if list(predictor.class_names) != list(VOC2012.classes):
            names = f"the {len(predictor.class_names)} classes of {ckpt}"
            raise ConfigError(f"format=voc: {names} are not VOC's 21; choose files with input=")
        root = cfg.data.root or predictor.data_root
        jobs, left_out = photos.voc_photos(root, cfg.split, cfg.comp, output), photos.LeftOut()
    else:
        jobs, left_out = photos.find_photos(cfg.input, output)
    network = TestTime(predictor.scores, tile=cfg.tile, **view_settings(cfg.tta))
    videos = {path: jobs.pop(path) for path in list(jobs) if photos.is_video(path)}
    started = time.perf_counter()
    with create_folder(output):
        failed = predict_files(
            jobs,
            network,
            predictor.write_mask if voc else predictor.write_results,
            batch_size=cfg.batch_size,
            value_range=predictor.value_range,
            expected=predictor.image_type,
            max_pixels=cfg.max_pixels or MAX_PIXELS,
        )
        if jobs:
            done = len(jobs) - len(failed)
            speed = done / (time.perf_counter() - started)
            print(f"{done} of {len(jobs)} images, {speed:.2f} a second; see {output}")
        failed |= predict_videos(videos, network, predictor, batch_size=cfg.batch_size)
    print(*photos.describe(left_out), sep="\n", end="\n" if left_out else "")
    if failed:
        lines = [f"  {path}: {why}" for path, why in failed.items()]
        what = f"{len(jobs) + len(videos)} {'files' if videos else 'images'}"
        raise DataError("\n".join([f"{len(failed)} of {what} failed:", *lines]))
    return output


if __name__ == "__main__":
    cli.run(main)
