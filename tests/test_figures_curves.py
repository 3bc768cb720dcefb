"""Curves of one run, and several runs on the same axes, from columns as metrics.csv has them."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fcn.figures.comparison import compare_runs, draw_sweep
from fcn.figures.curves import draw_curves

Columns = dict[str, np.ndarray]


def columns_of(steps: int) -> Columns:
    """The columns of a short run that validates after every twentieth step."""
    step = np.arange(1, steps + 1)
    loss = 3 * np.exp(-step / 20)
    validated = step % 20 == 0
    columns = {"step": step, "train/loss": loss * (1 + step % 3), "train/loss_smooth": loss}
    columns |= {"train/loss_std": np.full(steps, 0.1)}
    for name, value in (("val/loss", loss), ("val/miou", 0.4), ("val/pixel_acc", 0.7)):
        columns[name] = np.where(validated, value, np.nan)
    return columns


def catch_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """A list that receives every figure that is saved from now on."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    return drawn


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    return catch_figures(monkeypatch)


def line(figure: Figure, label: str) -> np.ndarray:
    """x and y of a curve: (2, n)."""
    (found,) = (x for axes in figure.axes for x in axes.lines if x.get_label() == label)
    return np.array(found.get_data(), float)


def test_what_is_in_the_curves(figures: list[Figure], tmp_path: Path) -> None:
    columns = columns_of(60)
    columns["train/lr"] = np.full(60, np.nan)
    columns["train/lr"][[0, 39]] = 0.25
    columns["train/loss_smooth"][10] = np.nan
    # A validation without labels is NaN, an overflowing one is Inf, and one batch explodes.
    columns["val/miou"][-1], columns["val/loss"][-1] = math.nan, math.inf
    columns["train/loss"][5] = 1e9
    draw_curves(columns, tmp_path / "curves.png")
    (figure,) = figures
    assert line(figure, "raw, each step").shape == (2, 60)
    smooth = line(figure, "smoothed")
    assert smooth.shape == (2, 59)
    (band,) = (c for axes in figure.axes for c in axes.collections)
    edges = band.get_paths()[0].vertices
    for step, value in smooth.T:  # one standard deviation above and below the smoothed loss
        ys = np.unique(edges[edges[:, 0] == step, 1].round(9))
        assert ys == pytest.approx([value - 0.1, value + 0.1])
    assert line(figure, "validation")[0].tolist() == [20, 40]
    assert line(figure, "mean IoU")[1].tolist() == [0.4, 0.4]
    assert line(figure, "pixel accuracy")[1].tolist() == [0.7, 0.7, 0.7]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["loss (cross-entropy)", "learning rate", "validation scores"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.25, 0.25]


@pytest.mark.parametrize("columns", [{}, columns_of(1)])
def test_curves_of_a_young_run(columns: Columns, tmp_path: Path) -> None:
    draw_curves(columns, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


@pytest.mark.slow
def test_a_hundred_thousand_steps(tmp_path: Path, figures: list[Figure]) -> None:
    steps, rng = 100_000, np.random.default_rng(0)
    columns = {"step": np.arange(1, steps + 1), "train/loss": rng.random(steps)}
    for name, value in (("train/loss_smooth", 0.5), ("train/loss_std", 0.1), ("train/lr", 0.1)):
        columns[name] = np.full(steps, value)
    columns["train/loss"][77_777] = 99
    draw_curves(columns, tmp_path / "curves.png")
    assert line(figures[0], "raw, each step").shape == (2, steps)
    grey = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    # Above the noise there are only the axis at the left and the peak, which is not lost.
    columns_at_the_top = np.nonzero(grey[30] < 225)[0]
    assert len(columns_at_the_top) < 5
    assert columns_at_the_top[-1] == pytest.approx(756, abs=8)


@pytest.mark.slow
def test_many_runs_have_different_colours(figures: list[Figure], tmp_path: Path) -> None:
    compare_runs({f"${n}": columns_of(20) for n in range(12)}, tmp_path / "many.png")
    assert len({tuple(x.get_color()) for x in figures[0].axes[0].lines}) == 12


def test_sweep_over_names(figures: list[Figure], tmp_path: Path) -> None:
    """A setting whose values are no numbers, too long and with a dollar sign."""
    values = ["$a", "b", "x" * 30, "$a"]
    rows = [{"key": v, "best/val/miou": n / 10} for n, v in enumerate(values)]
    draw_sweep([*rows, {"key": "no score"}], ["key"], tmp_path / "sweep.pdf")
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.get_xticklabels()] == [r"\$a", "b", "x" * 19 + "…"]
    assert axes.lines[0].get_ydata() == pytest.approx([0.15, 0.1, 0.2])  # medians
    assert (tmp_path / "sweep.pdf").read_bytes().startswith(b"%PDF")


def test_sweep_without_scores_has_no_picture(tmp_path: Path) -> None:
    draw_sweep([{"key": "1"}, {"key": "2"}], ["key"], tmp_path / "sweep.png")
    draw_sweep([{"key": "1", "best/val/miou": 0.5}], [], tmp_path / "sweep.png")
    assert not list(tmp_path.iterdir())
