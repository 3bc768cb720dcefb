"""The logger for Weights & Biases. When W&B fails, training goes on without it.

    python train.py logger=wandb logger.wandb.project=fcn "logger.wandb.tags=[a,b]"

What W&B cannot upload stays in the run folder. A message says how it is uploaded later.
"""

import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.errors import check_flag, reason, refuse

SUMMARIES = {"train/loss_smooth": "min", "val/loss": "min", "val/miou": "max"}
STEP = "trainer/global_step"  # the x-axis, under the name that Lightning gives it


class TolerantWandbLogger(WandbLogger):
    """Logs online if there is a key that the server accepts, else offline. WANDB_MODE is obeyed.

    The first failure of W&B causes one warning. After a failed `log_metrics`, or if the
    axes of the charts cannot be set, no more metrics are sent.

    Args:
        save_dir: the folder for W&B's own files.
        project, name, group, notes: what W&B's dashboards show.
        tags: these too. None: none.
        id: the id of the W&B run. A run that is resumed has the same id, and so continues it.
        log_model: whether last.ckpt and best.ckpt become versions of W&B's artefact `model-<id>`,
            with the aliases `last` and `best`, when training has ended regularly.

    Raises:
        ConfigError: `log_model` is neither True nor False, or `tags` is no list.
    """

    def __init__(
        self,
        *,
        save_dir: str | Path,
        project: str = "fcn",
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        id: str | None = None,
        log_model: bool = False,
    ) -> None:
        check_flag("log_model", log_model)
        if tags is not None and not isinstance(tags, list | tuple):
            refuse("tags", tags, "null or a list such as [a,b]")
        self.save_folder, self.warned = Path(save_dir), False
        # W&B's service would write to ~/.cache. All runs of a sweep share one service, which writes
        # to the folder of the first of them.
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.save_folder.absolute() / "wandb/cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(self.save_folder.absolute() / "wandb/data"))
        # Seconds for the last uploads. The checkpoints of a VGG-19 have a gigabyte each.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "3600" if log_model else "300")
        options: dict[str, Any] = {
            "dir": save_dir,
            "project": project,
            "name": name,
            "group": group,
            "tags": list(tags or ()),
            "notes": notes,
            "id": id,
            "resume": "allow",
            # A run that is open is continued, also in a notebook: wandb.agent needs that.
            "settings": wandb.Settings(quiet=True, reinit="return_previous"),
        }
        experiment = self._start(options)
        self.failed = not self._attempt(partial(_define_metrics, experiment))
        super().__init__(save_dir=save_dir, project=project, name=name, experiment=experiment)
        self.uploads_checkpoints = log_model

    def _start(self, options: dict[str, Any]) -> Any:
        """Start a W&B run, offline if it cannot be online."""
        # W&B itself reads WANDB_MODE once in a process, and not after a first run in a notebook.
        mode = os.environ.get("WANDB_MODE") or None
        try:
            if mode is None and not wandb.login(prompt=False):
                mode = "offline"
                print(f"W&B: not logged in, so offline; {self._how_to_upload()}")
        except Exception as error:
            mode = "offline"
            self._warn(error)
        try:
            return wandb.init(mode=mode, **options)  # type: ignore[arg-type]
        except Exception as error:
            if mode == "offline":
                raise
            self._warn(error)
            wandb.teardown()  # its service still holds the run that did not start
            return wandb.init(mode="offline", **options)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers, tables or images, unless W&B has failed before."""
        if not self.failed:
            log = partial(super().log_metrics, metrics, step)
            self.failed = not self._attempt(log)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._attempt(lambda: self.experiment.config.update(params, allow_val_change=True))

    def end_run(self, exit_code: int, run: Path) -> None:
        """End the W&B run, so that a sweep's next job starts its own.

        If training has ended regularly, its checkpoints are uploaded before, if `log_model` says
        so. Lightning's own way knows the files of its ModelCheckpoint only; last.ckpt is not one.

        Args:
            exit_code: 0 if training has ended regularly.
            run: the run folder.
        """
        if exit_code == 0 and self.uploads_checkpoints:
            for file in filter(Path.is_file, (last_checkpoint(run), best_checkpoint(run))):
                name, aliases = f"model-{self.experiment.id}", [file.stem, "latest"]
                log_model = partial(self.experiment.log_model, file, name=name, aliases=aliases)
                self._attempt(log_model)
        self._attempt(lambda: self.experiment.finish(exit_code=exit_code))

    def _attempt(self, call: Callable[[], Any]) -> bool:
        """Call W&B, and return whether that worked. Its service may be dead, or the disk full."""
        try:
            call()
        except Exception as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: Exception) -> None:
        """Warn that W&B has failed, once for each run."""
        if self.warned:
            return
        self.warned = True
        why = (reason(error).splitlines() or [""])[0]
        warnings.warn(
            f"W&B failed ({why}); training goes on, metrics.csv has everything; "
            + self._how_to_upload(),
            stacklevel=2,
        )

    def _how_to_upload(self) -> str:
        """The command that uploads what is in the run folder.

        A resumed run has several W&B runs there, and one that was killed in its first seconds is
        damaged. `wandb sync` stops at a damaged one, so each is uploaded by a command of its own.
        """
        if os.name == "nt":  # PowerShell
            runs = f"Get-ChildItem '{self.save_folder}/wandb/*run-*'"
            command = f"{runs} | ForEach-Object {{ wandb sync --include-online $_.FullName }}"
        else:
            runs = f"{shlex.quote(f'{self.save_folder}/wandb')}/*run-*"
            command = f'for run in {runs}; do wandb sync --include-online "$run"; done'
        return f"upload later with: {command}"


def _define_metrics(experiment: Any) -> None:
    """Set the x-axis of all charts, and which value of a metric is the run's best."""
    experiment.define_metric(STEP)
    experiment.define_metric("*", step_metric=STEP, step_sync=True)
    for metric, summary in SUMMARIES.items():
        experiment.define_metric(metric, summary=summary, step_metric=STEP, step_sync=True)
