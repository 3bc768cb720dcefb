"""Score a checkpoint as a validation of training does; compare two such results.

    result = score(candidate, datamodule.eval_dataloader(data))
    result.metrics["miou"]

evaluate.py calls it for each checkpoint.
"""

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from fcn.evaluation.boundaries import boundary_miou
from fcn.evaluation.candidate import Candidate
from fcn.evaluation.scores import ImageScores
from fcn.metrics import SCORES
from fcn.runs.versions import git_revision, versions


@dataclass
class Result:
    """One checkpoint on one split.

    Attributes:
        metrics: what metrics.json holds: the scores, and what they were made with.
        confusion: (K, K) counts of pixels; rows are labels, columns are predictions.
        images: the scores of each image, and its prediction if that was kept.
    """

    metrics: dict[str, Any]
    confusion: Tensor
    images: ImageScores


def score(candidate: Candidate, loader: DataLoader, *, keep: bool = False) -> Result:
    """Score a checkpoint with training's own validation, so that scores agree to the last digit.

    Args:
        candidate: the checkpoint to score.
        loader: yields each image once.
        keep: keep the predictions, for pictures in the report.
    """
    module, trainer = candidate.module, candidate.trainer
    images = ImageScores(keep=keep)
    trainer.callbacks.append(images)  # type: ignore[attr-defined]
    started = time.perf_counter()
    trainer.validate(module, loader, verbose=False)
    seconds = time.perf_counter() - started
    assert module.scores is not None
    scores: dict[str, Any] = dict(module.scores)
    metrics = {
        **{name: scores[name] for name in SCORES},
        "loss": module.val_loss,
        "iou": dict(zip(module.class_names, scores["iou"], strict=True)),
        "boundary_miou": boundary_miou(images.bands),
        "images": len(images.rows),
        "images_per_second": len(images.rows) / seconds,
        "checkpoint": str(candidate.path),
        "checkpoint_sha256": candidate.sha256,
        "step": candidate.checkpoint["global_step"],
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "versions": versions(),
        "git_revision": git_revision(),
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    return Result(metrics, module.confusion.compute(), images)


def compare(first: Result, second: Result) -> dict[str, Any]:
    """metrics.json of a comparison: the metrics of A, those of B, and B minus A."""
    a, b = first.metrics, second.metrics
    difference: dict[str, Any] = {name: b[name] - a[name] for name in SCORES}
    for group in ("iou", "boundary_miou"):
        difference[group] = {name: b[group][name] - a[group][name] for name in a[group]}
    return {"a": a, "b": b, "difference": difference}
