"""Images per second of evaluate.py's loop against the network alone.

    python benchmarks/evaluation.py --images 60

Both go through the same photographs, one by one at their own size, in the precision that training
would use on this machine. The loop also reads and decodes them, counts the confusion matrix and
scores each image; for the network alone they are in memory already. The loop's seconds are those
that evaluate.py reports, which include the start of its loader.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from statistics import median

import torch
from peers import composed, save_checkpoint
from timing import DATA, Table, in_turn, options, speedup, timed


def main(argv: list[str] | None = None) -> list[Table]:
    """Time evaluate.py and the bare network in turn."""
    parser = options(__doc__, images=60, data_root=DATA)
    parser.add_argument("overrides", nargs="*", help="of conf/, such as model.head_width=512")
    args = parser.parse_args(argv)

    from evaluate import evaluate
    from fcn import cli
    from fcn.module import SegmentationModule
    from fcn.precision import cast_weights

    kind = torch.device(args.device).type
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"trainer.accelerator={kind}", *args.overrides]
        path, precision = save_checkpoint(Path(folder) / "last.ckpt", *overrides)
        overrides = [f"ckpt={path}", f"output={folder}/evaluation", f"accelerator={kind}"]
        overrides += ["data=voc2012", f"data.root={args.data_root}", f"data.limit={args.images}"]
        cfg = composed("evaluate", *overrides, "data.download=false")
        module = SegmentationModule.load_from_checkpoint(path).to(args.device).eval()
        cast_weights(module.network, precision)
        data = cli.build(cfg, "data")
        loader = data.eval_dataloader(data.open(cfg.split or data.val_split))
        images = [batch["image"].to(args.device) for batch in loader]

        def loop() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                return len(images) / evaluate(cfg.copy())["images_per_second"]

        @torch.inference_mode()
        def network() -> None:
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16-mixed"):
                for image in images:
                    module(image)

        runs = {"evaluate.py's loop": loop, "network alone": lambda: timed(network, args.device)}
        seconds = in_turn(runs, args.rounds)
    table = Table(
        f"Evaluation, {len(images)} photographs, {precision}, {args.device}",
        ("", "images/s", "of the network's"),
        [
            (n, f"{len(images) / median(x):.2f}", f"{speedup(seconds, n, 'network alone'):.2f}")
            for n, x in seconds.items()
        ],
    )
    share = speedup(seconds, "evaluate.py's loop", "network alone")
    table.bar("evaluation loop at least 0.9 of the network alone", share, low=0.9)
    return table.show()


if __name__ == "__main__":
    main()
