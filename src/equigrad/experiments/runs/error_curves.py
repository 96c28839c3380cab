"""Tables and figures of the reproductions: Markdown tables, panels of curves, fitted slopes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equigrad.experiments.runs.figures import MARKERS

EQUILIBRIUM = math.inf
"""The number of steps that means a phase at exact equilibrium."""


@dataclass(frozen=True)
class ErrorPoint:
    """The error of the plain contrastive rule, measured once.

    Attributes:
        points: number p of nodes of the forward difference.
        free_steps: steps of the free phase; `inf` at exact equilibrium.
        nudged_steps: steps of each nudged phase; `inf` at exact equilibrium.
        beta: nudging strength β.
        error: error of the meta-gradient relative to its norm.
    """

    points: int
    free_steps: float
    nudged_steps: float
    beta: float
    error: float

    @property
    def settled_alike(self) -> bool:
        """Whether all phases take the same number of steps."""
        return self.free_steps == self.nudged_steps

    @property
    def free_share(self) -> float:
        """The free phase's share of all steps."""
        return self.free_steps / (self.free_steps + self.nudged_steps)


def best_by(
    rows: Iterable[ErrorPoint], key: Callable[[ErrorPoint], float]
) -> dict[float, ErrorPoint]:
    """The row with the smallest error for each value of a key, in the order of the key."""
    groups: dict[float, list[ErrorPoint]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return {k: min(groups[k], key=lambda row: row.error) for k in sorted(groups)}


def error_and_beta(row: ErrorPoint) -> str:
    """A row's error and β as the text of a table cell."""
    return f"{row.error:.1e} ({row.beta:.1g})"


def division_table(rows: Sequence[ErrorPoint]) -> str:
    """For every β, the least error over all divisions of the steps, and its plateau."""
    body = []
    for beta, best in best_by(rows, lambda row: row.beta).items():
        first, last = plateau(rows, beta)
        middle = f"{(first + last) / 2:.2f}"
        body.append([f"{beta:g}", f"{best.error:.1e}", f"{first:.2f} to {last:.2f}", middle])
    return as_table(
        ["β", "least error", "free phase's shares with at most twice that", "middle of these"], body
    )


def plateau(rows: Sequence[ErrorPoint], beta: float) -> tuple[float, float]:
    """The smallest and largest share of the free phase with at most twice the least error."""
    own = [row for row in rows if row.beta == beta]
    least = min(row.error for row in own)
    shares = [row.free_share for row in own if row.error <= 2 * least]
    return min(shares), max(shares)


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x; NaN with fewer than two points."""
    return slope(np.log(x).tolist(), np.log(y).tolist())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y against x; NaN with fewer than two points."""
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else math.nan


MOST_MARKERS = 10
"""On one curve."""

AXES = {
    "beta": ("nudging strength β", "log", "β"),
    "free_steps": ("steps in each phase", "linear", "steps"),
    "free_share": ("free phase's share of the steps", "linear", "share"),
    "free_error": ("distance to equilibrium δ = δ'", "log", "δ = δ'"),
    "error": ("normalised error", "log", "error"),
    "bound": ("bound on the error", "log", "bound"),
}
"""Of a field of a row: its label and scale on an axis, and its name above a legend."""


@dataclass(frozen=True)
class Panel:
    """One panel of a figure, with a curve for every value of a field, from dark to light.

    Attributes:
        title: title above the panel.
        rows: the rows of the table that the curves show.
        x: the field on the horizontal axis.
        by: the field with one curve for each of its values.
        y: the field on the vertical axis.
        legend: heading of the legend; None for no legend.
        axes: arguments of `Axes.set` that differ from those of `AXES`.
    """

    title: str
    rows: Iterable[Any]
    x: str
    by: str
    y: str = "error"
    legend: str | None = ""
    axes: Mapping[str, Any] = field(default_factory=dict)


def draw_panels(panels: Sequence[Panel], *, figsize: tuple[float, float], **options: Any) -> Figure:
    """A figure with panels side by side; options are those of `Figure.subplots`."""
    figure = Figure(figsize=figsize, layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False, **options)[0]
    for axes, panel in zip(places, panels, strict=True):
        draw_curves(axes, panel.rows, panel.x, panel.by, y=panel.y)
        (xlabel, xscale, _), (ylabel, yscale, _) = AXES[panel.x], AXES[panel.y]
        axes.set(xlabel=xlabel, xscale=xscale, yscale=yscale)
        if axes is places[0]:
            axes.set(ylabel=ylabel)
        axes.set(**panel.axes)
        finish(axes, panel.title, AXES[panel.by][2] if panel.legend == "" else panel.legend)
    return figure


def draw_curves(
    axes: Axes,
    rows: Iterable[Any],
    x: str,
    by: str,
    *,
    y: str = "error",
    label: str = "{:g}",
    colors: Sequence[Any] | None = None,
) -> None:
    """Draw a curve of `y` against `x` for every value of `by`, from dark to light.

    Curves of given `colors` have no markers: they are a background, or are told apart otherwise.
    """
    curves: dict[float, list[Any]] = {}
    for row in rows:
        curves.setdefault(getattr(row, by), []).append(row)
    for i, (value, color) in enumerate(
        zip(sorted(curves), colors or shades(len(curves)), strict=True)
    ):
        points = sorted((getattr(row, x), getattr(row, y)) for row in curves[value])
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=None if colors else MARKERS[i % len(MARKERS)],
            markersize=4,
            markevery=-(-len(points) // MOST_MARKERS),
            label=label.format(value),
        )


def shades(count: int) -> list[tuple[float, ...]]:
    """Colours in a visible order, from dark to light."""
    return [tuple(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.88, count))]


def finish(axes: Axes, title: str, legend: str | None = None) -> None:
    """Add the title, the grid and, if there is a heading, the legend."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    if legend is not None:
        axes.legend(title=legend, fontsize="small", title_fontsize="small")


def as_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table with numeric columns aligned to the right."""
    body = list(body)
    columns = zip(head, *body, strict=True)
    aligned = ["---:" if any(c[:1].isdigit() for c in cells) else "---" for _, *cells in columns]
    lines = [head, aligned, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
