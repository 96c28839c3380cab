"""Figures S3 to S6: the plain contrastive rule on the quadratic of Appendix E."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from matplotlib.figure import Figure

from equigrad.errors import ConfigurationError
from equigrad.estimators import Contrastive
from equigrad.experiments.runs.error_curves import (
    EQUILIBRIUM,
    ErrorPoint,
    as_table,
    division_table,
    draw_curves,
    error_and_beta,
    finish,
    log_slope,
    slope,
)
from equigrad.experiments.runs.reproduction import Cell, Reproduction, decades
from equigrad.gradient import meta_gradient
from equigrad.solvers import GradientDescent
from equigrad.testing import Quadratic

ERROR = "normalised error"
BETA = "nudging strength β"
STEPS = "steps in each phase"


@dataclass(frozen=True, kw_only=True)
class OnQuadratic(Reproduction):
    """What the figures on the quadratic share."""

    row: ClassVar[type] = ErrorPoint

    draws: int = 10
    """Draws of the quadratic; errors are geometric means over them."""

    strength: float = 1.0
    """λ."""

    dim: int = 50
    """N."""

    def __post_init__(self) -> None:
        if self.draws < 1 or self.dim < 1:
            raise ConfigurationError(
                f"draws and dim must be at least 1, got {self.draws} and {self.dim}"
            )
        if not 0 < self.strength < math.inf:
            raise ConfigurationError(f"strength must be positive, got {self.strength}")
        for name in ("points", "steps", "betas"):
            self._check(name, getattr(self, name, (2,)))

    @staticmethod
    def _check(name: str, values: tuple[float, ...]) -> None:
        least = {"points": 2, "steps": 1}.get(name, 0)
        if not values or len(set(values)) < len(values) or not min(values) >= least:
            raise ConfigurationError(f"{name} must differ and be at least {least}, got {values}")
        if name == "betas" and not all(0 < beta < math.inf for beta in values):
            raise ConfigurationError(f"betas must be positive and finite, got {values}")

    def model(self) -> Quadratic:
        """The quadratic, with all draws side by side."""
        return Quadratic(dim=self.dim, strength=self.strength, seed=range(self.draws))

    def prepare(self) -> Callable[..., ErrorPoint]:
        """Measure on the quadratic."""
        return partial(measure, self.model())


def measure(
    quadratic: Quadratic, points: int, free_steps: float, nudged_steps: float, beta: float
) -> ErrorPoint:
    """The error of the plain rule after so many steps of gradient descent from φ = 0.

    The free phase's step size is 1/L of its loss. The nudged phases' is 1/L of the one with the
    largest nudging strength, `1/(λ + 1 + (p-1)β)`, so that none diverges, however large β is.
    """
    if free_steps == nudged_steps == EQUILIBRIUM:
        estimate = quadratic.contrast(beta, range(points))
    else:
        largest_curvature = quadratic.strength + 1 + (points - 1) * beta
        nudged_solver = GradientDescent(lr=1 / largest_curvature, max_steps=int(nudged_steps))
        rule = Contrastive(beta=beta, points=points, matched=False, nudged_solver=nudged_solver)
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

    points: tuple[int, ...] = (2, 3, 4)
    """Numbers of points p."""

    steps: tuple[int, ...] = (5, 10, 15, 20, 30)
    """Numbers of steps in each phase."""

    smallest_exponent: int = -4
    """The grid of β begins with ten to this power."""

    largest_exponent: int = 2
    """It ends with ten to this power."""

    per_decade: int = 5
    """Values of β a decade."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_grid(self.smallest_exponent, self.largest_exponent, self.per_decade)

    def cells(self) -> list[Cell]:
        """Every β for every number of points and steps, at last for phases at equilibrium."""
        betas = decades(self.smallest_exponent, self.largest_exponent, self.per_decade)
        lengths = (*self.steps, EQUILIBRIUM)
        return [(p, t, t, beta) for p in self.points for t in lengths for beta in betas]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """Best β by p and steps; slopes and plateaus at equilibrium; the bound of Eq. (8)."""
        table = as_table(
            [STEPS, *(f"p = {p}: least error (its β)" for p in self.points)],
            [
                [str(t), *(error_and_beta(_best(rows, p, t)) for p in self.points)]
                for t in self.steps
            ],
        )
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
        """For each β, whether the error at equilibrium with p = 2 lies between those of Eq. (8)."""
        model = self.model()
        bounds = [(row, model.contrast_error_bounds(row.beta)) for row in _settled(rows, 2)]
        return [lower <= row.error <= upper for row, (lower, upper) in bounds]

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """A panel a number of points, and one for exact equilibrium."""
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        columns = math.ceil((len(self.points) + 1) / 2)
        panels = list(figure.subplots(2, columns, squeeze=False).flat)
        for axes, p, letter in zip(panels, self.points, "ABCDEFGH", strict=False):
            settled = _settled(rows, p)
            betas = [row.beta for row in settled]
            if p == 2:
                bounds = [self.model().contrast_error_bounds(beta) for beta in betas]
                lower, upper = zip(*bounds, strict=True)
                axes.fill_between(betas, lower, upper, color="0.9", label="Eq. (8)")
            draw_curves(
                axes,
                [row for row in rows if row.points == p and row.free_steps < EQUILIBRIUM],
                x=lambda row: row.beta,
                by=lambda row: row.free_steps,
                label=lambda t: f"{t:g}",
            )
            axes.plot(betas, [row.error for row in settled], "k--", lw=1, label="equilibrium")
            axes.set(xscale="log", yscale="log", xlabel=BETA, ylabel=ERROR)
            axes.set_ylim(1e-7, 1e2)
            finish(axes, f"{letter}   p = {p}", STEPS)
        last = panels[len(self.points)]
        draw_curves(
            last,
            [row for row in rows if row.free_steps == EQUILIBRIUM],
            x=lambda row: row.beta,
            by=lambda row: row.points,
            label=lambda p: f"p = {p:g}",
        )
        last.set(xscale="log", yscale="log", xlabel=BETA, ylabel="finite difference error")
        last.set_ylim(1e-12, 2)
        finish(last, f"{'ABCDEFGH'[len(self.points)]}   exact equilibrium", "")
        for axes in panels[len(self.points) + 1 :]:
            axes.set_axis_off()
        return figure


@dataclass(frozen=True, kw_only=True)
class FigS4(OnQuadratic):
    """Fig. S4: error on the quadratic against the number of steps, for several β."""

    name: ClassVar[str] = "figS4"

    points: tuple[int, ...] = (2, 3, 4)
    """Numbers of points p."""

    betas: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    """Nudging strengths."""

    steps: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27, 30, 35, 40)
    """Numbers of steps in each phase."""

    def cells(self) -> list[Cell]:
        """Every number of steps for every number of points and β, at last at equilibrium."""
        lengths = (*self.steps, EQUILIBRIUM)
        return [(p, t, t, beta) for p in self.points for beta in self.betas for t in lengths]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """Where each curve ends, and from how many steps on it is there."""
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
        """A panel a number of points."""
        figure = Figure(figsize=(4.2 * len(self.points), 4), layout="constrained")
        panels = figure.subplots(1, len(self.points), squeeze=False, sharey=True)[0]
        for axes, p, letter in zip(panels, self.points, "ABCDEFGH", strict=False):
            draw_curves(
                axes,
                [row for row in rows if row.points == p and row.free_steps < EQUILIBRIUM],
                x=lambda row: row.free_steps,
                by=lambda row: row.beta,
                label=lambda beta: f"{beta:g}",
            )
            axes.set(yscale="log", xlabel=STEPS)
            finish(axes, f"{letter}   p = {p}", "β" if axes is panels[0] else None)
        panels[0].set(ylabel=ERROR)
        return figure


@dataclass(frozen=True, kw_only=True)
class FigS5(OnQuadratic):
    """Fig. S5: least error on the quadratic over β, and that β, against the number of steps."""

    name: ClassVar[str] = "figS5"

    points: tuple[int, ...] = (2, 3, 4)
    """Numbers of points p."""

    steps: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
    """Numbers of steps in each phase."""

    smallest_exponent: int = -5
    """The grid of β begins with ten to this power."""

    largest_exponent: int = 1
    """It ends with ten to this power."""

    per_decade: int = 8
    """Values of β a decade."""

    fit_from: int = 12
    """Rates are fitted from this number of steps on, where errors are small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_grid(self.smallest_exponent, self.largest_exponent, self.per_decade)

    def cells(self) -> list[Cell]:
        """The whole grid."""
        betas = decades(self.smallest_exponent, self.largest_exponent, self.per_decade)
        return [(p, t, t, beta) for p in self.points for t in self.steps for beta in betas]

    def expected_rate(self) -> float:
        """By how much log δ falls a step: `-log(1 - ηm)`, m the smallest curvature, η = 1/L."""
        return -math.log(1 - (1 / self.dim + self.strength) / (1 + self.strength))

    def rates(self, rows: Sequence[ErrorPoint], points: int) -> tuple[float, float]:
        """By how much the logs of the least error and of its β fall a step, for small errors."""
        best = [_best(rows, points, t) for t in self.steps if t >= self.fit_from]
        steps = [row.free_steps for row in best]
        return (
            -slope(steps, [math.log(row.error) for row in best]),
            -slope(steps, [math.log(row.beta) for row in best]),
        )

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """The curves, and their rates beside what the balance of the two errors lets expect."""
        table = as_table(
            [STEPS, *(f"p = {p}: least error (its β)" for p in self.points)],
            [
                [str(t), *(error_and_beta(_best(rows, p, t)) for p in self.points)]
                for t in self.steps
            ],
        )
        rate = self.expected_rate()
        lines = [
            table,
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
        """Least error, and its β."""
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for p, marker in zip(self.points, "os^Dv<>", strict=False):
            best = [_best(rows, p, t) for t in self.steps]
            left.plot(self.steps, [row.error for row in best], marker=marker, label=f"p = {p}")
            right.plot(self.steps, [row.beta for row in best], marker=marker, label=f"p = {p}")
        left.set(yscale="log", xlabel=STEPS, ylabel=f"least {ERROR}")
        right.set(yscale="log", xlabel=STEPS, ylabel="β of the least error")
        finish(left, "A", "")
        finish(right, "B")
        return figure


@dataclass(frozen=True, kw_only=True)
class FigS6(OnQuadratic):
    """Fig. S6: error on the quadratic against the free phase's part of a fixed number of steps."""

    name: ClassVar[str] = "figS6"

    total_steps: int = 30
    """Steps of both phases together."""

    betas: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 10.0)
    """Nudging strengths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps < 2:
            raise ConfigurationError(f"total_steps must be at least 2, got {self.total_steps}")

    def cells(self) -> list[Cell]:
        """Every way to divide the steps, for every β."""
        total = self.total_steps
        return [(2, free, total - free, b) for b in self.betas for free in range(1, total)]

    def text(self, rows: Sequence[ErrorPoint]) -> str:
        """For every β the best division, and how wide its plateau is."""
        return division_table(rows)

    def draw(self, rows: Sequence[ErrorPoint]) -> Figure:
        """A curve a β."""
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        axes = figure.subplots()
        draw_curves(
            axes,
            rows,
            x=lambda row: row.free_steps,
            by=lambda row: row.beta,
            label=lambda beta: f"{beta:g}",
        )
        axes.set(
            yscale="log", xlabel=f"steps of the free phase, of {self.total_steps}", ylabel=ERROR
        )
        finish(axes, "", "β")
        return figure


def initial_slope(settled: Sequence[ErrorPoint]) -> float:
    """Slope of log error against log β over the first decade of the grid."""
    first = [row for row in settled if row.beta < 10.01 * settled[0].beta]
    return log_slope([row.beta for row in first], [row.error for row in first])


def _check_grid(smallest: int, largest: int, per_decade: int) -> None:
    if smallest >= largest or per_decade < 1:
        raise ConfigurationError(
            f"smallest_exponent must be below largest_exponent and per_decade at least 1, got "
            f"{smallest}, {largest} and {per_decade}"
        )


def _best(rows: Sequence[ErrorPoint], points: int, steps: float) -> ErrorPoint:
    own = [row for row in rows if (row.points, row.free_steps) == (points, steps)]
    return min(own, key=lambda row: row.error)


def _settled(rows: Sequence[ErrorPoint], points: int) -> list[ErrorPoint]:
    own = [row for row in rows if (row.points, row.free_steps) == (points, EQUILIBRIUM)]
    return sorted(own, key=lambda row: row.beta)


def _saturation(rows: Sequence[ErrorPoint]) -> str:
    *early, last = sorted(rows, key=lambda row: row.free_steps)
    there = [row.free_steps for row in early if abs(row.error - last.error) <= 0.1 * last.error]
    return f"{last.error:.1e} ({f'{min(there):g}' if there else 'not yet'})"
