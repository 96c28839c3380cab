"""Figures S3 to S6: error of the contrastive rule on the quadratic of Appendix E."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

from matplotlib.figure import Figure

from equigrad.experiments.runs.error_curves import (
    AXES,
    EQUILIBRIUM,
    ErrorPoint,
    Panel,
    as_table,
    division_table,
    draw_curves,
    draw_panels,
    error_and_beta,
    finish,
    log_slope,
    slope,
)
from equigrad.experiments.runs.figures import COLORS, MARKERS
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.reproduction import Cell, Reproduction, check_grid, decades
from equigrad.fields import DIFFERENT, Count, CountFrom2, Counts, Positive, Positives
from equigrad.gradient import meta_gradient
from equigrad.solvers import GradientDescent
from equigrad.testing import Quadratic

ERROR, BETA, STEPS = (AXES[name][0] for name in ("error", "beta", "free_steps"))
LETTERS = "ABCDEFGH"
"""Letters of panels."""


@dataclass(frozen=True, kw_only=True)
class OnQuadratic(Reproduction):
    """The common part of the figures on the quadratic."""

    row: ClassVar[type] = ErrorPoint

    draws: Count = 10
    """Number of draws of the quadratic; errors are geometric means over them."""

    strength: Positive = 1.0
    """λ."""

    dim: Count = 50
    """N."""

    def model(self) -> Quadratic:
        """The quadratic, with all draws side by side."""
        return Quadratic(dim=self.dim, strength=self.strength, seed=range(self.draws))

    def prepare(self) -> Callable[..., ErrorPoint]:
        """Measure errors on the quadratic."""
        return partial(measure, self.model())


def measure(
    quadratic: Quadratic, points: int, free_steps: float, nudged_steps: float, beta: float
) -> ErrorPoint:
    """The error of the plain rule with a number of gradient descent steps from φ = 0.

    The free phase's step size is 1/L of its loss. The nudged phases' step size is 1/L of the phase
    with the largest nudging strength, `1/(λ + 1 + (p-1)β)`, so that none diverges for any β.
    """
    if free_steps == nudged_steps == EQUILIBRIUM:
        estimate = quadratic.contrast(beta, range(points))
    else:
        largest_curvature = quadratic.strength + 1 + (points - 1) * beta
        nudged_solver = GradientDescent(lr=1 / largest_curvature, max_steps=int(nudged_steps))
        rule = replace(
            PAPERS_RULE, beta=beta, points=points, matched=False, nudged_solver=nudged_solver
        )
        estimate = meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=quadratic.solver(max_steps=int(free_steps)),
            estimator=rule,
        ).grads["theta"]
    return ErrorPoint(points, free_steps, nudged_steps, beta, quadratic.relative_error(estimate))


@dataclass(frozen=True, kw_only=True)
class FigS3(OnQuadratic):
    """Fig. S3: error on the quadratic against β, for p = 2, 3, 4, and at exact equilibrium."""

    name: ClassVar[str] = "figS3"

    points: Annotated[tuple[CountFrom2, ...], DIFFERENT] = (2, 3, 4)
    """Numbers of points p."""

    steps: Counts = (5, 10, 15, 20, 30)
    """Numbers of steps in each phase."""

    smallest_exponent: int = -4
    """Exponent of ten of the smallest β."""

    largest_exponent: int = 2
    """Exponent of ten of the largest β."""

    per_decade: Count = 5
    """Values of β per decade."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.smallest_exponent, self.largest_exponent)

    def cells(self) -> list[Cell]:
        """Every β for every number of points and steps, and at last for phases at equilibrium."""
        betas = decades(self.smallest_exponent, self.largest_exponent, self.per_decade)
        lengths = (*self.steps, EQUILIBRIUM)
        return [(p, t, t, beta) for p in self.points for t in lengths for beta in betas]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """Best β by p and steps, slopes and plateaus at equilibrium, and the bounds of Eq. (8)."""
        table = best_table(rows, self.points, self.steps)
        lines = [table, "At exact equilibrium:\n"]
        for p in self.points:
            settled = _settled(rows, p)
            lines.append(
                f"- p = {p}: the error grows like β to the power {initial_slope(settled):.2f} "
                f"(expected {p - 1}) and is {settled[-1].error:.2f} at β = {settled[-1].beta:g}."
            )
        if 2 in self.points:
            inside = self.within_bounds(rows)
            lines.append(
                f"- Eq. (8) holds for p = 2 at {sum(inside)} of {len(inside)} values of β."
            )
        return "\n".join(lines) + "\n"

    def within_bounds(self, rows: Sequence[ErrorPoint]) -> list[bool]:
        """For each β, whether the error at equilibrium for p = 2 is within the bounds of Eq. 8."""
        model = self.model()
        bounds = [(row, model.contrast_error_bounds(row.beta)) for row in _settled(rows, 2)]
        return [lower <= row.error <= upper for row, (lower, upper) in bounds]

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """A panel for each number of points, and one for exact equilibrium."""
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        columns = math.ceil((len(self.points) + 1) / 2)
        panels = list(figure.subplots(2, columns, squeeze=False).flat)
        for axes, p, letter in zip(panels, self.points, LETTERS, strict=False):
            settled = _settled(rows, p)
            betas = [row.beta for row in settled]
            if p == 2:
                bounds = [self.model().contrast_error_bounds(beta) for beta in betas]
                lower, upper = zip(*bounds, strict=True)
                axes.fill_between(betas, lower, upper, color="0.9", label="Eq. (8)")
            draw_curves(axes, _unsettled(rows, p), "beta", "free_steps")
            axes.plot(betas, [row.error for row in settled], "k--", lw=1, label="equilibrium")
            axes.set(xscale="log", yscale="log", xlabel=BETA, ylabel=ERROR)
            axes.set_ylim(1e-7, 1e2)
            finish(axes, f"{letter}   p = {p}", STEPS)
        last = panels[len(self.points)]
        settled = (row for row in rows if row.free_steps == EQUILIBRIUM)
        draw_curves(last, settled, "beta", "points", label="p = {:g}")
        last.set(xscale="log", yscale="log", xlabel=BETA, ylabel="finite difference error")
        last.set_ylim(1e-12, 2)
        finish(last, f"{LETTERS[len(self.points)]}   exact equilibrium", "")
        for axes in panels[len(self.points) + 1 :]:
            axes.set_axis_off()
        return figure


@dataclass(frozen=True, kw_only=True)
class FigS4(OnQuadratic):
    """Fig. S4: error on the quadratic against the number of steps, for several β."""

    name: ClassVar[str] = "figS4"

    points: Annotated[tuple[CountFrom2, ...], DIFFERENT] = (2, 3, 4)
    """Numbers of points p."""

    betas: Positives = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    """Nudging strengths."""

    steps: Counts = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27, 30, 35, 40)
    """Numbers of steps in each phase."""

    def cells(self) -> list[Cell]:
        """Every number of steps for every number of points and β, and at last at equilibrium."""
        lengths = (*self.steps, EQUILIBRIUM)
        return [(p, t, t, beta) for p in self.points for beta in self.betas for t in lengths]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """The limit of each curve, and the number of steps that reaches it."""
        return as_table(
            ["β", *(f"p = {p}: error at last (steps to within 10 %)" for p in self.points)],
            [
                [
                    f"{beta:g}",
                    *(
                        _saturation([r for r in rows if (r.points, r.beta) == (p, beta)])
                        for p in self.points
                    ),
                ]
                for beta in self.betas
            ],
        )

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """A panel for each number of points."""
        panels = [
            Panel(
                f"{letter}   p = {p}",
                _unsettled(rows, p),
                *("free_steps", "beta"),
                legend="" if letter == "A" else None,
            )
            for p, letter in zip(self.points, LETTERS, strict=False)
        ]
        return draw_panels(panels, figsize=(4.2 * len(panels), 4), sharey=True)


@dataclass(frozen=True, kw_only=True)
class FigS5(OnQuadratic):
    """Fig. S5: least error on the quadratic over β, and its β, against the number of steps."""

    name: ClassVar[str] = "figS5"

    points: Annotated[tuple[CountFrom2, ...], DIFFERENT] = (2, 3, 4)
    """Numbers of points p."""

    steps: Counts = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
    """Numbers of steps in each phase."""

    smallest_exponent: int = -5
    """Exponent of ten of the smallest β."""

    largest_exponent: int = 1
    """Exponent of ten of the largest β."""

    per_decade: Count = 8
    """Values of β per decade."""

    fit_from: int = 12
    """Number of steps from which rates are fitted, where errors are small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.smallest_exponent, self.largest_exponent)

    def cells(self) -> list[Cell]:
        """The whole grid."""
        betas = decades(self.smallest_exponent, self.largest_exponent, self.per_decade)
        return [(p, t, t, beta) for p in self.points for t in self.steps for beta in betas]

    def expected_rate(self) -> float:
        """The decrease of log δ per step: `-log(1 - ηm)`, m the smallest curvature, η = 1/L."""
        return -math.log(1 - (1 / self.dim + self.strength) / (1 + self.strength))

    def rates(self, rows: Sequence[ErrorPoint], points: int) -> tuple[float, float]:
        """The decrease per step of the logs of the least error and its β, for small errors."""
        best = [_best(rows, points, t) for t in self.steps if t >= self.fit_from]
        steps = [row.free_steps for row in best]
        return (
            -slope(steps, [math.log(row.error) for row in best]),
            -slope(steps, [math.log(row.beta) for row in best]),
        )

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """The curves, and their rates next to those expected from the balance of the two errors."""
        rate = self.expected_rate()
        lines = [
            best_table(rows, self.points, self.steps),
            f"The distance δ to equilibrium falls by exp(-{rate:.3f}) a step. An error of "
            f"δ/β + β^(p-1) is least at β ∝ δ^(1/p), where it is ∝ δ^((p-1)/p). Measured from "
            f"{self.fit_from} steps on:\n",
        ]
        for p in self.points:
            of_error, of_beta = self.rates(rows, p)
            lines.append(
                f"- p = {p}: the least error falls by exp(-{of_error:.3f}) a step (expected "
                f"{rate * (p - 1) / p:.3f}), its β by exp(-{of_beta:.3f}) (expected "
                f"{rate / p:.3f})."
            )
        return "\n".join(lines) + "\n"

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """The least error, and its β."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for p, color, marker in zip(self.points, COLORS, MARKERS, strict=False):
            best = [_best(rows, p, t) for t in self.steps]
            style: dict[str, Any] = {"color": color, "marker": marker}
            left.plot(self.steps, [row.error for row in best], label=f"p = {p}", **style)
            right.plot(self.steps, [row.beta for row in best], label=f"p = {p}", **style)
        left.set(yscale="log", xlabel=STEPS, ylabel=f"least {ERROR}")
        right.set(yscale="log", xlabel=STEPS, ylabel="β of the least error")
        finish(left, "A", "")
        finish(right, "B")
        return figure


@dataclass(frozen=True, kw_only=True)
class FigS6(OnQuadratic):
    """Fig. S6: error on the quadratic against the free phase's share of a fixed number of steps."""

    name: ClassVar[str] = "figS6"

    total_steps: CountFrom2 = 30
    """Total number of steps of both phases."""

    betas: Positives = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0)
    """Nudging strengths."""

    def cells(self) -> list[Cell]:
        """Every way to divide the steps, for every β."""
        total = self.total_steps
        return [(2, free, total - free, b) for b in self.betas for free in range(1, total)]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """For every β, the best division and the width of its plateau."""
        return division_table(rows)

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """A curve for each β."""
        steps = {"xlabel": f"steps of the free phase, of {self.total_steps}"}
        return draw_panels([Panel("", rows, "free_steps", "beta", axes=steps)], figsize=(6, 4.2))


def best_table(rows: Sequence[ErrorPoint], points: Sequence[int], steps: Sequence[int]) -> str:
    """The least error and its β, by number of steps and number of points p."""
    return as_table(
        [STEPS, *(f"p = {p}: least error (its β)" for p in points)],
        [[str(t), *(error_and_beta(_best(rows, p, t)) for p in points)] for t in steps],
    )


def initial_slope(settled: Sequence[ErrorPoint]) -> float:
    """Slope of log error against log β over the first decade of the grid."""
    first = [row for row in settled if row.beta < 10.01 * settled[0].beta]
    return log_slope([row.beta for row in first], [row.error for row in first])


def _best(rows: Sequence[ErrorPoint], points: int, steps: float) -> ErrorPoint:
    own = [row for row in rows if (row.points, row.free_steps) == (points, steps)]
    return min(own, key=lambda row: row.error)


def _unsettled(rows: Sequence[ErrorPoint], points: int) -> list[ErrorPoint]:
    return [row for row in rows if row.points == points and row.free_steps < EQUILIBRIUM]


def _settled(rows: Sequence[ErrorPoint], points: int) -> list[ErrorPoint]:
    own = [row for row in rows if (row.points, row.free_steps) == (points, EQUILIBRIUM)]
    return sorted(own, key=lambda row: row.beta)


def _saturation(rows: Sequence[ErrorPoint]) -> str:
    *early, last = sorted(rows, key=lambda row: row.free_steps)
    there = [row.free_steps for row in early if abs(row.error - last.error) <= 0.1 * last.error]
    return f"{last.error:.1e} ({f'{min(there):g}' if there else 'not yet'})"
