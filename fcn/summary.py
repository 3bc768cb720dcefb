"""What is left of a run when it ends: summary.json, and a row in the sweep's table."""

import csv
import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fcn.csv_logger import read_column, read_metrics
from fcn.runs import atomic_write, git_revision, peak_memory, versions


def summarise(run: Path, status: str) -> dict[str, Any]:
    """What summary.json takes from metrics.csv, so that a resumed run has the same, and from here.

    Args:
        status: finished, or stopped by a signal.
    """
    rows = read_metrics(run / "metrics.csv")
    validated = [row for row in rows if row.get("val/miou")]
    last = validated[-1] if validated else {}
    best = max(validated, key=lambda row: float(row["val/miou"]), default=None)
    _, speeds = read_column(rows, "train/images_per_second")
    _, smooth = read_column(rows, "train/loss_smooth")
    return {
        "status": status,
        "steps": int(rows[-1]["step"]) if rows else 0,
        **{name: float(value) for name, value in last.items() if name.startswith("val/") and value},
        "best/val/miou": float(best["val/miou"]) if best else None,
        "best/step": int(best["step"]) if best else None,
        "train/loss_smooth": smooth[-1] if smooth else None,
        "images_per_second": len(speeds) / sum(1 / s for s in speeds) if speeds else None,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "git_revision": git_revision(),
    }


def write_sweep_table(sweep: Path) -> None:
    """sweep.csv: a row for each run in the folder, from what the runs have written themselves.

    Each job writes it anew when it ends, so it is there however the jobs were launched.
    """
    rows = []
    for run in sorted(sweep.iterdir(), key=lambda p: (len(p.name), p.name)):
        if not (run / "overrides.yaml").is_file():
            continue
        summary = {}
        if (run / "summary.json").is_file():
            summary = json.loads((run / "summary.json").read_text())
        overrides = OmegaConf.to_container(OmegaConf.load(run / "overrides.yaml"), resolve=False)
        row = {"run": run.name, "status": summary.get("status", "unfinished")}
        row |= dict(text.split("=", 1) for text in map(str, overrides or ()) if "=" in text)
        plain = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        rows.append(row | {k: v for k, v in plain.items() if not k.startswith("val/iou/")})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_write(sweep / "sweep.csv") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
