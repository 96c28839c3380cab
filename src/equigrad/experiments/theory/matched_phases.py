"""Matched phases: error of the contrastive rule against the distance to equilibrium."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from equigrad.errors import SettlingError
from equigrad.experiments.runs.error_curves import as_table, log_slope
from equigrad.experiments.runs.figures import COLORS
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.reproduction import Cell, Reproduction, decades
from equigrad.fields import Count, Counts, Positive, Rule
from equigrad.gradient import meta_gradient
from equigrad.testing import Quadratic

RULES = {
    "plain forward": {"scheme": "forward", "matched": False},
    "matched forward": {"scheme": "forward", "matched": True},
    "symmetric": {"scheme": "symmetric", "matched": True},
}
SETTLING_DISTANCE = 0.5
"""Slopes are fitted to free phases that end at most this far from equilibrium."""


@dataclass(frozen=True)
class MatchedPoint:
    """Best error of a rule at one number of steps.

    Attributes:
        rule: name of the rule.
        steps: T.
        distance: δ, the free phase's distance to equilibrium.
        alignment: cosine between the free phase's remaining path and the response `dφ*/dβ` to a
            nudge, which decides the effect of the plain rule's drift.
        error: relative error of the meta-gradient at the best β.
        beta: the best β.
    """

    rule: str
    steps: int
    distance: float
    alignment: float
    error: float
    beta: float


@dataclass(frozen=True, kw_only=True)
class MatchedPhases(Reproduction):
    """Error of the contrastive rule on the quadratic of Appendix E against the length of phases.

    Gradient descent with step size 1/L takes T steps in each phase. As in Corollary 1, the best
    nudging strength of a grid is used for every T and rule. The plain rule's error falls like the
    square root of the distance δ to equilibrium, that of matched phases like δ itself.
    """

    name: ClassVar[str] = "matched-phases"
    row: ClassVar[type] = MatchedPoint

    seeds: Count = 5
    """Number of draws of the quadratic; errors are geometric means over them."""

    strength: Positive = 0.1
    """λ."""

    dim: Count = 50
    """N."""

    steps: Counts = (2, 5, 10, 20, 30, 40, 60, 80, 120)
    """Numbers of steps T."""

    start: Literal["center", "zero"] = "center"
    """Start of the free phase: the centre θ, or zero."""

    smallest_exponent: Annotated[int, Rule("of at most 0", lambda exponent: exponent <= 0)] = -8
    """Exponent of ten of the smallest β; the grid goes up to 10, with ten values per decade."""

    def cells(self) -> list[Cell]:
        """Every rule at every number of steps."""
        return [(rule, steps) for steps in self.steps for rule in RULES]

    def betas(self) -> list[float]:
        """The grid."""
        return decades(self.smallest_exponent, 1, 10)

    def prepare(self) -> Callable[[str, int], MatchedPoint]:
        """Draw the quadratics."""
        quadratics = [
            Quadratic(dim=self.dim, strength=self.strength, seed=seed) for seed in range(self.seeds)
        ]
        return partial(best_point, self, quadratics)

    def text(self, rows: Sequence[MatchedPoint]) -> str:
        """The table, with a row for each number of steps."""
        return slopes_table(rows, fitted_slopes(rows))

    def draw(self, rows: Sequence[MatchedPoint]) -> Figure:
        """Error against distance; best β against distance."""
        return drawn(rows, fitted_slopes(rows))


def best_point(
    config: MatchedPhases, quadratics: list[Quadratic], rule: str, steps: int
) -> MatchedPoint:
    """Geometric means over the quadratics, at the β of the grid with the smallest error."""

    def measured(beta: float) -> list[Measurement]:
        return [measure_one(q, config.start, steps, rule, beta) for q in quadratics]

    def log_error(beta: float) -> float:
        try:
            return float(np.mean([math.log(m.error) for m in measured(beta)]))
        except SettlingError:  # a nudge this strong needs smaller steps
            return math.inf

    betas = config.betas()
    # coarse to fine: the error falls and rises once along the grid
    coarse = min(betas[::5], key=log_error)
    best = min((b for b in betas if 0.3 < b / coarse < 3.2), key=log_error)
    found = measured(best)
    return MatchedPoint(
        rule=rule,
        steps=steps,
        distance=math.exp(np.mean([math.log(m.distance) for m in found])),
        alignment=float(np.mean([m.alignment for m in found])),
        error=math.exp(log_error(best)),
        beta=best,
    )


@dataclass(frozen=True)
class Measurement:
    """The values for one draw that a `MatchedPoint` averages."""

    error: float
    distance: float
    alignment: float


def measure_one(
    quadratic: Quadratic, start: str, steps: int, rule: str, beta: float
) -> Measurement:
    """Measure one meta-gradient, and the state of its free phase."""
    meta_params = quadratic.meta_params()
    params = {"phi": meta_params["theta"]} if start == "center" else quadratic.params()
    result = meta_gradient(
        quadratic.problem,
        params,
        meta_params,
        solver=quadratic.solver(max_steps=steps),
        estimator=replace(PAPERS_RULE, beta=beta, **RULES[rule]),
    )
    remaining = quadratic.equilibrium() - result.params["phi"]
    response = -quadratic.meta_gradient / quadratic.strength  # ∇ = -λ dφ*/dβ, Appendix E
    return Measurement(
        error=quadratic.relative_error(result.grads["theta"]),
        distance=torch.linalg.vector_norm(remaining).item(),
        alignment=torch.cosine_similarity(remaining, response, dim=0).item(),
    )


def fitted_slope(points: Sequence[MatchedPoint], rule: str) -> float:
    """Least-squares slope of log error against log δ, near equilibrium."""
    near = [p for p in points if p.rule == rule and p.distance < SETTLING_DISTANCE]
    return log_slope([p.distance for p in near], [p.error for p in near])


def fitted_slopes(points: Sequence[MatchedPoint]) -> dict[str, float]:
    """The slope of every rule."""
    return {rule: fitted_slope(points, rule) for rule in RULES}


def slopes_table(points: Sequence[MatchedPoint], slopes: dict[str, float]) -> str:
    """Error and best β of every rule for each number of steps, with the slopes in the last line."""
    lines = []
    for steps in dict.fromkeys(p.steps for p in points):
        row = [p for p in points if p.steps == steps]
        cells = (f"{p.error:.1e} (β {p.beta:.1g})" for p in row)
        lines.append([str(steps), f"{row[0].distance:.1e}", f"{row[0].alignment:.2f}", *cells])
    last = f"slope of log error against log δ, δ < {SETTLING_DISTANCE}"
    lines.append([last, "", "", *(f"**{slopes[rule]:.2f}**" for rule in RULES)])
    return as_table(["T", "distance δ", "alignment", *(f"{rule}, best β" for rule in RULES)], lines)


def drawn(points: Sequence[MatchedPoint], slopes: dict[str, float]) -> Figure:
    """Error against distance; best β against distance."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    markers = ("o", "s", "^")
    sizes = (6, 11, 5)  # two of the curves lie on each other
    for rule, color, marker, size in zip(RULES, COLORS, markers, sizes, strict=False):
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": size}
        own = [p for p in points if p.rule == rule]
        distance = [p.distance for p in own]
        label = f"{rule}, slope {slopes[rule]:.2f}"
        left.loglog(distance, [p.error for p in own], label=label, fillstyle="none", **style)
        right.loglog(distance, [p.beta for p in own], label=rule, fillstyle="none", **style)
    left.set(xlabel="distance δ to equilibrium", ylabel="relative error at the best β")
    right.set(xlabel="distance δ to equilibrium", ylabel="best β")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
