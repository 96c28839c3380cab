"""Matched phases: how the error of the contrastive rule follows the distance to equilibrium."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from equigrad.errors import ConfigurationError, SettlingError
from equigrad.estimators import Contrastive
from equigrad.experiments.runs.error_curves import log_slope
from equigrad.experiments.runs.reproduction import Cell, Reproduction, decades
from equigrad.gradient import meta_gradient
from equigrad.testing import Quadratic

RULES = {
    "plain forward": {"scheme": "forward", "matched": False},
    "matched forward": {"scheme": "forward", "matched": True},
    "symmetric": {"scheme": "symmetric", "matched": True},
}
SETTLING_DISTANCE = 0.5
"""Slopes are fitted where the free phase ended at most this far from equilibrium."""


@dataclass(frozen=True)
class Point:
    """Best error of a rule at one number of steps.

    Attributes:
        rule: its name.
        steps: T.
        distance: δ, the free phase's distance to equilibrium.
        alignment: cosine between the way that the free phase still has to go and the response
            `dφ*/dβ` to a nudge: what the plain rule's drift is worth.
        error: relative error of the meta-gradient at the best β.
        beta: that β.
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

    Gradient descent with step size 1/L takes T steps in each phase. For every T and rule the best
    nudging strength on a grid is taken, as Corollary 1 does. The plain rule's error falls like the
    square root of the distance δ to equilibrium, that of matched phases like δ itself.
    """

    name: ClassVar[str] = "matched-phases"
    row: ClassVar[type] = Point

    seeds: int = 5
    """Draws of the quadratic; errors are geometric means over them."""

    strength: float = 0.1
    """λ."""

    dim: int = 50
    """N."""

    steps: tuple[int, ...] = (2, 5, 10, 20, 30, 40, 60, 80, 120)
    """Numbers of steps T."""

    start: Literal["center", "zero"] = "center"
    """Where the free phase starts: at θ, which the learner is pulled to, or at zero."""

    smallest_exponent: int = -8
    """The grid of β runs from ten to this power up to 10, ten values a decade."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.dim < 1 or not self.steps or min(self.steps) < 1:
            raise ConfigurationError(
                f"seeds, dim and every one of steps must be at least 1, got {self.seeds}, "
                f"{self.dim}, {self.steps}"
            )
        if self.smallest_exponent > 0 or len(set(self.steps)) < len(self.steps):
            raise ConfigurationError(
                f"smallest_exponent must be at most 0 and steps must differ, got "
                f"{self.smallest_exponent} and {self.steps}"
            )
        if not self.strength > 0:
            raise ConfigurationError(f"strength must be positive, got {self.strength}")

    def cells(self) -> list[Cell]:
        """Every rule at every number of steps."""
        return [(rule, steps) for steps in self.steps for rule in RULES]

    def betas(self) -> list[float]:
        """The grid."""
        return decades(self.smallest_exponent, 1, 10)

    def prepare(self) -> Callable[[str, int], Point]:
        """Draw the quadratics."""
        quadratics = [
            Quadratic(dim=self.dim, strength=self.strength, seed=seed) for seed in range(self.seeds)
        ]
        return partial(best_point, self, quadratics)

    def text(self, rows: Sequence[Point]) -> str:
        """The table, a row a number of steps."""
        return as_markdown(rows, fitted_slopes(rows))

    def draw(self, rows: Sequence[Point]) -> Figure:
        """Error against distance; best β against distance."""
        return drawn(rows, fitted_slopes(rows))


def best_point(config: MatchedPhases, quadratics: list[Quadratic], rule: str, steps: int) -> Point:
    """Geometric means over the quadratics, at the β of the grid with the smallest error."""

    def measured(beta: float) -> list[Measurement]:
        return [measure_one(q, config.start, steps, rule, beta) for q in quadratics]

    def log_error(beta: float) -> float:
        try:
            return float(np.mean([math.log(m.error) for m in measured(beta)]))
        except SettlingError:  # so strong a nudge needs a smaller step
            return math.inf

    betas = config.betas()
    # coarse to fine: the error falls and rises once along the grid
    coarse = min(betas[::5], key=log_error)
    best = min((b for b in betas if 0.3 < b / coarse < 3.2), key=log_error)
    found = measured(best)
    return Point(
        rule=rule,
        steps=steps,
        distance=math.exp(np.mean([math.log(m.distance) for m in found])),
        alignment=float(np.mean([m.alignment for m in found])),
        error=math.exp(log_error(best)),
        beta=best,
    )


@dataclass(frozen=True)
class Measurement:
    """What a `Point` averages, for one draw."""

    error: float
    distance: float
    alignment: float


def measure_one(
    quadratic: Quadratic, start: str, steps: int, rule: str, beta: float
) -> Measurement:
    """One meta-gradient, and where its free phase stood."""
    meta_params = quadratic.meta_params()
    params = {"phi": meta_params["theta"]} if start == "center" else quadratic.params()
    result = meta_gradient(
        quadratic.problem,
        params,
        meta_params,
        solver=quadratic.solver(max_steps=steps),
        estimator=Contrastive(beta=beta, **RULES[rule]),
    )
    remaining = quadratic.equilibrium() - result.params["phi"]
    response = -quadratic.meta_gradient / quadratic.strength  # ∇ = -λ dφ*/dβ, Appendix E
    return Measurement(
        error=quadratic.relative_error(result.grads["theta"]),
        distance=torch.linalg.vector_norm(remaining).item(),
        alignment=torch.cosine_similarity(remaining, response, dim=0).item(),
    )


def fitted_slope(points: Sequence[Point], rule: str) -> float:
    """Least-squares slope of log error against log δ, where the free phase was settling."""
    near = [p for p in points if p.rule == rule and p.distance < SETTLING_DISTANCE]
    return log_slope([p.distance for p in near], [p.error for p in near])


def fitted_slopes(points: Sequence[Point]) -> dict[str, float]:
    """The slope of every rule."""
    return {rule: fitted_slope(points, rule) for rule in RULES}


def as_markdown(points: Sequence[Point], slopes: dict[str, float]) -> str:
    """The table, a row a number of steps."""
    lines = [
        "| T | distance δ | alignment | " + " | ".join(f"{rule}, best β" for rule in RULES) + " |",
        "| ---: | ---: | ---: |" + " ---: |" * len(RULES),
    ]
    for steps in dict.fromkeys(p.steps for p in points):
        row = [p for p in points if p.steps == steps]
        cells = " | ".join(f"{p.error:.1e} (β {p.beta:.1g})" for p in row)
        lines.append(f"| {steps} | {row[0].distance:.1e} | {row[0].alignment:.2f} | {cells} |")
    cells = " | ".join(f"**{slopes[rule]:.2f}**" for rule in RULES)
    lines.append(f"| slope of log error against log δ, δ < {SETTLING_DISTANCE} | | | {cells} |")
    return "\n".join(lines) + "\n"


def drawn(points: Sequence[Point], slopes: dict[str, float]) -> Figure:
    """Error against distance; best β against distance."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rule, marker in zip(RULES, "os^", strict=True):
        own = [p for p in points if p.rule == rule]
        distance = [p.distance for p in own]
        label = f"{rule}, slope {slopes[rule]:.2f}"
        left.loglog(distance, [p.error for p in own], marker=marker, label=label)
        right.loglog(distance, [p.beta for p in own], marker=marker, label=rule)
    left.set(xlabel="distance δ to equilibrium", ylabel="relative error at the best β")
    right.set(xlabel="distance δ to equilibrium", ylabel="best β")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
