"""From conf/trainer, which counts optimizer steps, to the arguments of Lightning's Trainer.

arguments = trainer_arguments(config, run, callbacks, loggers)
trainer = fcn.cli.build(cfg, "trainer", **arguments)      # as train.py does
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import profilers
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger

from fcn.errors import ConfigError
from fcn.training.checkpoints import AtomicCheckpointIO
from fcn.training.clock import Clock
from fcn.training.interruption import Interruption
from fcn.training.run_record import RunRecord
from fcn.training.seeding import DropoutSeeds

Settings = Mapping[str, Any]


def trainer_arguments(
    config: Settings, run: Path, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> dict[str, Any]:
    """Arguments of Lightning's Trainer that are missing in conf/trainer, or replace what it says.

    The training loader never ends, so Lightning sees a single epoch. It counts the batches of it,
    where conf/trainer counts optimizer steps.

    Args:
        config: what conf/train.yaml composes to, resolved.
        run: the run folder.
        callbacks: those of conf/callbacks.
        loggers: all of the run.
    """
    trainer = config["trainer"]
    return {
        "max_epochs": -1,
        "max_time": None,  # the callback Clock ends the run in Lightning's place
        "check_val_every_n_epoch": None,
        "val_check_interval": trainer["val_check_interval"] * trainer["accumulate_grad_batches"],
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the data module gives each process its own images
        "profiler": make_profiler(trainer.get("profiler"), run),
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": run,
        "logger": list(loggers),
        "callbacks": add_required(callbacks, config),
    }


def add_required(callbacks: Sequence[Callback], config: Settings) -> list[Callback]:
    """The callbacks of a run: those of conf/callbacks, and those that every run needs.

    Args:
        callbacks: those of conf/callbacks.
        config: the resolved configuration.
    """
    trainer = config["trainer"]
    wanted = [
        callback
        for callback in callbacks
        if trainer["enable_progress_bar"] or not isinstance(callback, ProgressBar)
    ]
    return [
        *wanted,
        Clock(trainer["max_time"]),
        RunRecord(dict(config)),
        DropoutSeeds(config["seed"]),
        Interruption(),
    ]


def make_profiler(name: str | None, run: Path) -> profilers.Profiler | None:
    """Lightning's profiler of that name, which writes into profile/ in the run folder."""
    if name is None:
        return None
    kinds = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,  # with a trace for Perfetto or chrome://tracing
    }
    return kinds[name](dirpath=run / "profile", filename=name)


def refuse_sweep_over_devices(trainer: pl.Trainer) -> None:
    """Refuse a sweep over several devices, if Lightning would start the processes for them.

    Lightning starts these processes with the command of the first one, so that each of them would
    begin the whole sweep.

    Raises:
        ConfigError: the trainer would start such processes.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
    if environment and not environment.creates_processes_externally:
        raise ConfigError(
            f"trainer.devices={trainer.num_devices} in a sweep: Lightning starts the processes of "
            "the other devices with the same command, so each would begin the whole sweep. Sweep "
            "on one device, start the runs in a shell loop, or through torchrun or Slurm"
        )
