"""Images per second of evaluate.py's and predict.py's loops against the network alone.

    python benchmarks/loops.py --data-root data

All three go through the same photographs, one by one at their own size, in the precision that
training would use on this machine. For the network alone they are in memory already. The loops also
read and decode them. evaluate.py computes the loss and scores each image; predict.py writes a mask
and an overlay for each. Their seconds are those that they report themselves: with the start of a
loader, without that of Python and without reading the checkpoint.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from peers import composed, save_checkpoint
from timing import DATA, Table, in_turn, options, speedup, timed

ALONE = "network alone"
WHY = (
    "reading, scoring and writing need CPU time, which a network on the same few cores would use; "
    "the faster the network, the larger is their share"
)


def main(argv: list[str] | None = None) -> list[Table]:
    """Time the bare network and both loops in turn."""
    parser = options(__doc__, images=175, data_root=DATA)
    parser.add_argument("overrides", nargs="*", help="of conf/, such as model.head_width=512")
    args = parser.parse_args(argv)

    from fcn import cli
    from fcn.inference.predictor import load_predictor
    from fcn.precision import keep_freed_memory

    keep_freed_memory()  # as both scripts do
    kind = torch.device(args.device).type
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [f"trainer.accelerator={kind}", *args.overrides]
        path, precision = save_checkpoint(folder / "last.ckpt", *overrides)
        overrides = [f"ckpt={path}", f"output={folder}/evaluation", f"accelerator={kind}"]
        overrides += ["data=voc2012", f"data.root={args.data_root}", f"data.limit={args.images}"]
        evaluation = composed("evaluate", *overrides, "data.download=false")
        data = cli.build(evaluation, "data")
        split = data.open(evaluation.split or data.val_split)
        photos = [split.pairs[name][0] for name in split.ids]
        (folder / "photos").mkdir()
        for photo in photos:
            shutil.copy(photo, folder / "photos")
        overrides = [f"ckpt={path}", f"input={folder}/photos", f"output={folder}/predictions"]
        prediction = composed("predict", *overrides, f"device={args.device}")
        scores = load_predictor(path, args.device).scores  # the forward pass of both scripts
        images = [batch["image"].to(args.device) for batch in data.eval_dataloader(split)]

        @torch.inference_mode()
        def network() -> None:
            for image in images:
                scores(image)

        runs = {
            ALONE: lambda: timed(network, args.device),
            "evaluate.py's loop": lambda: evaluation_loop(evaluation.copy()),
            "predict.py's loop": lambda: prediction_loop(prediction.copy()),
        }
        # A loop over so many photographs needs no other one before it to warm up.
        seconds = in_turn(runs, args.rounds, warmup=0)
    table = Table(
        f"Loops, {len(images)} photographs, {precision}, {args.device}",
        ("", "images/s", "of the network's"),
        [
            (n, f"{len(images) / median(x):.2f}", f"{speedup(seconds, n, ALONE):.3f}")
            for n, x in seconds.items()
        ],
    )
    for name in list(runs)[1:]:
        share = speedup(seconds, name, ALONE)
        table.bar(f"{name} at least 0.95 of the network alone", share, low=0.95, why=WHY)
    return table.show()


def evaluation_loop(cfg: Any) -> float:
    """Seconds of evaluate.py's loop over all images, as it counts them."""
    from evaluate import evaluate

    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(cfg)
    return found["images"] / found["images_per_second"]


def prediction_loop(cfg: Any) -> float:
    """Seconds of predict.py's loop over all photographs."""
    from fcn.inference import predictor
    from predict import predict

    taken = []
    real = predictor.predict_files

    def predict_files(*given: Any, **options: Any) -> dict[Path, str]:
        failed: dict[Path, str] = {}
        taken.append(timed(lambda: failed.update(real(*given, **options))))
        return failed

    quiet = contextlib.redirect_stdout(io.StringIO())
    with mock.patch.object(predictor, "predict_files", predict_files), quiet:
        predict(cfg)
    return taken[0]


if __name__ == "__main__":
    main()
