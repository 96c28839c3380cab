"""Figures 1, S1 and S2: the bound of Theorem 2 on the error, and its minimum over β."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure

from equigrad.experiments.runs.error_curves import (
    AXES,
    Panel,
    as_table,
    draw_curves,
    draw_panels,
    finish,
    log_slope,
)
from equigrad.experiments.runs.figures import COLORS
from equigrad.experiments.runs.reproduction import Cell, Reproduction, decades
from equigrad.fields import Positive, Positives, require
from equigrad.theory import best_beta, best_bound, error_bound

ERROR = AXES["free_error"][0]


@dataclass(frozen=True)
class BoundPoint:
    """The bound of Theorem 2 with `B_in = B_out = C = 1`.

    Attributes:
        free_error: δ.
        nudged_error: δ'.
        beta: β.
        bound: `B(δ, δ', β)`.
    """

    free_error: float
    nudged_error: float
    beta: float
    bound: float


@dataclass(frozen=True)
class BestPoint:
    """The least bound over β, for δ = δ'.

    Attributes:
        error: δ = δ'.
        beta: β*.
        bound: `B(δ, δ, β*)`.
    """

    error: float
    beta: float
    bound: float


def bound_point(free_error: float, nudged_error: float, beta: float) -> BoundPoint:
    """The bound of Theorem 2."""
    return BoundPoint(free_error, nudged_error, beta, error_bound(free_error, nudged_error, beta))


def best_point(error: float) -> BestPoint:
    """The best β and bound by Corollary 1."""
    return BestPoint(error, best_beta(error, error), best_bound(error, error))


def least_table(rows: Sequence[BoundPoint], corollary: Callable[[float], float]) -> str:
    """For every δ, the least bound of its curve and where it is, and β* of Corollary 1."""
    body = []
    for error in sorted({row.free_error for row in rows}):
        own = [row for row in rows if row.free_error == error]
        least, last = min(own, key=lambda row: row.bound), max(own, key=lambda row: row.beta)
        body.append(
            [
                f"{error:g}",
                f"{least.bound:.2g}",
                f"{least.beta:.2g}",
                f"{corollary(error):.2g}",
                f"{last.bound:.2g}",
            ]
        )
    return as_table(
        ["δ", "least bound", "at β", "β* of Corollary 1", "bound at the largest β"], body
    )


@dataclass(frozen=True, kw_only=True)
class Fig1(Reproduction):
    """Fig. 1: the bound of Theorem 2 against β, and against the distance to equilibrium."""

    name: ClassVar[str] = "fig1"
    row: ClassVar[type] = BoundPoint

    errors: Positives = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Distances δ = δ' of the curves against β."""

    betas: Positives = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Nudging strengths of the curves against δ = δ'."""

    def cells(self) -> list[Cell]:
        """Both families of curves."""
        against_beta = [(e, e, beta) for e in self.errors for beta in decades(-4, 2, 20)]
        return against_beta + [(e, e, beta) for beta in self.betas for e in decades(-8, 0, 20)]

    def prepare(self) -> Callable[..., BoundPoint]:
        """Theorem 2."""
        return bound_point

    def text(self, rows: Sequence[BoundPoint]) -> str:
        """The minima of the curves against β, and the limits of those against δ."""
        table = least_table(
            [row for row in rows if row.free_error in self.errors],
            lambda error: best_beta(error, error),
        )
        floors = [
            f"- β = {beta:g}: the bound falls no further than β/(1+β) = {beta / (1 + beta):.2g}; "
            f"it is within 10 % of that from δ = {_saturation(rows, beta):.1g} down."
            for beta in self.betas
        ]
        return f"{table}\n" + "\n".join(floors) + "\n"

    def draw(self, rows: Sequence[BoundPoint]) -> Figure:
        """Against β, and against δ = δ'."""
        against_beta = [row for row in rows if row.free_error in self.errors]
        against_error = [row for row in rows if row.beta in self.betas]
        panels = [
            Panel("A", against_beta, "beta", "free_error", "bound", axes={"ylim": (5e-4, 1e2)}),
            Panel("B", against_error, "free_error", "beta", "bound"),
        ]
        return draw_panels(panels, figsize=(10, 4), sharey=True)


@dataclass(frozen=True, kw_only=True)
class FigS1(Reproduction):
    """Fig. S1: the bound of Theorem 2 against β, with the nudged phase's error fixed."""

    name: ClassVar[str] = "figS1"
    row: ClassVar[type] = BoundPoint

    nudged_error: Positive = 1e-2
    """Distance δ' of the nudged phase to its equilibrium."""

    errors: Positives = (1e-4, 1e-3, 1e-2, 1e-1, 0.5)
    """Distances δ of the free phase."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.nudged_error + max(self.errors) < 1,
            f"nudged_error and each of errors must add up to less than 1, where the bound has "
            f"a minimum; got {self.nudged_error} and {self.errors}",
        )

    def cells(self) -> list[Cell]:
        """One curve for each δ."""
        betas = decades(-3, 2, 20)
        return [(error, self.nudged_error, beta) for error in self.errors for beta in betas]

    def prepare(self) -> Callable[..., BoundPoint]:
        """Theorem 2."""
        return bound_point

    def text(self, rows: Sequence[BoundPoint]) -> str:
        """The minima of the curves."""
        return least_table(rows, lambda error: best_beta(error, self.nudged_error))

    def draw(self, rows: Sequence[BoundPoint]) -> Figure:
        """One curve for each δ."""
        title = f"δ' = {self.nudged_error:g}"
        panel = Panel(title, rows, "beta", "free_error", "bound", legend="δ")
        return draw_panels([panel], figsize=(5.5, 4))


@dataclass(frozen=True, kw_only=True)
class FigS2(Reproduction):
    """Fig. S2: the least bound and its β by Corollary 1, against the distance δ = δ'."""

    name: ClassVar[str] = "figS2"
    row: ClassVar[type] = BestPoint

    betas: Positives = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """Nudging strengths of the bounds drawn in grey."""

    def cells(self) -> list[Cell]:
        """Distances up to the largest with a best β."""
        return [(error,) for error in decades(-6, math.log10(0.4), 20)]

    def prepare(self) -> Callable[..., BestPoint]:
        """Corollary 1."""
        return best_point

    def text(self, rows: Sequence[BestPoint]) -> str:
        """The slopes near equilibrium."""
        near = [row for row in rows if row.error < 1e-4]
        errors = [row.error for row in near]
        table = as_table(
            ["δ = δ'", "least bound", "β*"],
            [[f"{row.error:.1e}", f"{row.bound:.2g}", f"{row.beta:.2g}"] for row in rows[::20]],
        )
        return (
            f"{table}\nFor δ < 1e-4 the least bound goes like δ to the power "
            f"{log_slope(errors, [row.bound for row in near]):.2f}, β* like δ to the power "
            f"{log_slope(errors, [row.beta for row in near]):.2f}; 1/2 is the limit.\n"
        )

    def draw(self, rows: Sequence[BestPoint]) -> Figure:
        """The least bound below the bounds for several β, and its β."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        errors = [row.error for row in rows]
        grey = [bound_point(error, error, beta) for beta in self.betas for error in errors]
        draw_curves(left, grey, "free_error", "beta", y="bound", colors=["0.75"] * len(self.betas))
        left.loglog(errors, [row.bound for row in rows], color=COLORS[0], lw=2)
        right.loglog(errors, [row.beta for row in rows], color=COLORS[0], lw=2)
        left.set(xlabel=ERROR, ylabel=AXES["bound"][0], ylim=(5e-4, 1e2))
        right.set(xlabel=ERROR, ylabel="β of the least bound")
        finish(left, "A")
        finish(right, "B")
        return figure


def _saturation(rows: Sequence[BoundPoint], beta: float) -> float:
    floor = 1.1 * beta / (1 + beta)
    return max(
        (row.free_error for row in rows if row.beta == beta and row.bound <= floor), default=0
    )
