"""Train a fully convolutional network (Long, Shelhamer, Darrell, CVPR 2015).

    python train.py experiment=quickstart              minutes on a CPU, no download
    python train.py model=fcn8s data.batch_size=2      PASCAL VOC2012 and ImageNet weights
    python train.py -m model=fcn32s,fcn16s,fcn8s optimizer.lr=1e-3,1e-4     a sweep
    python train.py resume=runs/fcn8s/2026-01-31_12-00-00                   goes on with a run
    python train.py model=fcn8s resume=auto            with the last of this command line, or anew

`--help` lists the groups, `--cfg job` every setting. Results: fcn/runs.py.
"""

import gc
import math
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from fcn.config import check_training, short_messages
from fcn.errors import ConfigError, DataError, FCNError, Stopped, TrainingError, WriteError

# torch and Lightning are imported where they are needed: `--help` and `--cfg job` are instant.
if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.profilers import Profiler

    from fcn.datamodule import SegmentationDataModule
    from fcn.module import SegmentationModule

MENDABLE = (HydraException, OmegaConfBaseException)  # by the user, beside our own errors


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """One run, or one job of a sweep."""
    hydra_cfg = HydraConfig.get()
    overrides = list(hydra_cfg.overrides.task)
    if hydra_cfg.mode != RunMode.MULTIRUN:
        with short_messages(*MENDABLE):
            run_job(cfg, overrides)
        return

    def job(earlier: Path | None) -> None:
        if earlier is not None:
            cfg.resume = str(earlier)
        run_job(cfg, overrides if earlier is None else [])

    from fcn import sweep

    folder = Path(hydra_cfg.sweep.dir)
    sweep.run_job(folder, folder / hydra_cfg.sweep.subdir, overrides, job, mendable=MENDABLE)


class SameSweep(HydraCallback):
    """Started again, a sweep goes on in its folder; at the end it says what became of its jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from fcn.sweep import find_sweep, several_processes

        # Jobs in processes of their own (hydra/launcher=submitit_...) import from here.
        paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        given = any(o.startswith("hydra.sweep.dir=") for o in config.hydra.overrides.hydra)
        sweep = None if given or several_processes() else find_sweep(config)
        if sweep is not None:
            print(f"This sweep goes on in {sweep}; hydra.sweep.dir=DIR starts it anew", flush=True)
            with read_write(config.hydra):
                config.hydra.sweep.dir = str(sweep)
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{sweep}'")  # for the jobs

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from fcn.devices import is_main_process
        from fcn.sweep import write_results

        if not is_main_process():
            return
        states = [row["status"] for row in write_results(Path(config.hydra.sweep.dir))]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        print(f"{config.hydra.sweep.dir}/sweep.csv: {counts}", flush=True)
        if "crashed" in states:
            sys.exit(1)


def run_job(cfg: DictConfig, overrides: list[str]) -> None:
    """Choose the run folder and train there."""
    hydra_cfg = HydraConfig.get()
    sweep = Path(hydra_cfg.sweep.dir) if hydra_cfg.mode == RunMode.MULTIRUN else None
    if sweep is not None:
        run = sweep / hydra_cfg.sweep.subdir
        if OmegaConf.select(cfg, "logger._target_"):
            cfg.logger.group = cfg.logger.group or f"sweep_{sweep.name}"
            cfg.logger.name = f"{cfg.logger.name}_{hydra_cfg.job.num}"
    elif hydra_cfg.run.dir != ".":
        run = Path(hydra_cfg.run.dir)
    else:
        run = Path("runs") / str(cfg.name) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if cfg.resume == "auto":
        from fcn.devices import is_main_process
        from fcn.resume import find_run, is_finished

        named = sweep is not None or hydra_cfg.run.dir != "."
        last = find_run(run, overrides, named=named, main=is_main_process())
        if last is not None and is_finished(last):
            print(f"{last} is finished: nothing to do. Without resume=auto, a new run starts")
            return
        cfg.resume = None
        if last is not None:
            run, overrides = last, []
            cfg = resumed_config(run, overrides)
    elif cfg.resume:
        run = Path(cfg.resume)
        cfg = resumed_config(run, overrides)
    try:
        train(cfg, run, overrides)
    except (Stopped, TrainingError) as error:
        from fcn.devices import is_main_process

        if not is_main_process():
            sys.exit(0)  # all processes are told alike; an exit code here would kill the main one
        if isinstance(error, Stopped):
            sys.exit(error.exit_code)
        raise
    except FCNError as error:
        from fcn.datasets.download import HINT

        if isinstance(error, DataError) and HINT not in str(error):  # then there is no data yet
            data = shlex.join(o for o in overrides if o.startswith(("data", "experiment")))
            hint = f"To see all that is wrong: python -m fcn.datasets.check {data}"
            error.args = (f"{error}\n{hint}",)
        raise
    finally:
        with suppress(OSError):
            run.rmdir()  # Hydra has made it; only an empty one goes


def resumed_config(run: Path, overrides: list[str]) -> DictConfig:
    """The run's own configuration, with what is given beside `resume=`, such as a later end."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"resume={run}: no run folder (it has no config.yaml)")
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    changes = [o for o in overrides if not o.startswith("resume=")]
    for change in changes:
        key = change.partition("=")[0]
        if OmegaConf.is_dict(OmegaConf.select(cfg, key, default=None)) or key == "experiment":
            raise ConfigError(f"{change}: a resumed run keeps its groups; change single settings")
    cfg.merge_with_dotlist(changes)
    OmegaConf.resolve(cfg)  # what an interpolation makes is looked at too
    conf = Path(__file__).parent.glob("conf/**/*.yaml")
    known = {target for path in conf for _, target in targets(OmegaConf.load(path))}
    for key, target in targets(cfg):
        if target not in known and f"{key}={target}" not in changes:
            raise ConfigError(
                f"resume={run}: its config.yaml wants to call {target}, which conf/ does not name. "
                f"If that is code of yours, say so: {key}={target}"
            )
    cfg.resume = str(run)
    return cfg


def targets(cfg: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every `_target_` in a configuration, which Hydra would import and call, with its place."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg)
    for key, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        inner = f"{place}.{key}".lstrip(".")
        if key == "_target_":
            yield inner, str(value)
        elif isinstance(value, dict | list):
            yield from targets(value, inner)


def train(cfg: DictConfig, run: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train as `cfg` says, in the folder `run`.

    Args:
        cfg: composed from conf/train.yaml. With `resume` set, `run` has been trained before.
        run: the run folder; if a run has taken it already, a numbered neighbour.
        overrides: what was changed on the command line, to be written down.

    Returns:
        What is in summary.json.

    Raises:
        fcn.errors.FCNError: settings, data or weights are wrong, or the loss diverged.
        fcn.errors.Stopped: SIGINT or SIGTERM; the run can be resumed.
    """
    OmegaConf.resolve(cfg)
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    check_training(config)

    import pytorch_lightning as pl

    from fcn.devices import is_main_process, prepare_cpu, quiet_lightning
    from fcn.resume import remove_leftovers, whole_checkpoint
    from fcn.runs import create_run_folder, locked

    quiet_lightning()
    prepare_cpu()
    with ExitStack() as lock:
        if cfg.resume and is_main_process():
            lock.enter_context(locked(run))
            remove_leftovers(run)
        settle_precision(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        datamodule = open_data(cfg)
        module = build_module(cfg, datamodule)
        settle_batches(cfg, module, datamodule)
        checkpoint = whole_checkpoint(run, module.state_dict()) if cfg.resume else None
        if cfg.trainer.get("compile"):  # the runs of older versions do not have it
            module.network.compile()

        if not cfg.resume and is_main_process():
            run = create_run_folder(run)
            lock.enter_context(locked(run))
            if OmegaConf.select(cfg, "logger._target_"):
                cfg.logger.id = cfg.logger.id or secrets.token_hex(4)  # kept by a resumed run
        try:
            trainer = build_trainer(cfg, run, resume_from=checkpoint)
        except BaseException:
            if not cfg.resume and is_main_process():
                shutil.rmtree(run)  # nothing is in it yet
            raise
        return fit(cfg, run, overrides or [], trainer, module, datamodule, checkpoint)


def fit(
    cfg: DictConfig,
    run: Path,
    overrides: list[str],
    trainer: "pl.Trainer",
    module: "SegmentationModule",
    datamodule: "SegmentationDataModule",
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train, and leave a summary: how it ended, or how to go on."""
    from fcn.devices import is_main_process
    from fcn.runs import last_checkpoint, write_settings
    from fcn.saving import loader_died

    if is_main_process():
        write_settings(run, cfg, overrides)
        print(
            f"run folder: {run}\n{datamodule.sizes()}; "
            f"{trainer.world_size} x {trainer.strategy.root_device}, {trainer.precision}",
            flush=True,
        )

    summary: dict[str, Any] = {}
    go_on = f"go on with: python train.py resume={run}"
    status, exit_code = "finished", 0
    # What is there already stays. Else Python looks for garbage only when there is a quarter more
    # of everything, and figures, cycles of several MB each, pile up for dozens of validations.
    gc.freeze()
    gc.collect()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        status, exit_code = "stopped", stop.exit_code
        if is_main_process():
            print(f"\nstopped by {stop}; {go_on}", flush=True)
        raise
    except WriteError as error:
        exit_code = 1
        if not last_checkpoint(run).is_file():
            raise
        raise WriteError(f"{error}\nThe checkpoint before it is whole; {go_on}") from error
    except BaseException as error:
        exit_code = 1
        if ran_out_of_memory(error):
            raise TrainingError(advice_on_memory(cfg, trainer)) from error
        if loader_died(error):
            raise TrainingError(
                f"a process that loads data ended: {error}. The system kills one when memory is "
                f"short: data.num_workers=1 needs less, 0 none. To {go_on} data.num_workers=0"
            ) from error
        raise
    finally:
        gc.unfreeze()
        if OmegaConf.select(cfg, "logger._target_"):
            from fcn.wandb_run import finish_wandb

            finish_wandb(trainer, exit_code)
        if exit_code != 1 and is_main_process():
            summary = write_summary(run, status, trainer)
    return summary


def open_data(cfg: DictConfig) -> "SegmentationDataModule":
    """The data module with open splits; what can be known before a download is checked first."""
    from fcn.weights import find_weights

    datamodule = instantiate(cfg.data, _convert_="all")
    if cfg.model.num_classes not in (None, len(datamodule.classes)):
        raise ConfigError(
            f"model.num_classes={cfg.model.num_classes}, but the data has "
            f"{len(datamodule.classes)} classes (background is one, void is none)"
        )
    if cfg.model.weights and not cfg.resume:
        find_weights(cfg.model.backbone, cfg.model.weights)  # known before 2 GB of data are fetched
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def build_module(cfg: DictConfig, datamodule: "SegmentationDataModule") -> "SegmentationModule":
    """The network with its weights, and what it learns with."""
    return instantiate(
        cfg.model,
        weights=None if cfg.resume else cfg.model.weights,  # a checkpoint has them all
        class_names=list(datamodule.classes),
        palette=[list(colour) for colour in datamodule.palette],
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        _convert_="all",
    )


def settle_precision(cfg: DictConfig) -> None:
    """Replace `auto` by what is fastest and stable on this machine."""
    from fcn.devices import best_precision

    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = best_precision(cfg.trainer.accelerator)
    if OmegaConf.select(cfg, "optimizer.fused") == "auto":
        cfg.optimizer.fused = cfg.trainer.precision != "16-mixed"


def settle_batches(
    cfg: DictConfig, module: "SegmentationModule", datamodule: "SegmentationDataModule"
) -> None:
    """Replace data.batch_size=auto by what fits, and epochs by optimizer steps."""
    if cfg.data.batch_size != "auto" and cfg.trainer.max_epochs is None:
        return
    assert datamodule.train_data is not None
    images = len(datamodule.train_data)
    places = ("_target_", "accelerator", "devices", "num_nodes")
    given = {name: cfg.trainer[name] for name in places if name in cfg.trainer}
    trainer = instantiate(given, barebones=True)  # knows how many devices there are
    if cfg.data.batch_size == "auto":
        if trainer.world_size > 1 or trainer.strategy.root_device.type == "cpu":
            raise ConfigError(
                "data.batch_size=auto looks for what fits on one GPU; here are "
                f"{trainer.world_size} x {trainer.strategy.root_device}. Give a number; "
                "`python -m fcn.memory` tells what fits"
            )
        from fcn.batch_size import largest_batch
        from fcn.memory import image_size

        config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
        options = ("accelerator", "devices", "precision", "accumulate_grad_batches", "benchmark")
        cfg.data.batch_size = largest_batch(
            module, image_size(config), most=images, **{k: cfg.trainer[k] for k in options}
        )
        datamodule.batch_size = cfg.data.batch_size
        print(f"data.batch_size={cfg.data.batch_size} is the largest that fits", flush=True)
    if cfg.trainer.max_epochs is not None:
        step = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * trainer.world_size
        cfg.trainer.max_steps = math.ceil(cfg.trainer.max_epochs * images / step)
        cfg.trainer.max_epochs = None


def ran_out_of_memory(error: BaseException) -> bool:
    """On a GPU, or on a CPU whose system refuses."""
    from torch import OutOfMemoryError

    told = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, OutOfMemoryError | MemoryError) or any(t in str(error) for t in told)


def advice_on_memory(cfg: DictConfig, trainer: "pl.Trainer") -> str:
    """What a step needs, and which settings need less."""
    from fcn.devices import memory_size
    from fcn.memory import advice

    device = trainer.strategy.root_device
    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    return f"{device} ran out of memory: {advice(config, memory_size(device))}"


def write_summary(run: Path, status: str, trainer: "pl.Trainer") -> dict[str, Any]:
    """summary.json, from what is in the run folder and what the trainer knows."""
    from fcn.runs import write_json
    from fcn.saving import LastCheckpoint
    from fcn.summary import summarise

    keeper = trainer.checkpoint_callbacks[-1]
    assert isinstance(keeper, LastCheckpoint)
    summary = summarise(run, status) | {
        "seconds": round(keeper.seconds, 1),
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
    }
    write_json(run / "summary.json", summary)
    return summary


def build_trainer(cfg: DictConfig, run: Path, resume_from: Path | None) -> "pl.Trainer":
    """The Trainer with its callbacks and loggers, all writing below `run`, in one process only."""
    from fcn.callbacks import AveragedWeights, LossStatistics, ProgressBar, ScoreTable
    from fcn.csv_logger import MetricsCSV
    from fcn.devices import is_main_process
    from fcn.pictures import Curves, Panels, WandbScores
    from fcn.resume import checkpoint_step
    from fcn.saving import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint

    config: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    loggers: list[Logger] = []
    callbacks: list[Callback] = [
        LossStatistics(half_life=cfg.callbacks.half_life, window=cfg.callbacks.window),
        BestCheckpoint(run=run),
        LastCheckpoint(
            every_n_steps=cfg.callbacks.checkpoint_every_n_steps,
            run=run,
            seed=cfg.seed,
            config=config,
        ),
    ]
    if cfg.callbacks.get("average_decay") is not None:
        callbacks.insert(0, AveragedWeights(decay=cfg.callbacks.average_decay))
    if is_main_process():
        csv = MetricsCSV(run / "metrics.csv", resume_step=checkpoint_step(resume_from))
        loggers = [csv]
        if OmegaConf.select(cfg, "logger._target_"):
            from fcn.wandb_run import start_wandb

            make = instantiate(cfg.logger, _convert_="all", _partial_=True)
            loggers.append(start_wandb(make, run, config))
        panels = Panels(images=cfg.callbacks.panel_images, folder=run / "panels")
        callbacks[-2:-2] = [panels, Curves(csv=csv), ScoreTable(), WandbScores()]
        if cfg.trainer.enable_progress_bar:
            callbacks.insert(0, ProgressBar())
    # The loader never ends, so Lightning sees one epoch; it counts batches, we count steps.
    batches = cfg.trainer.val_check_interval * cfg.trainer.accumulate_grad_batches
    trainer = instantiate(
        OmegaConf.masked_copy(cfg.trainer, [k for k in cfg.trainer if k != "compile"]),
        _convert_="all",
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=batches,
        profiler=profiler(cfg.trainer.profiler, run),
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # our loaders share themselves out between processes
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)  # of one device: none
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if sweeping and environment and not environment.creates_processes_externally:
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices} in a sweep: Lightning starts the processes of "
            "the other devices with the same command, so each would begin the whole sweep. Sweep "
            "on one device, start the runs in a shell loop, or through torchrun or Slurm"
        )
    return trainer


def profiler(name: str | None, run: Path) -> "Profiler | None":
    """Lightning's profiler of that name, writing into the run folder."""
    from pytorch_lightning import profilers

    if name is None:
        return None
    kinds = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,  # with a trace for Perfetto or chrome://tracing
    }
    return kinds[name](dirpath=run / "profile", filename=name)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # short_messages reports instead of Hydra
    with short_messages(*MENDABLE):
        main()
