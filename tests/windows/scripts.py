"""All scripts and commands, one after another in one process, with the tiny VGG of the tests.

    cd SOME_FOLDER; python tests/windows/scripts.py

The processes that fcn.stages starts run here too, one after another: each would import torch anew.
tests/test_portability.py has prepared the folder, and looks at the results.
"""

import gc
import importlib
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]


class Process:
    """In place of `subprocess.Popen`: runs the script before it returns."""

    def __init__(self, command: list[str], **_: Any) -> None:
        run("train.py", *command[2:])

    def wait(self) -> int:
        return 0


def run(name: str, *arguments: str) -> None:
    """Run a script, or a module of fcn, as the main program.

    Raises:
        SystemExit: if it has failed.
    """
    from hydra.core.global_hydra import GlobalHydra

    print("$", name, *arguments, flush=True)
    before = sys.argv
    sys.argv = [name, *arguments]
    try:
        if name.endswith(".py"):
            runpy.run_path(str(PROJECT / name), run_name="__main__")
        else:
            importlib.import_module(name).main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{sys.argv}: exit code {end.code}")
    sys.argv = before
    GlobalHydra.instance().clear()
    gc.collect()


def val_dataloader_without_processes(self: Any) -> Any:
    return self.eval_dataloader(self.val_data, most_workers=0)


def main() -> None:
    import tiny_vgg  # noqa: F401  # registers it
    from conftest import TINY

    import fcn.files
    import fcn.stages
    from fcn.datamodule import SegmentationDataModule

    fcn.files.PATIENCE = 0.3
    fcn.stages.subprocess = SimpleNamespace(Popen=Process)
    chosen = ("name", "model", "trainer.max_steps", "trainer.val_check_interval")
    tiny = [o for o in TINY if o.partition("=")[0] not in chosen]
    tiny += ["trainer.log_every_n_steps=1", "callbacks.curves=null"]
    train = ["model=fcn32s", "hydra.run.dir=run", "trainer.max_steps=2"]
    # The loader of training is a process of its own, and is spawned. That of validation would be
    # spawned in the same way.
    SegmentationDataModule.val_dataloader = val_dataloader_without_processes
    run("train.py", *tiny, *train, "trainer.val_check_interval=2", "data.num_workers=1")
    last = "ckpt=run/checkpoints/last.ckpt"
    run("evaluate.py", last, "data.num_workers=0", "report.images=1")
    run("predict.py", last, "input=photos", "device=cpu")
    run("export.py", last, "format=safetensors", "output=tiny")
    run("export.py", last, "output=tiny.onnx")
    safe = "ckpt=tiny/model.safetensors"
    run("predict.py", safe, "input=photos", "device=cpu", "output=again")
    # last.ckpt is replaced after all these programs have read it. Others have these files open.
    names = ("run/metrics.csv", "run/panels/step_0000004.png", "sweep/sweep.csv")
    opened = [Path(name).open("ab") for name in names]  # noqa: SIM115
    run("train.py", "resume=run", "trainer.max_steps=4", "data.num_workers=0")
    short = [*tiny, "trainer.max_steps=1", "trainer.val_check_interval=1", "callbacks.panels=null"]
    run("train.py", "-m", *short, "model=fcn32s", "hydra.sweep.dir=sweep")
    run("fcn.stages", *short, "hydra.run.dir=stages")
    assert opened


if __name__ == "__main__":
    main()
