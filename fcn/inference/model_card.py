"""The model card of a network that is handed on: README.md in the folder that export.py writes.

    text = model_card(read_checkpoint(path), path)

It says what the network was trained on and how, how good it is, and how it is used. What is not
known is said to be not known.
"""

import json
import shlex
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fcn.checkpoint import MODEL_FOLDER, data_settings
from fcn.datasets import data_licence
from fcn.figures.legend import one_line
from fcn.files import sha256
from fcn.runs.folder import output_folder, read_overrides
from fcn.runs.metrics import read_metrics

UNKNOWN = "not known"
TITLES = {
    "miou": "mean IoU",
    "pixel_acc": "pixel accuracy",
    "mean_acc": "mean accuracy",
    "fwiou": "frequency-weighted IoU",
}
Scores = dict[str, float | None]


def model_card(checkpoint: Mapping[str, Any], path: Path | None) -> str:
    """The card in Markdown. A folder that was handed on already keeps its own.

    Args:
        checkpoint: as `fcn.checkpoint.read_checkpoint` gives it; no weights are needed.
        path: its file. Next to it are the files of its run, which hold recipe and scores. None:
            there is no such file, so that they are not known.
    """
    if path is not None and path.name == MODEL_FOLDER[0] and path.with_name("README.md").is_file():
        return path.with_name("README.md").read_text(encoding="utf-8", errors="replace")
    network = checkpoint["hyper_parameters"]
    # `read_checkpoint` accepts any plain values. Those of another kind than a run's say nothing.
    for name, known, unknown in (("config", dict, {}), ("global_step", int, 0)):
        if not isinstance(checkpoint[name], known):
            checkpoint = {**checkpoint, name: unknown}
    scored_on, scores = find_scores(checkpoint, path) if path is not None else ("", {})
    environment = Environment(
        loader=PackageLoader("fcn.inference"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template("model_card.md").render(
        title=f"FCN-{network.get('stride', 8)}s on {network.get('backbone', 'vgg19')}",
        facts={name: _cell(value) for name, value in _facts(checkpoint, path).items()},
        scored_on=scored_on,
        scores={_cell(name): value for name, value in scores.items()},
        classes=[_cell(name) for name in network["class_names"]],
    )


def _facts(checkpoint: Mapping[str, Any], path: Path | None) -> dict[str, str]:
    """What the card's first table says: data and recipe."""
    data = data_settings(checkpoint) or {"dataset": {}}
    dataset = data["dataset"].get("class")
    train, val = data.get("train_split"), data.get("val_split")
    splits = f", trained on `{train}`, validated on `{val}`" if train else ""
    steps = checkpoint["global_step"]
    return {
        "data": f"{dataset}{splits}" if dataset else UNKNOWN,
        "licence of the data": data_licence(dataset) if dataset else UNKNOWN,
        "recipe": _recipe(path, checkpoint["config"]) if path is not None else UNKNOWN,
        "optimizer steps": f"{steps:,}" if steps else UNKNOWN,
        "precision in training": checkpoint["precision"],
        "card written": date.today().isoformat(),
    }


def _recipe(path: Path, config: Mapping[str, Any]) -> str:
    """The command that trained the network, or else the name of its run."""
    run = output_folder(path, "")
    first, later = read_overrides(run) if path.parent.name == "checkpoints" else ([], [])
    if first or later:
        resumed = f", resumed with `{shlex.join(later)}`" if later else ""
        return f"`python train.py {shlex.join(first)}`{resumed}"
    return f"run `{config['name']}`; config.json has its settings" if "name" in config else UNKNOWN


def find_scores(checkpoint: Mapping[str, Any], path: Path) -> tuple[str, Scores]:
    """The scores of a checkpoint: of an evaluation of it, or else of its run's validation.

    Returns:
        A sentence that says on what they were measured, and the scores by name, from 0 to 1. None
        is the IoU of a class that occurs nowhere. There are no scores if none are known.
    """
    step, m = checkpoint["global_step"], _evaluation(path)
    if m is not None:
        tta = "" if m["tta"] == {"flip": False, "scales": [1]} else f", tta {m['tta']}"
        data = f"split `{m['split']}` of {m['data']['dataset']['class']}"
        tile = f", tile {m['tile']}" if m.get("tile") else ""
        about = f"Evaluated on {data}, {m['images']:,} images{tta}{tile}, {m['date']}."
        ious = {f"IoU of {name}": iou for name, iou in m["iou"].items()}
        return about, {TITLES[key]: m[key] for key in TITLES} | ious
    metrics = output_folder(path, "metrics.csv")
    if path.parent.name == "checkpoints" and metrics.is_file():
        for row in read_metrics(metrics):
            if row["step"] == str(step) and row.get("val/miou"):
                about = f"Of the validation that the run made after step {step:,}."
                return about, {TITLES[key]: float(row[f"val/{key}"]) for key in TITLES}
    return "", {}


def _evaluation(path: Path) -> dict[str, Any] | None:
    """The metrics.json of an evaluation of this very checkpoint; None if there is none.

    The file in its place may be of another checkpoint of the same name and step, or of another
    program.
    """
    try:
        text = output_folder(path, "evaluation/metrics.json").read_text(encoding="utf-8")
        metrics = json.loads(text)
        return metrics if metrics["checkpoint_sha256"] == sha256(path) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _cell(text: object) -> str:
    """A text that cannot end a cell of a table."""
    return one_line(str(text), 2000).replace("|", r"\|")
