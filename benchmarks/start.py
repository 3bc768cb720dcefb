"""Seconds from `python train.py` to the first optimizer step, and what they are spent on.

    python benchmarks/start.py

It starts experiment=quickstart, with W&B (offline) and without. train.py runs unchanged, in a
process that times the imports and notes when the settings are composed, when Trainer.fit begins,
and when the first optimizer step is done. There the process ends. The last row is what no program
of this kind can avoid: a process that imports torch, torchvision and Lightning, builds the same
network, and takes one step with it on a batch of noise.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BARE = "imports and one step of the bare network"
WHY = "composing settings, checking data and starting the loader take longer on this machine"


def main(argv: list[str] | None = None) -> list:
    """Time how long the scripts take to start."""
    from timing import Table, in_turn, options, speedup

    parser = options(__doc__)
    parser.add_argument("overrides", nargs="*", help="of conf/, such as data.num_workers=0")
    args = parser.parse_args(argv)
    accelerator = args.device.partition(":")[0].replace("cuda", "gpu")
    common = ["experiment=quickstart", f"trainer.accelerator={accelerator}", *args.overrides]
    commands = {name: ["--child", *common, name] for name in ("logger=wandb", "logger=none")}
    commands[BARE] = ["--bare", json.dumps(bare_settings(args.device, *common))]
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in commands}

    def start(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "phases.json"
            kind, *settings = commands[name]
            command = [sys.executable, __file__, kind, result, *settings]
            clock = {"WANDB_MODE": "offline", "STARTED": repr(time.time())}
            done = subprocess.run(command, cwd=folder, env=os.environ | clock, capture_output=True)
            if not result.is_file():
                raise RuntimeError(f"{name}: there was no step:\n{done.stderr.decode()}")
            phases[name].append(json.loads(result.read_text(encoding="utf-8")))
        return sum(phases[name][-1].values())

    seconds = in_turn({name: lambda x=name: start(x) for name in phases}, args.rounds)
    rows = []
    for name, taken in seconds.items():
        timed = phases[name][-args.rounds :]
        rows.append((name, *(f"{median(x[p] for x in timed):.2f}" for p in timed[0])))
        rows[-1] = (*rows[-1], f"{median(taken):.2f}")
    columns = ("", *phases["logger=none"][0], "all")
    table = Table(f"Start: seconds to the first step, {args.device}", columns, rows)
    ratio = speedup(seconds, BARE, "logger=none")
    table.bar(f"logger=none: at most 1.5 times {BARE}", ratio, high=1.5, why=WHY)
    return table.show()


def bare_settings(device: str, *overrides: str) -> dict[str, Any]:
    """What a process needs that builds the network of train.py without Hydra, as plain values."""
    from inspect import signature

    from peers import configured

    from fcn.network import FCN

    cfg, module = configured(*overrides)
    arguments = {k: v for k, v in module.hparams.items() if k in signature(FCN).parameters}
    side = cfg.data.dataset.size
    return {
        "network": arguments,
        "batch": (cfg.data.batch_size, 3, side, side),
        "precision": cfg.trainer.precision,
        "device": device,
    }


def bare(result: Path, settings: dict[str, Any]) -> None:
    """Import, build the network and take one step with it; write down how long that took."""
    begun = float(os.environ.get("STARTED", time.time()))
    spent: dict[str, float] = {}

    def ends(phase: str) -> None:
        spent[phase] = time.time() - begun - sum(spent.values())

    import pytorch_lightning  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    sys.path.insert(0, str(ROOT))
    from fcn.network import FCN
    from fcn.precision import AUTOCAST

    ends("imports")
    ends("config")  # it has none
    kind, dtype = torch.device(settings["device"]).type, AUTOCAST.get(settings["precision"])
    network = FCN(**settings["network"]).to(settings["device"])
    optimizer = torch.optim.AdamW(network.parameters())
    ends("build")
    image = torch.randint(256, settings["batch"], dtype=torch.uint8)  # (N, 3, H, W)
    mask = torch.randint(settings["network"]["num_classes"], image[:, 0].shape)  # (N, H, W)
    with torch.autocast(kind, dtype, enabled=dtype is not None):
        logits = network(image.to(settings["device"]))  # (N, K, H, W)
    torch.nn.functional.cross_entropy(logits.float(), mask.to(settings["device"])).backward()
    optimizer.step()
    if kind != "cpu":
        torch.accelerator.synchronize()
    ends("first batch")
    result.write_text(json.dumps(spent), encoding="utf-8")


def child(result: Path, overrides: list[str]) -> None:
    """Run train.py and write down what its time was spent on."""
    begun = float(os.environ.get("STARTED", time.time()))
    real_import, depth = builtins.__import__, 0
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
    elif sys.argv[1:2] == ["--bare"]:
        bare(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main()
