"""How much of our training step its convolutions take, which is the least that it can take.

    python benchmarks/floor.py --size 375 500 --batch 1

It runs the convolutions of one step, transposed ones too, forward and backward and with the same
shapes, and nothing else. The first one needs no gradient of its input. Weights, inputs and
gradients exist beforehand, in the precision and memory layout of the row; float32 alone where ours
is float32. The share in the last column is their time over that of our whole step.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import product
from statistics import median

import torch
from peers import make, ours_here, random_batch, require
from timing import Table, options, race, shown, speedup
from torch import Tensor, nn
from training import entrant

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
REST = "the rest are passes over 140 million parameters, and elementwise layers"
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def convolutions(
    name: str,
    device: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Callable[[], Callable]:
    """An entrant of `race`: imports now, and builds the network when asked."""
    require(name)

    def build() -> Callable:
        """Note the shapes of all convolutions in one step, and return a step of these alone."""
        contestant, jobs = make(name, device), []

        def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            jobs.append((layer, inputs[0].shape, output.shape, inputs[0].requires_grad))

        kinds = nn.Conv2d | nn.ConvTranspose2d
        layers = [m for m in contestant.network.modules() if isinstance(m, kinds)]
        handles = [layer.register_forward_hook(note) for layer in layers]
        with contestant.autocast():
            contestant.network.train()(contestant.prepare(*random_batch(*size))[0])
        for handle in handles:
            handle.remove()
        options = {"dtype": dtype, "memory_format": layout}

        @cache  # one tensor for all uses of a shape: the values do not matter, the memory does
        def values(shape: torch.Size) -> Tensor:
            return torch.randn(shape, device=device).to(**options)

        def prepared(layer: nn.Module, shape: torch.Size, out: torch.Size, wanted: bool) -> tuple:
            x, gradient = values(shape).detach(), values(out)
            sources = [p for p in layer.to(**options).parameters() if p.requires_grad]
            return layer, x.requires_grad_(wanted), [*sources, x][: len(sources) + wanted], gradient

        ready = [prepared(*job) for job in jobs]

        def run() -> None:
            for layer, x, sources, gradient in ready:
                torch.autograd.grad(layer(x), sources, gradient)

        return run

    return build


def main(argv: list[str] | None = None) -> list[Table]:
    """Time our step and the convolutions alone in turn."""
    args = options(__doc__, size=(375, 500), batch=1).parse_args(argv)
    size, ours = (args.batch, *args.size), ours_here(args.device)
    entrants = {ours: partial(entrant, ours, args.device, size, True)}
    fast = {name: dtype for name, dtype in PRECISIONS.items() if name in ("float32", *ours.split())}
    for (precision, dtype), (layout, order) in product(fast.items(), LAYOUTS.items()):
        job = partial(convolutions, ours, args.device, size, dtype, order)
        entrants[f"its convolutions, {precision}, {layout}"] = job
    seconds, _, notes = race(entrants, args.device, args.rounds)
    table = Table(
        f"Floor, {args.size[0]}×{args.size[1]}, batch {args.batch}, {args.device}",
        ("", "seconds (range)", "of our step"),
        [(name, shown(x), f"{speedup(seconds, ours, name):.2f}") for name, x in seconds.items()],
        notes,
    )
    best = min((n for n in seconds if n != ours), key=lambda n: median(seconds[n]))
    share = speedup(seconds, ours, best)
    table.bar(f"share of {best} in the step at least 0.8", share, low=0.8, why=REST)
    return table.show()


if __name__ == "__main__":
    main()
