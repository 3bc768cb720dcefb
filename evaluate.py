"""Score a checkpoint on a split, at the images' own resolution.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt
    python evaluate.py ckpt=... split=seg11valid data.root=/data output=results

Writes metrics.json, confusion.csv (rows are labels, columns predictions, in pixels) and
images.csv (id, pixel accuracy and mean IoU of each image), and prints the table of classes.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_values, short_messages
from fcn.errors import ConfigError


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate as the command line says."""
    with short_messages(HydraException, OmegaConfBaseException):
        evaluate(cfg)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Score `cfg.ckpt` on `cfg.split`.

    Args:
        cfg: composed from conf/evaluate.yaml, with the data settings to use.

    Returns:
        What is in metrics.json.

    Raises:
        fcn.errors.FCNError: checkpoint, settings or data are wrong.
    """
    OmegaConf.resolve(cfg)
    check_values(OmegaConf.to_container(cfg))  # type: ignore[arg-type]

    import pytorch_lightning as pl

    from fcn.callbacks import print_scores
    from fcn.devices import quiet_lightning
    from fcn.evaluation import ImageScores, read_checkpoint, write_confusion
    from fcn.module import SegmentationModule
    from fcn.runs import git_revision, versions, write_json

    quiet_lightning()
    path = Path(cfg.ckpt)
    checkpoint = read_checkpoint(path)
    module = SegmentationModule.load_from_checkpoint(path)
    datamodule = instantiate(cfg.data, _convert_="all")
    if list(datamodule.classes) != module.class_names:
        raise ConfigError(
            f"the checkpoint knows {len(module.class_names)} classes "
            f"({', '.join(module.class_names[:3])}, ...), the data {len(datamodule.classes)} "
            f"({', '.join(datamodule.classes[:3])}, ...): they must be the same"
        )
    datamodule.prepare_data()
    data = datamodule.open(cfg.split)

    per_image = ImageScores(data.ids)
    trainer = pl.Trainer(
        accelerator=cfg.accelerator,
        devices=1,
        precision=cfg.precision or checkpoint["precision"],
        logger=False,
        callbacks=[per_image],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.validate(module, datamodule.eval_dataloader(data), verbose=False)
    seconds = time.perf_counter() - started

    assert module.scores is not None
    scores = module.scores
    output = Path(cfg.output) if cfg.output else default_output(path)
    output.mkdir(parents=True, exist_ok=True)
    metrics = {
        **{name: scores[name] for name in ("pixel_acc", "mean_acc", "miou", "fwiou")},
        "loss": module.val_loss.compute().item(),
        "iou": dict(zip(module.class_names, scores["iou"], strict=True)),
        "images": len(per_image.rows),
        "images_per_second": len(per_image.rows) / seconds,
        "split": cfg.split,
        "checkpoint": str(path),
        "step": checkpoint["global_step"],
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "data": OmegaConf.to_container(cfg.data),
        "versions": versions(),
        "git_revision": git_revision(),
    }
    write_json(output / "metrics.json", metrics)
    write_confusion(output / "confusion.csv", module.confusion.compute(), module.class_names)
    per_image.write(output / "images.csv")
    print_scores(scores, module.class_names)
    print(
        f"{len(per_image.rows)} images, {metrics['images_per_second']:.2f} a second; see {output}"
    )
    return metrics


def default_output(checkpoint: Path) -> Path:
    """`evaluation/` in the run's folder, or beside a checkpoint that lies elsewhere."""
    folder = checkpoint.absolute().parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "evaluation"


def offer_checkpoint_data(arguments: list[str]) -> None:
    """Make `data=checkpoint`, the default: the data settings that are in `ckpt=`."""
    path = next((a.removeprefix("ckpt=") for a in arguments if a.startswith("ckpt=")), None)
    data: dict[str, Any] = {"_target_": "fcn.datamodule.SegmentationDataModule"}
    if path and not any(a.startswith("data=") for a in arguments):
        from fcn.evaluation import checkpoint_data  # imports torch: not for --help

        data = checkpoint_data(Path(path))
    ConfigStore.instance().store(group="data", name="checkpoint", node=data)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    with short_messages(HydraException, OmegaConfBaseException):
        offer_checkpoint_data(sys.argv[1:])
        main()
