"""Errors of a meta-gradient over nudging strengths and lengths of phases, as rows and curves."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes

EQUILIBRIUM = math.inf
"""The number of steps that stands for a phase settled exactly."""


@dataclass(frozen=True)
class ErrorPoint:
    """The error of the plain contrastive rule, measured once.

    Attributes:
        points: number p of nodes of the forward difference.
        free_steps: steps of the free phase; `inf` at exact equilibrium.
        nudged_steps: steps of each nudged phase; likewise.
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
        """Whether all phases take equally many steps."""
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
    """As a cell of a table."""
    return f"{row.error:.1e} ({row.beta:.1g})"


def division_table(rows: Sequence[ErrorPoint]) -> str:
    """For every β the least error over the divisions of the steps, and the plateau around it."""
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
    """Least-squares slope of log y against log x; NaN below two points."""
    return slope(np.log(x).tolist(), np.log(y).tolist())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y against x; NaN below two points."""
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else math.nan


def draw_curves(
    axes: Axes,
    rows: Sequence[ErrorPoint],
    *,
    x: Callable[[ErrorPoint], float],
    by: Callable[[ErrorPoint], float],
    label: Callable[[float], str],
) -> None:
    """A curve of the error for every value of `by`, from dark to light."""
    values = sorted({by(row) for row in rows})
    for value, color in zip(values, shades(len(values)), strict=True):
        own = sorted((row for row in rows if by(row) == value), key=x)
        errors = [row.error for row in own]
        axes.plot([x(row) for row in own], errors, color=color, label=label(value))


def shades(count: int) -> list[tuple[float, ...]]:
    """Colours that stand in an order."""
    return [tuple(c) for c in matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count))]


def finish(axes: Axes, title: str, legend: str | None = None) -> None:
    """Title, grid and, under a heading, the legend."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    if legend is not None:
        axes.legend(title=legend, fontsize="small", title_fontsize="small")


def as_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns of numbers aligned to the right."""
    body = list(body)
    columns = zip(head, *body, strict=True)
    aligned = ["---:" if any(c[:1].isdigit() for c in cells) else "---" for _, *cells in columns]
    lines = [head, aligned, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
