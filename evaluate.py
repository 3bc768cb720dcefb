"""Score a checkpoint on a split, at the images' own resolution; or compare two.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt
    python evaluate.py ckpt=... split=seg11valid data.root=/data output=results
    python evaluate.py ckpt=... tta.flip=true tta.scales=[0.75,1,1.25] report.images=60
    python evaluate.py compare=[runs/A,runs/B]                   # run folders or checkpoints

Writes metrics.json, confusion.csv (rows are labels, columns predictions, in pixels), images.csv
(id, pixel accuracy and mean IoU of each image) and report.html with all of it and pictures, and
prints the table of classes. A comparison writes metrics.json and report.html, of both.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_values, short_messages
from fcn.errors import ConfigError

if TYPE_CHECKING:
    from fcn.datamodule import SegmentationDataModule
    from fcn.datasets import SegmentationDataset
    from fcn.evaluation import Result


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate as the command line says."""
    with short_messages(HydraException, OmegaConfBaseException):
        evaluate(cfg, command=shlex.join(["python", *sys.argv]))


def evaluate(cfg: DictConfig, *, command: str = "(called from Python)") -> dict[str, Any]:
    """Score `cfg.ckpt`, or both of `cfg.compare`, on `cfg.split`.

    Args:
        cfg: composed from conf/evaluate.yaml, with the data settings to use.
        command: to be named in the report.

    Returns:
        What is in metrics.json.

    Raises:
        fcn.errors.FCNError: checkpoint, settings or data are wrong.
    """
    OmegaConf.resolve(cfg)
    check_values(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    chosen = chosen_checkpoints(cfg)

    from fcn.callbacks import print_scores
    from fcn.checkpoints import find_checkpoint, read_checkpoint
    from fcn.devices import prepare_cpu, quiet_lightning
    from fcn.report import write_report
    from fcn.runs import output_folder, write_json

    quiet_lightning()
    prepare_cpu()
    paths = [find_checkpoint(path) for path in chosen]
    datamodule, data = open_data(cfg, [read_checkpoint(path) for path in paths])
    results = [score(cfg, path, datamodule, data) for path in paths]

    default = output_folder(paths[0], "comparison" if cfg.compare else "evaluation")
    output = Path(cfg.output) if cfg.output else default
    output.mkdir(parents=True, exist_ok=True)
    metrics = results[0].metrics if len(results) == 1 else compared(results)
    write_json(output / "metrics.json", metrics)
    if len(results) == 1:
        results[0].write_tables(output)
    report = output / "report.html"
    images = cfg.report.images
    write_report(report, results, data, datamodule.palette, images=images, command=command)
    for result in results:
        m = result.metrics
        print_scores(m | {"iou": list(m["iou"].values())}, list(m["iou"]))
        print(f"{m['images']} images, {m['images_per_second']:.2f} a second: {m['checkpoint']}")
    print(f"See {report}")
    return metrics


def chosen_checkpoints(cfg: DictConfig) -> list[str]:
    """`ckpt`, or the two of `compare`."""
    if cfg.compare is None:
        return [str(cfg.ckpt)]
    pair = OmegaConf.to_container(cfg)["compare"]  # type: ignore[index, call-overload]
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
        raise ConfigError(f"compare={pair}: must be two runs or checkpoints, [A,B]")
    if not OmegaConf.is_missing(cfg, "ckpt"):
        raise ConfigError("choose ckpt= or compare=, not both")
    return pair


def open_data(
    cfg: DictConfig, checkpoints: Sequence[dict[str, Any]]
) -> tuple["SegmentationDataModule", "SegmentationDataset"]:
    """The data module, and the split to judge on, whose classes the checkpoints must know."""
    known = [list(c["hyper_parameters"].get("class_names", ())) for c in checkpoints]
    for names in known[1:]:
        if names != known[0]:
            raise ConfigError(
                f"compare: A knows {_some(known[0])}, B {_some(names)}: they must be the same"
            )
    datamodule = instantiate(cfg.data, _convert_="all")
    if list(datamodule.classes) != known[0]:
        raise ConfigError(
            f"the checkpoint knows {_some(known[0])}, the data {_some(datamodule.classes)}: "
            "they must be the same"
        )
    datamodule.prepare_data()
    return datamodule, datamodule.open(cfg.split)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}, ...)"


def score(
    cfg: DictConfig, path: Path, datamodule: "SegmentationDataModule", data: "SegmentationDataset"
) -> "Result":
    """One checkpoint on all of `data`."""
    import pytorch_lightning as pl

    from fcn.evaluation import ImageScores, Result, open_checkpoint
    from fcn.prediction import TestTime, cast_weights
    from fcn.runs import git_revision, versions

    module, checkpoint = open_checkpoint(path)
    precision = cfg.precision or checkpoint["precision"]
    cast_weights(module.network, precision)
    if cfg.tta.flip or list(cfg.tta.scales) != [1] or cfg.tile is not None:
        network = TestTime(module.network, tile=cfg.tile, **cfg.tta)
        module.network = network  # type: ignore[assignment]  # takes and gives what an FCN does
    images = ImageScores(data.ids, keep=cfg.report.images > 0)
    trainer = pl.Trainer(
        accelerator=cfg.accelerator,
        devices=1,
        precision=precision,
        logger=False,
        callbacks=[images],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.validate(module, datamodule.eval_dataloader(data), verbose=False)
    seconds = time.perf_counter() - started

    assert module.scores is not None
    scores = module.scores
    metrics = {
        **{name: scores[name] for name in ("pixel_acc", "mean_acc", "miou", "fwiou")},
        "loss": module.val_loss,
        "iou": dict(zip(module.class_names, scores["iou"], strict=True)),
        "boundary_miou": images.boundary_miou(),
        "images": len(images.rows),
        "images_per_second": len(images.rows) / seconds,
        "split": cfg.split,
        "checkpoint": str(path),
        "step": checkpoint["global_step"],
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "tta": OmegaConf.to_container(cfg.tta),
        "tile": cfg.tile,
        "data": OmegaConf.to_container(cfg.data),
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    return Result(metrics, module.confusion.compute(), images)


def compared(results: Sequence["Result"]) -> dict[str, Any]:
    """metrics.json of a comparison: those of A, those of B, and B minus A."""
    a, b = (result.metrics for result in results)
    groups = ("iou", "boundary_miou")
    difference = {name: b[name] - a[name] for name in ("pixel_acc", "mean_acc", "miou", "fwiou")}
    difference |= {g: {name: b[g][name] - a[g][name] for name in a[g]} for g in groups}
    return {"a": a, "b": b, "difference": difference}


def offer_checkpoint_data(arguments: list[str]) -> None:
    """Make `data=checkpoint`, the default: the data settings in `ckpt=`, or in A of `compare=`."""
    path = next((a.removeprefix("ckpt=") for a in arguments if a.startswith("ckpt=")), None)
    pairs = [a for a in arguments if a.startswith("compare=")]
    if pairs and path is None:
        pair = OverridesParser.create().parse_override(pairs[0]).value()
        path = str(pair[0]) if isinstance(pair, list) and pair else None
    data: dict[str, Any] = {"_target_": "fcn.datamodule.SegmentationDataModule"}
    if path and not any(a.startswith("data=") for a in arguments):
        from fcn.checkpoints import checkpoint_data, find_checkpoint  # torch: not for --help

        data = checkpoint_data(find_checkpoint(path))
    ConfigStore.instance().store(group="data", name="checkpoint", node=data)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    with short_messages(HydraException, OmegaConfBaseException):
        offer_checkpoint_data(sys.argv[1:])
        main()
