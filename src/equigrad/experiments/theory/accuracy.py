"""Error and cost of `Contrastive(rtol=…)` and of other estimators on the zoo of problems."""

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from equigrad.errors import DoubleBackwardError, EquigradError
from equigrad.estimators import (
    T1T2,
    ConjugateGradient,
    Contrastive,
    Estimator,
    NeumannSeries,
    Unrolled,
)
from equigrad.estimators.linearisation import Linearisation
from equigrad.estimators.neumann_series import largest_curvature
from equigrad.evaluation import Evaluation
from equigrad.experiments.runs.error_curves import as_table, finish
from equigrad.experiments.runs.experiment import one_of
from equigrad.experiments.runs.figures import COLORS, MARKERS, color
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.reproduction import Cell, Reproduction
from equigrad.fields import SOME, Count, Share
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.solvers import LBFGS, GradientDescent, Solver
from equigrad.testing import Case
from equigrad.testing.zoo import ZOO
from equigrad.vectors import flatten

RTOLS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
UNROLLED_STEPS = 400
SETTLED = LBFGS(tol=1e-8, max_steps=10_000)
BASELINES: dict[str, Estimator] = {
    "conjugate gradient": ConjugateGradient(max_iterations=500, products="autograd"),
    "Neumann": NeumannSeries(products="autograd"),
    "T1–T2": T1T2(),
    "unrolled": Unrolled(),
}
TUNED = {"contrastive, tuned": 1e-2, "conjugate gradient, tuned": 1e-2}
"""Methods with settings chosen by the true error: the fastest settings that reach this error."""

SCHEMES: dict[str, dict[str, Any]] = {
    "forward": {"matched": False},
    "symmetric": {"scheme": "symmetric"},
    "forward force": {"matched": False, "nudge": "force"},
    "symmetric force": {"scheme": "symmetric", "nudge": "force"},
}
TOLERANCES = tuple(10.0**-k for k in range(2, 8))


@dataclass(frozen=True)
class AccuracyRow:
    """One method on one problem.

    Attributes:
        problem: name of the problem in the zoo.
        method: the estimator and its requested accuracy.
        error: true relative error; infinite if there is no answer.
        estimate: the error that the estimator itself estimates; NaN if it does not.
        gradients: gradient evaluations; a Hessian-vector product counts as two.
        seconds: time of the whole meta-gradient, including the free phase; the least of some runs.
        megabytes: peak memory of the process beyond that of the free phase alone.
        note: settings, or the reason why there is no answer.
    """

    problem: str
    method: str
    error: float
    estimate: float
    gradients: int
    seconds: float
    megabytes: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Accuracy(Reproduction):
    """Requested, estimated and true errors of estimators, and their costs.

    `Contrastive(rtol=…)` runs on all problems of `equigrad.testing.zoo`, in float64, against
    gradients by an exact solve. It is compared with conjugate gradients, a Neumann series and T1–T2
    at a state settled to 1e-8, and with reverse mode through 400 steps of gradient descent. A last
    comparison is at equal accuracy: the fastest settings of the contrastive rule with a fixed β and
    of conjugate gradients, chosen by the true error.
    """

    name: ClassVar[str] = "accuracy"
    row: ClassVar[type] = AccuracyRow

    problems: Annotated[tuple[str, ...], SOME] = tuple(ZOO)
    """Names of problems in the zoo."""

    rtols: Annotated[tuple[Share, ...], SOME] = RTOLS
    """Relative errors to request."""

    repeats: Count = 5
    """Runs of each measurement, the fastest of which counts; one if it takes seconds."""

    tuned: bool = True
    """Whether to compare at equal accuracy, too, which takes most of the time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for problem in self.problems:
            one_of(ZOO, "problems", problem)

    def cells(self) -> Sequence[Cell]:
        """Every method on every problem."""
        methods = [asked(rtol) for rtol in self.rtols] + list(BASELINES)
        methods += list(TUNED) if self.tuned else []
        return [(problem, method) for problem in self.problems for method in methods]

    def prepare(self) -> Callable[[str, str], AccuracyRow]:
        """Use one thread, and keep each case for the methods that follow on it."""
        torch.set_num_threads(1)
        cases: dict[str, Case] = {}

        def measure(problem: str, method: str) -> AccuracyRow:
            if problem not in cases:
                cases.clear()
                cases[problem] = ZOO[problem]()
            if method in TUNED:
                return measure_tuned(problem, method, cases[problem], self.repeats)
            return measure_one(problem, method, cases[problem], self.repeats)

        return measure

    def text(self, rows: Sequence[AccuracyRow]) -> str:
        """Requested and true errors, costs, and the comparison at equal accuracy."""
        by_cell = {(row.problem, row.method): row for row in rows}
        parts = [self._asked(by_cell), self._costs(by_cell)]
        return "\n".join([*parts, self._equal(by_cell)] if self.tuned else parts)

    def _asked(self, rows: dict[Cell, AccuracyRow]) -> str:
        own = [rows[p, asked(r)] for p in self.problems for r in self.rtols]
        judged = [row.estimate / row.error for row in own if 0 < row.error < math.inf]
        body = [
            [
                problem,
                *(
                    f"{rows[problem, asked(r)].error:.1e} ({rows[problem, asked(r)].estimate:.1e})"
                    for r in self.rtols
                ),
            ]
            for problem in self.problems
        ]
        reached = ", ".join(
            f"{sum(rows[p, asked(r)].error <= r for p in self.problems)} at {r:g}"
            for r in self.rtols
        )
        within = sum(1 <= ratio <= 10 for ratio in judged)
        return (
            "True error of `Contrastive(rtol=…)`, and the estimated one:\n\n"
            + as_table(["problem", *(f"rtol {r:g}" for r in self.rtols)], body)
            + f"\nOf {len(self.problems)} problems the error asked for was reached on {reached}. "
            f"The estimate is between 1 and 10 times the true error in {within} of {len(own)}"
            + (f", from {min(judged):.2g} to {max(judged):.2g}" if judged else "")
            + ".\n"
        )

    def _costs(self, rows: dict[Cell, AccuracyRow]) -> str:
        methods = [asked(r) for r in (1e-2, 1e-5) if r in self.rtols] + list(BASELINES)

        def cell(row: AccuracyRow) -> str:
            if not math.isfinite(row.error):
                return row.note
            mark = " *" if row.note else ""
            return (
                f"{row.error:.0e}, {row.gradients}, {1e3 * row.seconds:.0f} ms, "
                f"{row.megabytes:.1f} MB{mark}"
            )

        body = [[p, *(cell(rows[p, m]) for m in methods)] for p in self.problems]
        text = "Error, gradient evaluations, time, and memory beyond that of the free phase:\n\n"
        text += as_table(["problem", *methods], body)
        if any(
            rows[p, m].note and math.isfinite(rows[p, m].error) for p, m in rows if m in BASELINES
        ):
            text += (
                "\n\\* the model has no second derivative with fused attention, and the method was "
                "given the slower one without\n"
            )
        return text

    def _equal(self, rows: dict[Cell, AccuracyRow]) -> str:
        body, faster = [], 0
        for problem in self.problems:
            ours, theirs = (rows[problem, method] for method in TUNED)
            ratio = ours.seconds / theirs.seconds if math.isfinite(ours.seconds) else math.inf
            faster += ratio <= 1
            body.append(
                [
                    problem,
                    f"{1e3 * ours.seconds:.1f}",
                    ours.note,
                    f"{1e3 * theirs.seconds:.1f}",
                    theirs.note,
                    f"{ratio:.2f}",
                ]
            )
        head = ["problem", "contrastive, ms", "settings", "conjugate gradient, ms", "settings"]
        return (
            "At equal accuracy 1e-2, the fastest settings of each by the true error:\n\n"
            + as_table([*head, "ratio"], body)
            + f"\nThe contrastive rule takes no more time on {faster} of {len(self.problems)}.\n"
        )

    def draw(self, rows: Sequence[AccuracyRow]) -> Figure:
        """The true error against the requested one, and against the estimate."""
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, problem in enumerate(self.problems):
            own = {row.method: row for row in rows if row.problem == problem}
            found = [own[asked(r)] for r in self.rtols]
            errors, estimates = [row.error for row in found], [row.estimate for row in found]
            look = {"color": color(i), "marker": MARKERS[i // len(COLORS)], "markersize": 5}
            left.loglog(self.rtols, errors, label=problem, **look)
            right.loglog(errors, estimates, linestyle="none", **look)
        ends = [min(self.rtols), max(self.rtols)]
        left.loglog(ends, ends, "k--", linewidth=1)
        left.set(xlabel="relative error asked for", ylabel="true relative error")
        errors = [row.error for row in rows if math.isfinite(row.estimate) and row.error > 0]
        if errors:
            span = [min(errors), max(errors)]
            right.loglog(span, span, "k--", linewidth=1)
            right.loglog(span, [10 * s for s in span], "k:", linewidth=1)
        right.set(xlabel="true relative error", ylabel="estimated relative error")
        finish(left, "what was asked for")
        finish(right, "what it says of itself: between 1 and 10 times the true error")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize="small")  # pyright: ignore
        return figure


def asked(rtol: float) -> str:
    """Name of the method with a requested accuracy."""
    return f"contrastive, rtol {rtol!r}"


def measure_one(problem: str, method: str, case: Case, repeats: int) -> AccuracyRow:
    """Measure a method with its own settings."""
    solver: Solver = SETTLED
    estimator = BASELINES.get(method) or Contrastive(rtol=float(method.split()[-1]))
    if isinstance(estimator, Unrolled):
        rate = 1 / curvature(case)
        solver = GradientDescent(lr=rate, momentum=0.9, nesterov=True, max_steps=UNROLLED_STEPS)
    context, note = nullcontext, ""
    try:
        try:
            result, seconds = timed(case, solver, estimator, repeats)
        except DoubleBackwardError:
            context, note = plain_attention, "without fused attention"
            with context():
                result, seconds = timed(case, solver, estimator, repeats)
    except EquigradError as error:
        return AccuracyRow(
            problem, method, math.inf, math.nan, 0, math.nan, math.nan, type(error).__name__
        )

    def work() -> None:
        with context():
            estimated(case, solver, estimator)

    def settle() -> None:
        with Evaluation(case.problem, case.params, case.meta_params) as evaluation:
            evaluation.settle(solver)

    return AccuracyRow(
        problem,
        method,
        case.relative_error(result.grads),
        math.nan if result.error_estimate is None else result.error_estimate,
        result.gradient_evaluations,
        seconds,
        peak_memory(work) - peak_memory(settle),
        note,
    )


def measure_tuned(problem: str, method: str, case: Case, repeats: int) -> AccuracyRow:
    """Measure a method with the fastest settings whose true error is small enough."""
    candidates = list(settings(method))
    found: list[tuple[float, int]] = []
    with plain_attention() if method.startswith("conjugate") else nullcontext():
        for i, (solver, estimator, _) in enumerate(candidates):
            try:
                result, seconds = timed(case, solver, estimator, 1)
            except EquigradError:
                continue
            if case.relative_error(result.grads) <= TUNED[method]:
                found.append((seconds, i))
        again = [i for _, i in sorted(found)[:4]]
        if not again:
            return AccuracyRow(
                problem, method, math.inf, math.nan, 0, math.inf, math.nan, "not reached"
            )
        runs = [(*timed(case, *candidates[i][:2], 2 * repeats), candidates[i][2]) for i in again]
    result, seconds, note = min(runs, key=lambda entry: entry[1])
    error = case.relative_error(result.grads)
    return AccuracyRow(
        problem, method, error, math.nan, result.gradient_evaluations, seconds, math.nan, note
    )


def settings(method: str) -> Iterator[tuple[Solver, Estimator, str]]:
    """The settings of a method to try, each with its name."""
    for tol in TOLERANCES:
        solver = replace(SETTLED, tol=tol)
        if method.startswith("conjugate"):
            for share in (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5):
                estimator = ConjugateGradient(tol=share, max_iterations=500, products="autograd")
                yield solver, estimator, f"tol {tol:g}, {share:g}"
            continue
        lengths = {"3 steps": LBFGS(max_steps=3), "to tol": None}
        for beta, (length, nudged) in product((1.0, 0.1, 0.01, 1e-3), lengths.items()):
            for name, scheme in SCHEMES.items():
                estimator = replace(PAPERS_RULE, beta=beta, nudged_solver=nudged, **scheme)
                yield solver, estimator, f"tol {tol:g}, {name} β {beta:g}, {length}"


def estimated(case: Case, solver: Solver, estimator: Estimator) -> MetaGradient:
    """One meta-gradient."""
    return meta_gradient(
        case.problem, case.params, case.meta_params, solver=solver, estimator=estimator
    )


def timed(
    case: Case, solver: Solver, estimator: Estimator, repeats: int
) -> tuple[MetaGradient, float]:
    """A meta-gradient, and the seconds of the fastest run; one run where it takes seconds."""
    began = time.perf_counter()
    result = estimated(case, solver, estimator)
    least = time.perf_counter() - began
    for _ in range(repeats - 1 if least < 1 else 0):
        began = time.perf_counter()
        estimated(case, solver, estimator)
        least = min(least, time.perf_counter() - began)
    return result, least


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def curvature(case: Case) -> float:
    """The largest curvature of the inner loss at its minimum."""
    with plain_attention(), Evaluation(case.problem, case.params, case.meta_params) as evaluation:
        settled = evaluation.settle(SETTLED)
        linear = Linearisation(evaluation, settled, "the step size")
        return largest_curvature(linear, flatten(list(settled.params.values())))


def peak_memory(work: Callable[[], object]) -> float:
    """Peak memory of a child process that does the work, in megabytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, else kilobytes
    return usage.ru_maxrss / unit if status == 0 else math.nan
