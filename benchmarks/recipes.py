"""What each choice of a recipe is worth, at one budget: the tables of docs/results.md.

    python benchmarks/recipes.py --recipe camvid_fcn8s --data DIR
    python benchmarks/recipes.py --recipe voc_mini --data DIR
    python benchmarks/recipes.py ... --only base 16s 32s --seeds 0 1 --all optimizer.lr=5e-5

Each row is a training run of train.py with the settings of its recipe's BUDGET, and an evaluation
by evaluate.py at native resolution. In voc_mini, the first four VGG stages are the same in all rows
and learn nothing, so their output for a batch is computed once and kept in memory. This changes no
number: they are those of the plain commands, which are printed. A row that is in the output folder
already is not run again, and one that was interrupted is resumed; where it was begun by another
command, it is refused.
"""

import argparse
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peers import composed
from torch import Tensor, nn
from torch.nn import functional as F

import fcn.network
from evaluate import evaluate
from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.cli import short_messages
from fcn.files import write_json
from fcn.metrics import SCORES
from fcn.module import SegmentationModule
from fcn.runs.resume import resumed_config
from train import train

BUDGET = {
    "voc_mini": (
        "experiment=voc_mini",
        "data.train_split=mini_train335",
        "trainer.max_time=null",
        "trainer.max_steps=600",
        "data.crop_size=256",
        "data.scale=null",
    ),
    "camvid_fcn8s": (
        "experiment=camvid_fcn8s",
        "trainer.max_steps=600",
        "trainer.val_check_interval=100000",  # only at the end
    ),
}
SGD = ("optimizer=sgd", "model.head_lr_multiplier=20")
VOC_ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    "16s": ("model=fcn16s",),
    "32s": ("model=fcn32s",),
    "staged 32s": ("model=fcn32s", "trainer.max_steps=200"),
    "staged 16s": ("model=fcn16s", "trainer.max_steps=200", "model.weights=staged 32s"),
    "staged 8s": ("trainer.max_steps=200", "model.weights=staged 16s"),
    "fast skips": ("model.pool_scales=[0.4,0.0125,0.0025]",),
    "16s, fast skips": ("model=fcn16s", "model.pool_scales=[0.4,0.0125,0.0025]"),
    "deep skips": ("model.deep_skips=true",),
    "less dropout": ("model.dropout=0.1",),
    "16s, less dropout": ("model=fcn16s", "model.dropout=0.1"),
    "fixed upsampling": ("model.learn_upsampling=false",),
    "fixed last upsampling": ("model.learn_last_upsampling=false",),
    "feature fusion": ("model.fusion=feature",),
    "momentum 0.99": (*SGD, "optimizer.lr=1e-4", "optimizer.momentum=0.99"),
    "momentum 0.9, 5 batches a step": (
        *SGD,
        "optimizer.lr=5e-3",
        "trainer.accumulate_grad_batches=5",
        "trainer.max_steps=120",
        "scheduler.warmup_steps=10",
    ),
    "no schedule": ("scheduler=none",),
    "no clipping": ("trainer.gradient_clip_val=null",),
    "averaged weights": ("callbacks=ema", "callbacks.ema.decay=0.98"),
    "scale augmentation": ("data.scale=[0.5,1.5]",),
    "colour jitter": ("data.jitter=0.3",),
    "label smoothing": (),
    "hard pixels": (),
    "class weights": (),
    "Dice": (),
    "random VGG": ("model.freeze_stages=0", "model.weights=null", "model.pool_scales=[1,1,1]"),
}
# Weights of sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist.
THIN_CLASSES = "model.class_weights=[1,1,3,1,1,1,3,2,1,3,3]"
CAMVID_ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    "4s": ("model=fcn4s",),
    "4s, skips of 3x3": ("model=fcn4s", "model.skip_kernel=3"),
    "16s": ("model=fcn16s",),
    "32s": ("model=fcn32s",),
    "skips of the paper": ("model.deep_skips=false",),
    "feature fusion": ("model.fusion=feature", "model.deep_skips=false"),
    "slower skips": ("model.pool_scales=[0.4,0.00125,0.00025]",),
    "faster skips": ("model.pool_scales=[0.4,0.04,0.01]",),
    "whole frames, no zoom": ("data.crop_size=[360,480]", "data.scale=null"),
    "whole frames": ("data.crop_size=[360,480]",),
    "no zoom": ("data.scale=null",),
    "more zoom": ("data.scale=[0.5,2]",),
    "rotation": ("data.rotate=10",),
    "no colour jitter": ("data.jitter=null",),
    "no frozen stage": ("model.freeze_stages=0",),
    "1 frozen stage": ("model.freeze_stages=1",),
    "3 frozen stages": ("model.freeze_stages=3",),
    "4 frozen stages": ("model.freeze_stages=4",),
    "half the rate": ("optimizer.lr=3e-5",),
    "twice the rate": ("optimizer.lr=1.2e-4",),
    "head 10 times as fast": ("model.head_lr_multiplier=10",),
    "head 40 times as fast": ("model.head_lr_multiplier=40",),
    "no dropout": ("model.dropout=0",),
    "more dropout": ("model.dropout=0.5",),
    "2 crops a step": (
        "data.batch_size=2",
        "trainer.max_steps=1200",
        "scheduler.warmup_steps=100",
    ),
    "no class weights": ("model.class_weights=null",),
    "thin classes": (THIN_CLASSES,),
    "balanced classes": ("model.class_weights=balanced",),
    "averaged weights": ("callbacks=ema", "callbacks.ema.decay=0.99"),
    "narrower head": ("model.head_width=256",),
    "wider head": ("model.head_width=1024",),
    "head of 3x3": ("model.head_kernel=3",),
    "first form": (  # what the recipe had before 2026-11-28, but for its class weights
        "model.class_weights=null",
        "model.deep_skips=false",
        "model.dropout=0.5",
        "optimizer.lr=3e-5",
    ),
    "flips at test time": (),
    "flips and two sizes at test time": (),
}
ROWS = {"voc_mini": VOC_ROWS, "camvid_fcn8s": CAMVID_ROWS}
# Rows that are the base, evaluated in another way.
EVALUATION = {
    "flips at test time": ("tta.flip=true",),
    "flips and two sizes at test time": ("tta.flip=true", "tta.scales=[1,1.5]"),
}


def smoothed(logits: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(
        logits, mask, ignore_index=255, reduction="sum", label_smoothing=0.1
    ) / valid(mask)


def hard_pixels(logits: Tensor, mask: Tensor) -> Tensor:
    """The quarter with the largest loss (Shrivastava et al. 2016, for pixels)."""
    each = F.cross_entropy(logits, mask, ignore_index=255, reduction="none").flatten()
    return each.topk(max(1, int(valid(mask)) // 4)).values.mean()


def class_weights(logits: Tensor, mask: Tensor) -> Tensor:
    """1 / sqrt(share of the class's pixels): background is 3/4 of all, others about 1 % each."""
    weights = torch.full((21,), 0.01**-0.5)
    weights[0] = 0.75**-0.5
    return F.cross_entropy(logits, mask, weight=weights / weights.mean(), ignore_index=255)


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy plus 1 - the mean Dice coefficient of the classes that are there."""
    known = (mask != 255).unsqueeze(1)
    target = F.one_hot(mask.where(mask != 255, 0), 21).permute(0, 3, 1, 2) * known
    p = logits.softmax(1) * known
    both, each = (p * target).sum((0, 2, 3)), (p + target).sum((0, 2, 3))
    there = target.sum((0, 2, 3)) > 0
    coefficient = (2 * both / each.clamp(min=1))[there].mean()
    return F.cross_entropy(logits, mask, ignore_index=255) + 1 - coefficient


def valid(mask: Tensor) -> Tensor:
    return (mask != 255).sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing": smoothed,
    "hard pixels": hard_pixels,
    "class weights": class_weights,
    "Dice": dice,
}


class KeptStage(nn.Sequential):
    """A frozen VGG stage, with its weights, that computes each batch only once."""

    number = 0
    kept: ClassVar[dict[bytes, dict[int, Tensor]]] = {}
    key = b""

    def forward(self, x: Tensor) -> Tensor:
        if self.number == 1:
            KeptStage.key = hashlib.sha1(x.cpu().numpy().tobytes()).digest()
        if self.key in self.kept and 4 in self.kept[self.key]:
            return self.kept[self.key].get(self.number, x)  # pool3 and pool4; 1 and 2 are not read
        with torch.no_grad():
            y = super().forward(x)
        if self.number >= 3:
            self.kept.setdefault(self.key, {})[self.number] = y
        return y


def keep_frozen_stages() -> None:
    """From now on, an FCN with four frozen stages keeps the output of these."""
    build = fcn.network.FCN.__init__

    def init(self: fcn.network.FCN, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        # Deep skips read the fourth stage before its pool, which is not kept.
        if options.get("freeze_stages") == 4 and not options.get("deep_skips"):
            for number, stage in enumerate(self.stages[:4], start=1):
                stage.__class__, stage.number = KeptStage, number

    fcn.network.FCN.__init__ = init


def run_row(
    name: str, overrides: Sequence[str], output: Path, seed: int, options: Sequence[str]
) -> dict[str, Any]:
    """Train and evaluate one row, or what is left of that; its metrics.json.

    Args:
        options: of evaluate.py. If there are any, the base is evaluated again with them.
    """
    run = folder_of("base" if options else name, output, seed)
    elsewhere = folder_of(name, output, seed) / "evaluation" if options else run / "evaluation"
    result = elsewhere / "metrics.json"
    if not result.is_file():
        if not options:
            _train(name, overrides, run, seed)
        ckpt = [f"ckpt={best_checkpoint(run)}", f"output={elsewhere}"]
        evaluate(composed("evaluate", *ckpt, "report.images=0", *options))
    return json.loads(result.read_text(encoding="utf-8"))


def folder_of(name: str, output: Path, seed: int) -> Path:
    """The run folder of a row."""
    return output / name.replace(" ", "_").replace(",", "") / f"seed{seed}"


def _train(name: str, overrides: Sequence[str], run: Path, seed: int) -> None:
    plain_loss = SegmentationModule.training_step
    if name in LOSSES:
        loss = LOSSES[name]
        SegmentationModule.training_step = lambda self, batch, number: loss(
            self(batch["image"]).float(), batch["mask"].long()
        )
    last = ["trainer.limit_val_batches=1", "callbacks.panels.images=1"]  # evaluate.py judges
    last += [f"seed={seed}", "data.num_workers=0", "trainer.enable_progress_bar=false"]
    last += ["callbacks.last_checkpoint.every_n_steps=50"]
    begun = last_checkpoint(run).is_file()
    if not begun and run.exists():  # killed before its first checkpoint
        shutil.rmtree(run)
    try:
        cfg = composed("train", *overrides, *last, "logger=none")
        train(resumed_config(run, []) if begun else cfg, run)
    finally:
        SegmentationModule.training_step = plain_loss


def main() -> None:
    """Run the chosen rows, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", choices=list(ROWS), required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", help="a file; without it, what the recipe names")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", help="rows; without it, all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--all", nargs="+", default=[], help="settings of all rows, before a row's")
    args = parser.parse_args()
    rows, output = ROWS[args.recipe], args.output or Path("runs", "recipes", args.recipe)
    if unknown := set(args.only or ()) - set(rows):
        parser.error(f"--only: {args.recipe} has no rows {unknown}, but {', '.join(rows)}")
    chosen = args.only or list(rows)
    if set(chosen) & set(EVALUATION):
        chosen = list(dict.fromkeys(["base", *chosen]))  # whose run they evaluate
    output.mkdir(parents=True, exist_ok=True)
    if args.recipe == "voc_mini":
        keep_frozen_stages()
    for seed in args.seeds:
        KeptStage.kept.clear()  # another seed has other crops
        for name in chosen:
            given = [*BUDGET[args.recipe], *args.all, f"data.root={args.data}"]
            given += [f"model.weights={args.weights}"] if args.weights else []
            for setting in rows[name]:
                key, _, value = setting.partition("=")
                if key == "model.weights" and value in rows:  # of a row before
                    value = str(best_checkpoint(folder_of(value, output, seed)).absolute())
                given.append(f"{key}={value}")
            options = EVALUATION.get(name, ())
            command = shlex.join(["python", "train.py", *given, f"seed={seed}"])
            if options:
                command += f" && {shlex.join(['python', 'evaluate.py', 'ckpt=RUN', *options])}"
            file = output / f"{name}_{seed}.json"
            begin(file, folder_of(name, output, seed), {"row": name, "seed": seed}, command)
            metrics = run_row(name, given, output, seed, options)
            boundary = list(metrics["boundary_miou"].values())
            row = {
                "row": name,
                "seed": seed,
                **{key: metrics[key] for key in SCORES},
                "boundary_miou": sum(boundary) / len(boundary),
                "iou": metrics["iou"],
                "command": command,
            }
            write_json(file, row)
            print(json.dumps(row), flush=True)
    (output / "table.md").write_text(table(output, rows), encoding="utf-8")


def begin(file: Path, folder: Path, row: Mapping[str, Any], command: str) -> None:
    """Write a row without scores, so that an interrupted one is known by the command that began it.

    Raises:
        SystemExit: what is there was made with another command, or nothing says with which one.
    """
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = written.get("command")
    if not folder.exists() and "miou" not in written:  # an error ended it before it began
        write_json(file, {**row, "command": command})
    elif known != command:
        made = f"{file} was" if known else f"{folder} may have been"
        raise SystemExit(f"{made} made with other settings: give another --output")


def table(output: Path, rows: Mapping[str, Sequence[str]]) -> str:
    """All rows that have been run, means over their seeds, in Markdown."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob("*.json")]
    lines = ["| row | settings | seeds | mean IoU | near boundaries | pixel acc. |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, own in rows.items():
        runs = [row for row in found if row["row"] == name and "miou" in row]  # not only begun
        if not runs:
            continue
        names = ("miou", "boundary_miou", "pixel_acc")
        values = [100 * sum(run[n] for run in runs) / len(runs) for n in names]
        settings = [*own, *EVALUATION.get(name, ())]
        shown = " ".join(f"`{o}`" for o in settings) or ("its own loss" if name in LOSSES else "")
        numbers = " | ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {shown} | {len(runs)} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with short_messages():
        main()
