"""Score a checkpoint on a split, at the images' own resolution, or compare two checkpoints.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt
    python evaluate.py ckpt=... split=seg11valid data.root=/data output=results
    python evaluate.py ckpt=... tta.flip=true "tta.scales=[0.75,1,1.25]" report.images=60
    python evaluate.py "compare=[runs/A,runs/B]"                   # run folders or checkpoints
    python evaluate.py ckpt=export/best.onnx            # a file of export.py, also an int8 one

It prints the IoU of each class, and writes metrics.json, confusion.csv (counts of pixels; rows are
labels, columns are predictions), images.csv (the scores of each image) and report.html. A
comparison has no CSV files. The scores are those of Long et al. (CVPR 2015), section 5.
"""

import sys
from functools import partial
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from fcn import cli
from fcn.errors import ConfigError, check_text, check_whole, refuse

cli.accept_data_changes()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate what the command line asks for."""
    with cli.short_messages():
        evaluate(cfg, command=cli.command_line(sys.orig_argv))


def evaluate(cfg: DictConfig, *, command: str = "(called from Python)") -> dict[str, Any]:
    """Score `cfg.ckpt`, or both of `cfg.compare`, on `cfg.split`, or on what the run validated on.

    Args:
        cfg: composed from conf/evaluate.yaml.
        command: the command line, which the report shows.

    Returns:
        What metrics.json holds.

    Raises:
        fcn.errors.FCNError: the checkpoint, a setting or the data is wrong.
    """
    cfg = cli.resolved(cfg)
    chosen = chosen_checkpoints(cfg)
    check_text("split", cfg.split, wanted="the name of a split, such as val", optional=True)
    check_text("output", cfg.output, wanted="a folder", optional=True)
    for key in ("report", "tta"):
        if not isinstance(cfg[key], DictConfig):
            refuse(key, cfg[key], "a group of settings")
    check_whole("report.images", cfg.report.images)

    from fcn.checkpoint import find_checkpoint, image_type, missing_file
    from fcn.datasets.reading import Pairs
    from fcn.evaluation.candidate import check_classes, chosen_data, open_candidate
    from fcn.evaluation.folder import FILES, write_folder
    from fcn.evaluation.result import score
    from fcn.files import create_folder, expanded
    from fcn.inference.onnx_session import open_onnx
    from fcn.inference.tta import TestTime, view_settings
    from fcn.precision import keep_freed_memory
    from fcn.runs.folder import output_folder
    from fcn.runs.process import quiet_lightning
    from fcn.training.score_table import print_scores

    quiet_lightning()
    keep_freed_memory()
    tta = view_settings(cli.plain(cfg.tta))
    plain = tta == {"flip": False, "scales": [1]} and cfg.tile is None
    options = {"accelerator": cfg.accelerator, "precision": cfg.precision}
    options["wrap"] = None if plain else partial(TestTime, tile=cfg.tile, **tta)
    candidates = []
    for path in map(find_checkpoint, chosen):
        if not path.is_file():
            raise missing_file("compare" if cfg.compare else "ckpt", path)
        exported = open_onnx(path) if path.suffix == ".onnx" else None
        candidates.append(open_candidate(path, **options, exported=exported))
    first = candidates[0]
    datamodule, settings = chosen_data(cfg, first.path, first.checkpoint)
    check_classes(candidates, datamodule.classes)
    split_name, images = cfg.split or datamodule.val_split, cfg.report.images
    split = datamodule.open(split_name, download=datamodule.download)  # no other need be there
    expected = image_type(first.checkpoint)
    if expected and "_target_" not in cfg.data and isinstance(split, Pairs):
        split.image_type = expected  # by default, all images must have the type of the first one
    name = "comparison" if cfg.compare else "evaluation"
    output = expanded(cfg.output or output_folder(first.path, name))
    with create_folder(output, *FILES):
        results = [score(c, datamodule.eval_dataloader(split), keep=images > 0) for c in candidates]
        for m in [result.metrics for result in results]:
            m.update(split=split_name, tta=tta, tile=cfg.tile, data=settings)
            print_scores(m | {"iou": list(m["iou"].values())}, list(m["iou"]))
            print(f"{m['images']} images, {m['images_per_second']:.2f} a second: {m['checkpoint']}")
        metrics = write_folder(output, results, split, images=images, command=command)
    print(f"See {output / 'report.html'}")
    return metrics


def chosen_checkpoints(cfg: DictConfig) -> list[str]:
    """The path in `ckpt`, or the two in `compare`.

    Raises:
        ConfigError: both are given, or `compare` does not hold two paths.
    """
    if cfg.compare is None:
        return [str(cfg.ckpt)]
    if not OmegaConf.is_list(cfg.compare) or [type(path) for path in cfg.compare] != [str, str]:
        refuse("compare", cfg.compare, "two runs or checkpoints, [A,B]")
    if not OmegaConf.is_missing(cfg, "ckpt"):
        raise ConfigError(f"ckpt={cfg.ckpt} compare={cfg.compare}: give one of the two, not both")
    return list(cfg.compare)


if __name__ == "__main__":
    cli.run(main)
