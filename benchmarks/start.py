"""Seconds from `python train.py` to the first optimizer step, and what they are spent on.

    python benchmarks/start.py

It starts a full-size FCN-8s on VOC2012 photographs, with W&B (offline) and without. train.py runs
unchanged, in a process that times the imports and notes when the settings are composed, when
Trainer.fit begins, and when the first optimizer step is done. There the process ends.
"""

import builtins
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> list:
    """Time how long the scripts take to start."""
    from timing import DATA, Table, in_turn, options

    parser = options(__doc__, data_root=DATA)
    parser.add_argument("overrides", nargs="*", help="of conf/, such as model.weights=vgg19.pth")
    args = parser.parse_args(argv)
    accelerator = args.device.partition(":")[0].replace("cuda", "gpu")
    common = ["data=voc2012", "data.download=false", f"data.root={args.data_root.resolve()}"]
    common += ["model.weights=null", f"trainer.accelerator={accelerator}", *args.overrides]
    phases: dict[str, list[dict[str, float]]] = {"logger=wandb": [], "logger=none": []}

    def start(logger: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "phases.json"
            command = [sys.executable, __file__, "--child", result, *common, logger]
            clock = {"WANDB_MODE": "offline", "STARTED": repr(time.time())}
            done = subprocess.run(command, cwd=folder, env=os.environ | clock, capture_output=True)
            if not result.is_file():
                raise RuntimeError(f"train.py took no step:\n{done.stderr.decode()}")
            phases[logger].append(json.loads(result.read_text(encoding="utf-8")))
        return sum(phases[logger][-1].values())

    seconds = in_turn({name: lambda x=name: start(x) for name in phases}, args.rounds)
    rows = []
    for name, taken in seconds.items():
        timed = phases[name][-args.rounds :]
        rows.append((name, *(f"{median(x[p] for x in timed):.2f}" for p in timed[0])))
        rows[-1] = (*rows[-1], f"{median(taken):.2f}")
    columns = ("", *phases["logger=none"][0], "all")
    return Table(f"Start: seconds to the first step, {args.device}", columns, rows).show()


def child(result: Path, overrides: list[str]) -> None:
    """Run train.py and write down what its time was spent on."""
    begun, real_import, depth = (
        float(os.environ.get("STARTED", time.time())),
        builtins.__import__,
        0,
    )
    spent = {"imports": time.time() - begun}  # Python itself

    def timed_import(*args, **kwargs):
        nonlocal depth
        depth, since = depth + 1, time.time()
        try:
            return real_import(*args, **kwargs)
        finally:
            depth -= 1
            if depth == 0:
                spent["imports"] += time.time() - since

    def ends(phase: str) -> None:
        spent[phase] = time.time() - begun - sum(spent.values())

    builtins.__import__ = timed_import
    sys.path.insert(0, str(ROOT))
    import fcn.training.settings

    check = fcn.training.settings.check_settings

    def composed(config) -> None:
        ends("config")
        import pytorch_lightning as pl
        from torch.optim.optimizer import register_optimizer_step_post_hook

        fit = pl.Trainer.fit
        pl.Trainer.fit = lambda *args, **kwargs: (ends("build"), fit(*args, **kwargs))
        register_optimizer_step_post_hook(stepped)
        check(config)

    def stepped(*_) -> None:
        ends("first batch")
        result.write_text(json.dumps(spent), encoding="utf-8")
        os._exit(0)

    fcn.training.settings.check_settings = composed
    sys.argv = [str(ROOT / "train.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
