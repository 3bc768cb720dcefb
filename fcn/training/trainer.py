"""From conf/trainer, which counts optimizer steps, to the arguments of Lightning's Trainer.

trainer = build_trainer(cfg, run, callbacks, loggers)      # as train.py does
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import SingleDeviceStrategy

from fcn import cli
from fcn.cards import check_card
from fcn.errors import ConfigError, refuse
from fcn.training import in_backward
from fcn.training.checkpoints import AtomicCheckpointIO
from fcn.training.clock import Clock
from fcn.training.interruption import Interruption
from fcn.training.resumed import ResumedSettings
from fcn.training.run_record import RunRecord
from fcn.training.seeding import DropoutSeeds


def build_trainer(
    cfg: Any,
    run: Path = Path(),
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> pl.Trainer:
    """Lightning's Trainer, with the callbacks that every run needs.

    The training loader never ends, so that Lightning sees a single epoch. Lightning counts its
    batches, and conf/trainer counts optimizer steps.

    Args:
        cfg: composed from conf/train.yaml, resolved.
        run: the run folder.
        callbacks: those of conf/callbacks.
        loggers: all of the run.

    Raises:
        ConfigError: Lightning does not accept a setting, or computes in another precision.
        DeviceError: torch has no code for the device.
    """
    trainer, progress = cfg.trainer, cfg.trainer.enable_progress_bar
    arguments = cli.resolved(cfg)  # a copy
    arguments.trainer.pop("compile", None)  # train.py applies it; Lightning does not know it
    try:
        built: pl.Trainer = cli.build(
            arguments,
            "trainer",
            max_epochs=-1,
            min_epochs=0,  # else Lightning would wait for an epoch, where trainer.min_steps is set
            max_time=None,  # the callback Clock ends the run in Lightning's place
            check_val_every_n_epoch=None,
            val_check_interval=trainer.val_check_interval * trainer.accumulate_grad_batches,
            num_sanity_val_steps=trainer.get("num_sanity_val_steps", 0),
            use_distributed_sampler=False,  # the data module gives each process its own images
            plugins=[AtomicCheckpointIO()],
            default_root_dir=run,
            logger=list(loggers),
            callbacks=[
                *(c for c in callbacks if progress or not isinstance(c, ProgressBar)),
                Clock(cli.plain(cfg)["trainer"]["max_time"]),
                RunRecord(cli.plain(cfg)),
                ResumedSettings(),
                DropoutSeeds(cfg.seed),
                Interruption(),
            ],
        )
    except (AttributeError, TypeError) as error:  # a value is of another type
        raise ConfigError(f"trainer: {error}") from error
    if trainer.get("profiler") is not None:
        profiler = built.profiler  # type: ignore[attr-defined]
        profiler.dirpath, profiler.filename = run / "profile", trainer.profiler
    if built.precision != trainer.precision:  # Lightning turns 16-mixed into bf16-mixed on a CPU
        device = built.strategy.root_device.type
        wanted = f"32-true or {built.precision} on the device {device}"
        refuse("trainer.precision", trainer.precision, wanted)
    check_card(built.strategy.root_device)
    if cfg.optimizer._target_ == in_backward.TARGET:
        strategy = type(built.strategy)
        single = issubclass(strategy, SingleDeviceStrategy)
        in_backward.check_trainer(
            cli.plain(cfg)["trainer"]
            | {"precision": built.precision, "devices": built.world_size}
            | {"strategy": "auto" if single else strategy.__name__}
        )
    return built


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
