"""What each setting that saves memory or time does to a training step.

    python benchmarks/levers.py --size 500 500 --batch 1

The network is a VGG-19 FCN-8s of full width, timed as in training.py. Each row has the default
settings with the one change that it names. Memory is the peak of the process, which includes freed
memory that malloc keeps (fcn.precision.keep_freed_memory); `python -m fcn.memory` says what a step
needs.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

from peers import OURS, make, ours_here, random_batch, require
from timing import Table, options, race, shown

BASE = "as it is"
LEVERS = (  # one race each, because all candidates of a race are in memory at once
    ("trainer.precision=32-true", "model.checkpoint_stages=2", "model.freeze_stages=2"),
    ("model.freeze_stages=4", "model.head_width=1024", "data.crop_size=320"),
    ("model.channels_last=true", "model.channels_last=false"),  # one of them is the default here
    ("model.pooling=avg", "trainer.compile=true"),
)


def entrant(lever: str, device: str, size: tuple[int, int, int]) -> Callable[[], Callable]:
    """An entrant of `race`: imports now, and builds the network when asked."""
    name = ours_here(device)
    if lever == "trainer.precision=32-true":
        name = next(n for n in OURS if OURS[n] == (OURS[name][0], "32-true"))
    require(name)
    if lever.startswith("data.crop_size="):
        size = (size[0], *[int(lever.partition("=")[2])] * 2)

    def build() -> Callable:
        contestant = make(name, device, None, *([] if lever == BASE else [lever]))
        contestant.network.train()
        return partial(contestant.step, *contestant.prepare(*random_batch(*size)))

    return build


def main(argv: list[str] | None = None) -> list[Table]:
    """Time a step with each setting that saves memory, and its peak."""
    args = options(__doc__, size=(500, 500), batch=1).parse_args(argv)
    table = Table(
        f"Levers, vgg19, {args.size[0]}×{args.size[1]}, batch {args.batch}, {args.device}",
        ("", "seconds (range)", "of the step as it is", "peak MB"),
        [],
    )
    for levers in LEVERS:
        size = (args.batch, *args.size)
        entrants = {lever: partial(entrant, lever, args.device, size) for lever in (BASE, *levers)}
        seconds, memory, notes = race(entrants, args.device, args.rounds)
        table.notes += notes
        for name, taken in seconds.items():
            share = median(a / b for a, b in zip(taken, seconds[BASE], strict=True))
            peak = f"{memory[name] / 2**20:.0f}"
            table.rows = [*table.rows, (f"`{name}`", shown(taken), f"{share:.2f}", peak)]
    return table.show()


if __name__ == "__main__":
    main()
