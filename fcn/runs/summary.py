"""summary.json, which a run leaves when it ends. fcn/training/fit.py writes it.

write_json(run / "summary.json", summarise(run, "finished"))
"""

from pathlib import Path
from typing import Any

from fcn.runs.metrics import read_column, read_metrics
from fcn.runs.process import peak_memory
from fcn.runs.versions import git_revision, versions


def summarise(run: Path, status: str) -> dict[str, Any]:
    """The last and the best scores of a run, how fast it was, and which code made it.

    Scores come from metrics.csv and not from this process, so that the summary of a resumed run
    covers the steps before it was resumed, too.

    Args:
        run: the run folder.
        status: "finished", or "stopped" by a signal.
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
        # The harmonic mean: all images divided by all seconds.
        "images_per_second": len(speeds) / sum(1 / s for s in speeds) if speeds else None,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "git_revision": git_revision(),
    }
