"""What each choice is worth, on 335 photographs: the table of docs/results.md.

    python benchmarks/recipes.py --data DIR --weights vgg19_features.pth --output runs/recipes
    python benchmarks/recipes.py ... --only base 16s 32s --seeds 0 1 --all optimizer.lr=5e-5

Each row is a training run of train.py with the settings of BUDGET, and an evaluation by evaluate.py
at native resolution. The first four VGG stages are the same in all rows and learn nothing, so their
output for a batch is computed once and kept in memory. This changes no number: they are those of
the plain commands, which are printed. A row that is in the output folder already is not run again.
"""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peers import composed
from torch import Tensor, nn
from torch.nn import functional as F

import fcn.network
from evaluate import evaluate
from fcn.checkpoint import best_checkpoint
from fcn.files import write_json
from fcn.module import SegmentationModule
from train import train

BUDGET = (
    "experiment=voc_mini",
    "trainer.max_time=null",
    "trainer.max_steps=600",
    "data.crop_size=256",
    "data.scale=null",
)
SGD = ("optimizer=sgd", "model.head_lr_multiplier=20")
ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    "16s": ("model=fcn16s",),
    "32s": ("model=fcn32s",),
    "staged 32s": ("model=fcn32s", "trainer.max_steps=200"),
    "staged 16s": ("model=fcn16s", "trainer.max_steps=200", "model.weights=staged 32s"),
    "staged 8s": ("trainer.max_steps=200", "model.weights=staged 16s"),
    "fast skips": ("model.pool_scales=[0.4,0.0125,0.0025]",),
    "16s, fast skips": ("model=fcn16s", "model.pool_scales=[0.4,0.0125,0.0025]"),
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
            KeptStage.key = hashlib.sha1(x.numpy().tobytes()).digest()
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
        if options.get("freeze_stages") == 4:
            for number, stage in enumerate(self.stages[:4], start=1):
                stage.__class__, stage.number = KeptStage, number

    fcn.network.FCN.__init__ = init


def run_row(name: str, overrides: Sequence[str], output: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate one row, unless that is done; its metrics.json."""
    run = output / name.replace(" ", "_").replace(",", "") / f"seed{seed}"
    result = run / "evaluation" / "metrics.json"
    if not result.is_file():
        plain_loss = SegmentationModule.training_step
        if name in LOSSES:
            loss = LOSSES[name]
            SegmentationModule.training_step = lambda self, batch, number: loss(
                self(batch["image"]).float(), batch["mask"].long()
            )
        last = ["trainer.limit_val_batches=1", "callbacks.panels.images=1"]  # evaluate.py judges
        last += [f"seed={seed}", "data.num_workers=0", "trainer.enable_progress_bar=false"]
        try:
            train(composed("train", *overrides, *last, "logger=none"), run)
        finally:
            SegmentationModule.training_step = plain_loss
        ckpt = f"ckpt={best_checkpoint(run)}"
        evaluate(composed("evaluate", ckpt, "report.images=0"))
    return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Run the chosen rows, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--all", nargs="+", default=[], help="settings of all rows, before a row's")
    args = parser.parse_args()
    keep_frozen_stages()
    for seed in args.seeds:
        KeptStage.kept.clear()  # another seed has other crops
        for name in args.only:
            own = [o for o in ROWS[name] if not o.startswith("model.weights=")]
            weights = next((o[14:] for o in ROWS[name] if o.startswith("model.weights=")), None)
            if weights is None:
                weights = args.weights
            elif weights != "null":
                folder = args.output / weights.replace(" ", "_") / f"seed{seed}"
                weights = str(best_checkpoint(folder).absolute())
            given = [*BUDGET, *args.all, *own, f"data.root={args.data}", f"model.weights={weights}"]
            command = shlex.join(["python", "train.py", *given, f"seed={seed}"])
            file = args.output / f"{name}_{seed}.json"
            if (
                file.is_file()
                and json.loads(file.read_text(encoding="utf-8"))["command"] != command
            ):
                raise SystemExit(f"{file} was made with other settings: give another --output")
            metrics = run_row(name, given, args.output, seed)
            boundary = list(metrics["boundary_miou"].values())
            row = {
                "row": name,
                "seed": seed,
                **{key: metrics[key] for key in ("miou", "pixel_acc", "mean_acc", "fwiou")},
                "boundary_miou": sum(boundary) / len(boundary),
                "command": command,
            }
            write_json(file, row)
            print(json.dumps(row), flush=True)
    (args.output / "table.md").write_text(table(args.output), encoding="utf-8")


def table(output: Path) -> str:
    """All rows that have been run, means over their seeds, in Markdown."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob("*_[0-9].json")]
    lines = ["| row | settings | seeds | mean IoU | near boundaries | pixel acc. |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, own in ROWS.items():
        runs = [row for row in found if row["row"] == name]
        if not runs:
            continue
        names = ("miou", "boundary_miou", "pixel_acc")
        values = [100 * sum(run[n] for run in runs) / len(runs) for n in names]
        shown = " ".join(f"`{o}`" for o in own) or ("its own loss" if name in LOSSES else "")
        numbers = " | ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {shown} | {len(runs)} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
