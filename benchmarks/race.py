"""Mean IoU over minutes: ours and other people's networks, same photographs, same VGG features.

    taskset -c 0 python benchmarks/race.py --data DIR --weights vgg19_features.pth --minutes 10

Each trains for that long on the same cores, by the wall clock, as its authors do: ours as
experiment=voc_mini, the others as benchmarks/peers.py says, smp's from the same crops, torchfcn's
one whole image at a time. Judging takes no time of theirs: as evaluate.py, at the images' own
resolution, on all images at the end and on the first few at the marks before.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import OURS, PEER, SMP, Contestant, composed, make
from torchmetrics.classification import MulticlassConfusionMatrix

from fcn.datamodule import SegmentationDataModule
from fcn.metrics import segmentation_scores
from fcn.schedules import poly
from fcn.transforms import Batch

NAMES = (next(n for n in OURS if n.endswith("vgg19 bf16")), *SMP, PEER)
FIRST = 40  # images at the marks before the end


def opened(name: str, data: str) -> SegmentationDataModule:
    from hydra.utils import instantiate

    whole = ["data.batch_size=1", "data.crop_size=null", "data.scale=null"] if name == PEER else []
    cfg = composed("train", "experiment=voc_mini", f"data.root={data}", "name=race", *whole)
    datamodule = instantiate(cfg.data, _convert_="all", num_workers=0)
    datamodule.setup("fit")
    return datamodule


def judge(contestant: Contestant, datamodule: SegmentationDataModule, images: int) -> float:
    """Mean IoU on the first so many images."""
    contestant.network.eval()
    confusion = MulticlassConfusionMatrix(21, ignore_index=255)
    batches: Iterator[Batch] = iter(datamodule.val_dataloader())
    for _ in range(images):
        batch = next(batches)
        height, width = batch["mask"].shape[-2:]
        logits = contestant.logits(contestant.prepare(batch["image"], batch["mask"])[0])
        confusion.update(logits[..., :height, :width].argmax(1), batch["mask"])
    contestant.network.train()
    return segmentation_scores(confusion.compute())["miou"]


def race(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One contestant's way: (minutes, images judged, mean IoU) at each mark."""
    given = ("experiment=voc_mini",) if name in OURS else ()
    contestant = make(name, "cpu", args.weights, *given)
    datamodule = opened(name, args.data)
    assert datamodule.val_data is not None
    everything = len(datamodule.val_data)
    schedule = None
    if name in OURS:  # voc_mini's
        schedule = poly(
            contestant.optimizer,
            total_steps=math.inf,
            time_used=lambda: used / 60 / args.minutes,
            warmup_steps=50,
        )
    contestant.network.train()
    points: list[tuple[float, int, float]] = []
    used, steps, marks = 0.0, 0, [args.minutes * k / args.marks for k in range(1, args.marks + 1)]
    for batch in datamodule.train_dataloader():
        began = time.perf_counter()
        contestant.step(*contestant.prepare(batch["image"], batch["mask"]))
        if schedule:
            schedule.step()
        steps += 1
        used += time.perf_counter() - began
        if used >= 60 * marks[len(points)]:
            images = everything if len(points) + 1 == args.marks else min(FIRST, everything)
            points.append((used / 60, images, judge(contestant, datamodule, images)))
            print(name, steps, points[-1], flush=True)
            if len(points) == args.marks:
                break
    return {"name": name, "steps": steps, "points": points}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for run in runs:
        minutes, _, mious = zip(*run["points"], strict=True)
        axes.plot((0, *minutes), (0, *mious), marker="o", label=run["name"])
    axes.set(xlabel="minutes of training", ylabel="mean IoU", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--marks", type=int, default=2, help="times of judging, the end included")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=Path("runs/race"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        run = race(name, args)
        (args.output / f"{name.replace(' ', '_')}.json").write_text(json.dumps(run))
    files = sorted(args.output.glob("*.json"))
    draw([json.loads(file.read_text()) for file in files], args.output / "race.png")


if __name__ == "__main__":
    main()
