"""Figure 3: validation accuracy against the steps of the free phase, and against β."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from equigrad.errors import SettlingError
from equigrad.experiments.runs.error_curves import as_table, finish, shades
from equigrad.experiments.runs.figures import COLORS, MARKERS
from equigrad.experiments.runs.formats import mean_and_error, spread
from equigrad.experiments.runs.methods import EstimatorName
from equigrad.experiments.runs.reproduction import ByExperiments, Cell, over_seeds
from equigrad.experiments.strengths.images import SETTINGS, Cifar10, Mnist, OnImages, contrast, t1t2
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.fields import DIFFERENT, Count, Counts, Positive, Positives

PanelName = Literal["A", "B"]
METHOD_LABELS: dict[EstimatorName, str] = {"contrastive": "contrastive", "t1t2": "T1–T2"}
NO_NUDGE = 0.0
"""The key of results without β, those of T1–T2."""


@dataclass(frozen=True)
class PhaseResult:
    """The accuracies of a method after a first phase of some number of steps, in percent.

    Where a phase diverged, nothing was learned, and the accuracies are not numbers.
    """

    panel: str
    estimator: str
    steps: int
    beta: float
    seed: int
    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Fig3(ByExperiments):
    """Fig. 3: validation accuracy against the steps of the first phase, and against β.

    A: strengths from ten MNIST digits, by the contrastive rule and by T1–T2, for both of which the
    network learns alike. B: strengths from 50 photographs of CIFAR-10 by the contrastive rule as
    the paper has it, without matched phases: the shorter the first phase, the further the network
    is from rest, and the larger a β is needed to tell the nudge from the drift.
    """

    name: ClassVar[str] = "fig3"
    row: ClassVar[type] = PhaseResult
    score: ClassVar[str] = "validation"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "seeds": 1,
            "steps": (5, 10),
            "outer_steps": 2,
            "cifar_steps": (5, 10),
            "betas": (1.0, 3.0),
            "cifar_outer_steps": 2,
        },
        "paper": {
            "seeds": 12,
            "cifar_seeds": 3,
            "steps": (100, 200, 500, 1000, 2000, 5000),
            "outer_steps": 100,
            "outer_lr": 0.001,
            "cifar_steps": (500, 1000, 2000, 5000),
            "betas": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
            "cifar_outer_steps": 100,
            "cifar_outer_lr": 0.001,
        },
    }

    only: Annotated[tuple[PanelName, ...], DIFFERENT] = ("A", "B")
    """The panels that are drawn."""

    seeds: Count = 2
    """Number of seeds in panel A; seeds 0 to N-1 draw splits and starts."""

    cifar_seeds: Count = 1
    """Number of seeds in panel B."""

    steps: Counts = (50, 150, 500, 1500)
    """Numbers of steps of the first phase in panel A."""

    outer_steps: Count = 30
    """Number of Adam's steps on the strengths in panel A."""

    outer_lr: Positive = 0.01
    """Adam's step size on the strengths in panel A, the same for both methods."""

    cifar_steps: Counts = (50, 150, 450)
    """Numbers of steps of the first phase in panel B."""

    betas: Positives = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Nudging strengths β in panel B."""

    cifar_outer_steps: Count = 15
    """Number of Adam's steps on the strengths in panel B."""

    cifar_outer_lr: Positive = 0.01
    """Adam's step size on the strengths in panel B."""

    def cells(self) -> list[Cell]:
        """The cells, seed by seed, so that an interrupted figure has some results of each kind."""
        beta = SETTINGS["mnist-10"].contrastive.rule.beta
        left = [
            ("A", method, steps, beta if method == "contrastive" else NO_NUDGE, seed)
            for seed in range(self.seeds)
            for steps in self.steps
            for method in METHOD_LABELS
        ]
        right = [
            ("B", "contrastive", steps, beta, seed)
            for seed in range(self.cifar_seeds)
            for steps in self.cifar_steps
            for beta in self.betas
        ]
        return [cell for cell in (*left, *right) if cell[0] in self.only]

    def alone(self, panel: PanelName, estimator: str, steps: int, beta: float) -> Self:
        """A figure of a single cell: one number of steps, and in B one β."""
        if panel == "A":
            return replace(self, only=("A",), steps=(steps,))
        return replace(self, only=("B",), cifar_steps=(steps,), betas=(beta,))

    def label(self, panel: PanelName, estimator: EstimatorName, steps: int, beta: float) -> str:
        """The method in panel A, β in panel B."""
        what = METHOD_LABELS[estimator] if panel == "A" else f"β = {beta:g}"
        return f"{panel}, {what}, {steps:,} steps"

    def measure(
        self, panel: PanelName, estimator: EstimatorName, steps: int, beta: float, seed: int
    ) -> PhaseResult:
        """Learn strengths, then train with them."""
        experiment = self.mnist(steps) if panel == "A" else self.cifar(steps, beta)
        try:
            _, row = StrengthTrainer(experiment, seed).learn(estimator, watched=False)
            reached = (row.validation, row.test, row.gradient_evaluations, row.seconds)
        except SettlingError:
            reached = (float("nan"), float("nan"), 0, float("nan"))
        return PhaseResult(panel, estimator, steps, beta, seed, *reached)

    def mnist(self, steps: int) -> OnImages:
        """Ten digits: either method learns in this many steps of the same size."""
        preset = Mnist.preset(setting="mnist-10", scale=self.scale)
        ours = preset.contrastive
        return self.placed(
            preset,
            outer_steps=self.outer_steps,
            contrastive=replace(
                ours, solver=replace(ours.solver, max_steps=steps), outer_lr=self.outer_lr
            ),
            t1t2=t1t2(ours.solver.lr, steps, self.outer_lr),
        )

    def cifar(self, steps: int, beta: float) -> OnImages:
        """Photographs: learn in this many steps, with phases that are not matched, at a given β."""
        preset = Cifar10.preset(setting="cifar-50", scale=self.scale)
        ours = preset.contrastive
        rule = contrast(beta, ours.solver.lr, steps, ours.nudged_steps, self.cifar_outer_lr)
        return self.placed(preset, outer_steps=self.cifar_outer_steps, contrastive=rule)

    def text(self, rows: Sequence[PhaseResult]) -> str:
        """The accuracy by steps and method, and the error by steps and β."""
        panels = {"A": self._by_steps, "B": self._by_beta}
        return "\n".join(said(rows) for panel, said in panels.items() if panel in self.only)

    def _by_steps(self, rows: Sequence[PhaseResult]) -> str:
        curves = self.accuracies(rows)
        lines = [
            [f"{steps:,}", *(_said(curve[steps]) for curve in curves.values())]
            for steps in self.steps
        ]
        best = "; ".join(
            f"{METHOD_LABELS[method]} is best after {_or_dash(steps)}"
            for method, steps in self.best_steps(rows).items()
        )
        lr = self.mnist(1).recipe("t1t2").solver.lr
        return (
            "A. MNIST, 10 training images: validation accuracy in percent.\n\n"
            + as_table(["steps of the first phase", *(METHOD_LABELS[m] for m in curves)], lines)
            + f"\nOf these numbers of steps, {best}. Steps of {lr:g} and outer steps of "
            f"{self.outer_lr:g} for both.\n{self._how(self.seeds, self.outer_steps)}"
        )

    def _by_beta(self, rows: Sequence[PhaseResult]) -> str:
        best = self.best_betas(rows)
        lines = [
            [f"{steps:,}", *(_said(error) for error in curve.values()), _or_dash(best[steps])]
            for steps, curve in self.errors(rows).items()
        ]
        ours = self.cifar(1, 1.0).contrastive
        return (
            "B. CIFAR-10, 50 training images: validation error in percent.\n\n"
            + as_table(
                ["steps of the first phase", *(f"β = {b:g}" for b in self.betas), "best β"], lines
            )
            + f"\nPlain phases, {ours.nudged_steps} nudged steps; steps of {ours.solver.lr:g}, "
            f"outer steps of {self.cifar_outer_lr:g}.\n"
            + self._how(self.cifar_seeds, self.cifar_outer_steps)
        )

    def _how(self, seeds: int, outer_steps: int) -> str:
        return f"Scale {self.scale}; {outer_steps} outer steps; {over_seeds(seeds)}.\n"

    def accuracies(
        self, rows: Sequence[PhaseResult]
    ) -> dict[EstimatorName, dict[int, list[float]]]:
        """Accuracies of panel A in percent, one for each seed: by method, then by first steps."""
        return {
            method: {
                steps: [
                    row.validation
                    for row in rows
                    if (row.panel, row.estimator, row.steps) == ("A", method, steps)
                ]
                for steps in sorted(self.steps)
            }
            for method in METHOD_LABELS
        }

    def errors(self, rows: Sequence[PhaseResult]) -> dict[int, dict[float, list[float]]]:
        """Errors of panel B in percent, one for each seed: by first steps, then by β."""
        return {
            steps: {
                beta: [
                    100 - row.validation
                    for row in rows
                    if (row.panel, row.steps, row.beta) == ("B", steps, beta)
                ]
                for beta in self.betas
            }
            for steps in sorted(self.cifar_steps)
        }

    def best_steps(self, rows: Sequence[PhaseResult]) -> dict[EstimatorName, int | None]:
        """The number of steps in panel A at which a method's mean accuracy is highest."""
        return {method: _least(curve, sign=-1) for method, curve in self.accuracies(rows).items()}

    def best_betas(self, rows: Sequence[PhaseResult]) -> dict[int, float | None]:
        """The β in panel B with the lowest mean error, by steps of the first phase."""
        return {steps: _least(curve) for steps, curve in self.errors(rows).items()}

    def draw(self, rows: Sequence[PhaseResult]) -> Figure:
        """Draw a curve for each method, and one for each number of steps with its best β."""
        figure = Figure(figsize=(4.5 * len(self.only), 3.8), layout="constrained")
        panels = {"A": self._draw_steps, "B": self._draw_betas}
        places = figure.subplots(1, len(self.only), squeeze=False)[0]
        for axes, panel in zip(places, sorted(self.only), strict=True):
            panels[panel](axes, rows)
        return figure

    def _draw_steps(self, axes: Axes, rows: Sequence[PhaseResult]) -> None:
        for i, (method, curve) in enumerate(self.accuracies(rows).items()):
            _with_bars(axes, curve, label=METHOD_LABELS[method], color=COLORS[i], marker=MARKERS[i])
        axes.set(xscale="log", xlabel="steps of the first phase", ylabel="validation accuracy (%)")
        axes.set_xticks(sorted(self.steps), [f"{steps:,}" for steps in sorted(self.steps)])
        axes.minorticks_off()
        finish(axes, "A  MNIST, 10 images", "strengths by")

    def _draw_betas(self, axes: Axes, rows: Sequence[PhaseResult]) -> None:
        best, curves = self.best_betas(rows), self.errors(rows)
        for (steps, curve), color in zip(curves.items(), shades(len(curves)), strict=True):
            _with_bars(axes, curve, label=f"{steps:,}", color=color)
            if (beta := best[steps]) is not None:
                axes.plot(beta, np.mean(curve[beta]), "*", color=color, markersize=12)
        axes.set(xscale="log", xlabel="nudging strength β", ylabel="validation error (%)")
        finish(axes, "B  CIFAR-10, 50 images", "steps of the\nfirst phase")


Key = TypeVar("Key", int, float)


def _least(curve: Mapping[Key, Sequence[float]], sign: int = 1) -> Key | None:
    """The key whose mean is lowest, or highest for sign -1; None if no mean is finite.

    A seed that diverged has no number, and so its mean: what fails for one seed is not the best.
    """
    means = {key: sign * float(np.mean(values)) for key, values in curve.items() if values}
    finite = {key: mean for key, mean in means.items() if np.isfinite(mean)}
    return min(finite, key=lambda key: finite[key]) if finite else None


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:,g}"


def _said(values: Sequence[float]) -> str:
    return spread(values, ".2f") if np.isfinite(values).all() else "diverged"


def _with_bars(axes: Axes, curve: Mapping[Any, Sequence[float]], **style: Any) -> None:
    """The mean for each key, with standard errors if there are several values."""
    means, errors = zip(*(mean_and_error(values) for values in curve.values()), strict=True)
    axes.errorbar(list(curve), means, [error or 0.0 for error in errors], capsize=2, **style)
