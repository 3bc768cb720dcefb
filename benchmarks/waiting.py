"""How much of its time the training loop waits for the loader, by Lightning's own profiler.

    python benchmarks/waiting.py --data-root data --batches 1 2 3 4

train.py takes a few steps on photographs of VOC2012, whole and with conf/'s defaults, with
trainer.profiler=simple, which measures how long the loop waits for a batch before each step. The
first step is left out, because the loader's processes start before it. Each batch size is one run;
--rounds makes no difference. The processes read ahead, so that a loader which keeps up costs the
loop only what it takes to receive a batch.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from peers import composed
from timing import DATA, Table, options

FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name of one fetch
STEP = "run_training_batch"  # and of one step without its fetch
WHY = "the loader's processes share their cores with the network, or are slower than it"


def main(argv: list[str] | None = None) -> list[Table]:
    """Train with each batch size, and report the waits."""
    parser = options(__doc__, steps=6, data_root=DATA)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 3, 4))
    parser.add_argument("overrides", nargs="*", help="of conf/, such as data.num_workers=2")
    args = parser.parse_args(argv)
    table = Table(
        f"Waiting for the loader, {args.steps} steps, {args.device}",
        ("", "ms to wait in a step (longest)", "seconds of a step", "share"),
        [],
    )
    for batch in args.batches:
        data = ["data=voc2012", "data.download=false", f"data.root={args.data_root}"]
        waits, steps = train(
            *data,
            f"data.batch_size={batch}",
            f"trainer.max_steps={args.steps}",
            f"trainer.accelerator={torch.device(args.device).type}",
            *args.overrides,
        )
        share = sum(waits) / (sum(waits) + sum(steps))
        wait = f"{1000 * median(waits):.1f} ({1000 * max(waits):.1f})"
        table.rows.append((f"batch {batch}", wait, f"{median(steps):.3f}", f"{share:.4f}"))
        table.bar(f"batch {batch}: waits at most 0.01 of its time", share, high=0.01, why=WHY)
    return table.show()


def train(*overrides: str) -> tuple[list[float], list[float]]:
    """Seconds of each fetch and of each step, from the second step on.

    No checkpoint and no picture is written. The validation at the end is of one image.
    """
    import fcn.training.fit
    from train import train

    written = ("best_checkpoint", "last_checkpoint", "panels", "curves")
    nothing = [f"callbacks.{name}=null" for name in written]
    nothing += ["logger=none", "trainer.profiler=simple", "trainer.limit_val_batches=1"]
    cfg = composed("train", "name=waiting", "model.weights=null", *nothing, *overrides)
    noted = mock.patch.object(fcn.training.fit, "fit", wraps=fcn.training.fit.fit)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, noted as fit, quiet:
        train(cfg, Path(folder) / "run")
    trainer = fit.call_args.args[0]
    found = trainer.profiler.recorded_durations
    return found[FETCH][1:], found[STEP][1:]


if __name__ == "__main__":
    main()
