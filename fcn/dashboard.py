"""A dashboard for the runs of a Weights & Biases project: a saved view with panels ready made.

    pip install -r requirements/dashboard.txt
    wandb login
    python -m fcn.dashboard USER/fcn        # the address of the view is printed

It has the jagged loss with its smoothed course and its band, scores over steps and runs, the
pictures of each validation, and the parallel coordinates of a sweep. The view is a new one each
time, and others stay as they are. Its panels can be changed in the browser.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from fcn.cli import short_messages
from fcn.errors import ConfigError, need_packages, reason
from fcn.training.wandb_logger import STEP, SUMMARIES

NAME = "FCN training"
BEST = f"val/miou.{SUMMARIES['val/miou']}"  # W&B's name for the best value of a run
# The raw loss jumps from step to step, so the smoothed one and mean ± deviation over a window are
# drawn on the same axis. All are expressions, since W&B draws these in place of plain metrics.
LOSS = (
    "${train/loss}",
    "${train/loss_smooth}",
    "${train/loss_mean}",
    "${train/loss_mean} + ${train/loss_std}",
    "${train/loss_mean} - ${train/loss_std}",
)
# Of a sweep: settings as the logger writes them, and whether the axis is logarithmic.
SETTINGS = {
    "optimizer.lr": True,
    "optimizer.momentum": False,
    "optimizer.weight_decay": False,
    "model.stride": False,
    "data.batch_size": False,
    "data.crop_size": False,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Save the view in the project that the command line names. W&B prints its address."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.dashboard",
        description="Save a view with ready-made panels in a project of Weights & Biases.",
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="such as USER/fcn")
    options = parser.parse_args(arguments)
    with short_messages():
        entity, _, project = options.project.partition("/")
        if not entity or not project or "/" in project:
            raise ConfigError(f"{options.project}: write ENTITY/PROJECT, such as USER/fcn")
        need_packages("wandb_workspaces", extra="dashboard")
        try:
            dashboard(entity, project).save()
        except Exception as error:  # of many types: no key, no network, no such project
            why = reason(error).splitlines()[0]
            raise ConfigError(f"W&B has not saved the view in {options.project}: {why}") from error


def dashboard(entity: str, project: str) -> Any:
    """The view, a `wandb_workspaces.workspaces.Workspace` that is not saved yet.

    Args:
        entity: a user or a team of W&B.
        project: the setting logger.wandb.project.
    """
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as panels

    def lines(title: str, *metrics: str, **options: Any) -> Any:
        return panels.LinePlot(title=title, x=STEP, y=list(metrics), **options)

    axis = panels.ParallelCoordinatesPlotColumn
    axes = [axis(panels.Config(key), log=log or None) for key, log in SETTINGS.items()]
    axes.append(axis(panels.SummaryMetric(BEST)))
    sections = {
        "Loss": [
            lines(
                "Loss of the newest run: raw, smoothed, mean ± deviation",
                custom_expressions=list(LOSS),
                max_runs_to_show=1,
            ),
            lines("Smoothed training loss", "train/loss_smooth"),
            lines("Training and validation loss", "train/loss_smooth", "val/loss"),
        ],
        "Scores": [
            lines("Mean IoU", "val/miou"),
            lines("IoU of each class", metric_regex="^val/iou/.*", max_runs_to_show=1),
            lines("Pixel accuracy", "val/pixel_acc"),
        ],
        "Predictions": [panels.MediaBrowser(title="Validation", media_keys=["val/panels"])],
        "Sweep": [panels.ParallelCoordinatesPlot(title="Settings and mean IoU", columns=axes)],
        "Optimizer and speed": [
            lines("Learning rate", "train/lr"),
            lines("Gradient norm", "train/grad_norm", log_y=True),
            lines("Images per second", "train/images_per_second"),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(
                name=name,
                panels=content,
                is_open=True,
                layout_settings=workspaces.SectionLayoutSettings(columns=len(content), rows=1),
            )
            for name, content in sections.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(pinned_columns=[f"summary:{BEST}"]),
    )


if __name__ == "__main__":
    main()
