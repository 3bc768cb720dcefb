"""Mean IoU over minutes: ours and other people's networks, same photographs, same VGG features.

    python benchmarks/race.py --recipe camvid_fcn8s --data DIR --minutes 15
    python benchmarks/race.py --recipe voc_mini --data DIR --first 40
    python benchmarks/race.py --recipe camvid_fcn8s --data DIR --steps 3600 --device cuda

Each network trains for that long on the same cores, as its authors do, or for as many steps: on a
fast GPU, minutes would compare how soon Python starts each operation, and not the networks. Ours
trains as the recipe, the others as benchmarks/peers.py says: torchfcn on one whole image at a time,
as it is, those of segmentation-models-pytorch (smp) on our crops, and once more with the recipe's
loss, optimizer and frozen stages. `--rate 1.2e-4` changes the rate of these, and of ours; with
`--only` and one `--output`, each network can have the rate that suits it, in one figure. The
features of smp's are evened out (peers.even_out), as ours are by model.pool_scales. Where the
device has bfloat16, all compute in it, although their authors use float32. On tensor cores without
it, such as Turing's, only ours computes in 16 bits.

Only training steps count as time: reading images and scoring do not. With --workers, images are
read in other processes, which takes time from the steps where there are few cores. Scores are those
of evaluate.py, at the images' own resolution: during the race on `--first` so many images, which
the figure shows, and at the end on all of them, which table.md has. Both show all seeds that are in
the output folder, which is refused where it holds runs under other conditions.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import (
    SMP,
    SMP_OUR_RECIPE,
    TORCHFCN,
    Contestant,
    composed,
    configured,
    even_out,
    make,
    ours_here,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fcn.cli import short_messages
from fcn.datamodule import SegmentationDataModule
from fcn.metrics import ConfusionMatrix, segmentation_scores
from fcn.precision import best_precision
from fcn.schedules import cosine, poly
from fcn.training.settle import settle_class_weights
from fcn.transforms import Batch


def contestants(recipe: str, device: str) -> list[str]:
    """Ours first, with the VGG of the recipe, and those of smp with the same one."""
    backbone = composed("train", f"experiment={recipe}").model.backbone
    peers = [name for name in (*SMP_OUR_RECIPE, *SMP) if backbone in name]
    return [ours_here(device, backbone), *peers, *TORCHFCN]


def opened(name: str, args: argparse.Namespace) -> SegmentationDataModule:
    from hydra.utils import instantiate

    given = [f"experiment={args.recipe}", *args.settings, f"data.root={args.data}", "name=race"]
    given += [f"seed={args.seed}"]
    if name in TORCHFCN:
        given += ["data.batch_size=1", "data.crop_size=null", "data.scale=null", "data.flip=0"]
        given += ["data.jitter=null", "data.rotate=null", "data.blur=null"]
    cfg = composed("train", *given)
    datamodule = instantiate(cfg.data, _convert_="all", num_workers=args.workers)
    datamodule.setup("fit")
    return datamodule


def class_weights(recipe: str, changes: list[str], datamodule: SegmentationDataModule) -> list[str]:
    """The setting of the class weights that train.py would train with: they average 1."""
    cfg, module = configured(f"experiment={recipe}", *changes)
    settle_class_weights(cfg, datamodule, module)
    weights = cfg.model.class_weights
    return [] if weights is None else [f"model.class_weights={list(weights)}"]


def compute_as_ours(network: nn.Module, device: str) -> None:
    """Make the network compute in bfloat16 from now on; its scores are float32."""
    mixed = torch.autocast(device, torch.bfloat16)(network.forward)

    def forward(image: Tensor) -> Tensor:
        return mixed(image).float()

    network.forward = forward


def trains_as_recipe(name: str) -> bool:
    """Whether a network has the recipe's optimizer, rate and schedule, and not its authors'."""
    return name.startswith("ours") or name in SMP_OUR_RECIPE


def schedule(
    name: str, contestant: Contestant, progress: Callable[[], float]
) -> LRScheduler | None:
    """How its authors lower the rate; `progress` goes from 0 to 1."""
    limits: dict[str, Any] = {"total_steps": math.inf, "time_used": progress}
    if trains_as_recipe(name):
        return poly(contestant.optimizer, **limits, warmup_steps=50)  # the recipes'
    if name in SMP:  # of its multiclass example: from 2e-4 to 1e-5
        return cosine(contestant.optimizer, **limits, final=1e-5 / 2e-4)
    return None


def judge(contestant: Contestant, datamodule: SegmentationDataModule, images: int) -> float:
    """Mean IoU on the first so many images."""
    contestant.network.eval()
    confusion = ConfusionMatrix(len(datamodule.classes), void=255)
    batches: Iterator[Batch] = iter(datamodule.val_dataloader())
    for _ in range(images):
        batch = next(batches)
        height, width = batch["mask"].shape[-2:]
        logits = contestant.logits(contestant.prepare(batch["image"], batch["mask"])[0])
        confusion.update(logits[..., :height, :width].argmax(1).cpu(), batch["mask"])
    contestant.network.train()
    return segmentation_scores(confusion.compute())["miou"]


def race(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One contestant's points and the mean IoU of all images in the end.

    A point is (minutes or steps, mean IoU of the first images).
    """
    ours, datamodule = name.startswith("ours"), opened(name, args)
    assert datamodule.val_data is not None
    changes = [*args.settings, *([f"optimizer.lr={args.rate}"] if args.rate else [])]
    changes += class_weights(args.recipe, changes, datamodule)
    own = [f"experiment={args.recipe}", *changes] if ours else changes
    classes = len(datamodule.classes)
    contestant = make(
        name, args.device, args.weights, *own, recipe=args.recipe, classes=classes, seed=args.seed
    )
    if not ours and best_precision(args.device) == "bf16-mixed":
        compute_as_ours(contestant.network, args.device)
    if name in (*SMP, *SMP_OUR_RECIPE):
        first = next(iter(datamodule.train_dataloader()))
        image, _ = contestant.prepare(first["image"], first["mask"])
        even_out(contestant.network.encoder.features, image)
    everything = len(datamodule.val_data)
    contestant.network.train()
    points: list[tuple[float, float]] = []
    used, steps, marks = 0.0, 0, [k / args.marks for k in range(1, args.marks + 1)]

    def progress() -> float:
        return steps / args.steps if args.steps else used / 60 / args.minutes

    falling = schedule(name, contestant, progress)
    for batch in datamodule.train_dataloader():
        began = time.perf_counter()
        contestant.step(*contestant.prepare(batch["image"], batch["mask"]))
        if args.device == "cuda":
            torch.cuda.synchronize()
        steps += 1
        used += time.perf_counter() - began
        if falling:
            falling.step()
        if progress() >= marks[len(points)]:  # main refuses fewer steps than marks
            score = judge(contestant, datamodule, min(args.first, everything))
            points.append((steps if args.steps else used / 60, score))
            print(name, steps, points[-1], flush=True)
            if len(points) == args.marks:
                break
    miou = judge(contestant, datamodule, everything)
    print(name, "all images:", miou, flush=True)
    result = {"name": name, "points": points, "images": everything, "miou": miou}
    return {**result, "steps_taken": steps, "minutes_taken": used / 60}


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def named(run: dict[str, Any]) -> str:
    """How figure, table and file name a run: network, seed, and a rate that is not the recipe's."""
    rate = f", rate {run['rate']:g}" if run["rate"] else ""
    return f"{run['name']}, {run['seed']}{rate}"


def runs_of(output: Path, conditions: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a race that are in its folder.

    Raises:
        SystemExit: one of them had other conditions, so that it cannot be compared with this race.
    """
    files = sorted(output.glob("*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for file, run in zip(files, runs, strict=True):
        other = [f"{k}={run.get(k)}" for k, value in conditions.items() if run.get(k) != value]
        if other:
            had = ", ".join(other)
            raise SystemExit(f"{file} is of another race, with {had}: give another --output")
    return runs


def draw(runs: list[dict[str, Any]], path: Path, images: int) -> None:
    """Mean IoU of the first so many images over minutes or steps, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for run in runs:
        when, mious = zip(*run["points"], strict=True)
        axes.plot(when, [100 * miou for miou in mious], marker="o", label=named(run))
    unit = "steps" if runs[0]["steps"] else "minutes of training"
    axes.set(xlabel=unit, ylabel=f"mean IoU in %, {images} images")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")  # inside, it could hide a line
    figure.savefig(path, dpi=120)


def table(runs: list[dict[str, Any]]) -> str:
    """What each had reached in the end, on all images, in Markdown."""
    lines = ["| network, seed, rate (if not the recipe's) | minutes | steps | mean IoU |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for run in sorted(runs, key=lambda run: -run["miou"]):
        minutes, steps = run["minutes_taken"], run["steps_taken"]
        lines.append(f"| {named(run)} | {minutes:.1f} | {steps:,} | {100 * run['miou']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train each network for the same minutes or steps, and write marks and figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--recipe", choices=("voc_mini", "camvid_fcn8s", "camvid_fcn4s"), required=True
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", help="a file; without it, what the recipe names")
    parser.add_argument("--rate", type=positive, help="in place of the recipe's optimizer.lr")
    parser.add_argument("--seed", type=int, default=0, help="of images and first weights")
    parser.add_argument("--first", type=count, default=101, help="images to judge on at the marks")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, help="of training; without it, 10")
    length.add_argument("--steps", type=count, help="train for so many instead of for minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--marks", type=count, default=4, help="times of judging, the end included")
    parser.add_argument("--only", nargs="+", help="contestants; without it, all of them")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        help="after the recipe's; those of data for all but torchfcn",
    )
    parser.add_argument("--output", type=Path, help="without it, runs/race/RECIPE")
    args = parser.parse_args()
    if args.steps and args.steps < args.marks:
        parser.error(f"--steps {args.steps}: it must be at least --marks, which is {args.marks}")
    if args.workers < 0:
        parser.error(f"--workers {args.workers}: it must be at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU here")
    args.output = args.output or Path("runs", "race", args.recipe)
    args.weights = args.weights or composed("train", f"experiment={args.recipe}").model.weights
    args.minutes = None if args.steps else args.minutes or 10.0
    same = ("recipe", "minutes", "steps", "device", "workers", "settings", "first")
    conditions = {name: getattr(args, name) for name in same}
    conditions["weights"] = Path(args.weights).name
    runs_of(args.output, conditions)  # before the work
    args.output.mkdir(parents=True, exist_ok=True)
    names = contestants(args.recipe, args.device)
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"--only: there is no {unknown}, but {', '.join(names)}")
    for name in args.only or names:
        rate = args.rate if trains_as_recipe(name) else None
        run = {**race(name, args), "seed": args.seed, "rate": rate, **conditions}
        file = re.sub(r"[ /,]+", "_", named(run)) + ".json"
        (args.output / file).write_text(json.dumps(run), encoding="utf-8")
    runs = runs_of(args.output, conditions)
    draw(runs, args.output / "race.png", args.first)
    (args.output / "table.md").write_text(table(runs), encoding="utf-8")


if __name__ == "__main__":
    with short_messages():
        main()
