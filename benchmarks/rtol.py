"""What `Contrastive(rtol=…)` was asked for, what it delivers and what it says of itself.

    python benchmarks/rtol.py [--draws 0] [--skip transformer,lstm] [--costs] [--out FILE]

All problems of `equigrad.testing.zoo` and `equigrad.testing.hard_zoo`, settled by L-BFGS. Draws
other than 0 are data on which no constant was chosen.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import equigrad as eg
from equigrad.testing import Case
from equigrad.testing.hard_zoo import HARD_ZOO
from equigrad.testing.zoo import ZOO

RTOLS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PROBLEMS = {**ZOO, **HARD_ZOO}
SLACK = 1e-3
"""A stricter tolerance is worse where its error is larger by more than this share."""


@dataclass(frozen=True)
class Run:
    """One call: the true relative error, the stated one, and whether a miss is named."""

    rtol: float
    error: float
    estimate: float
    named: bool
    gradients: int

    @property
    def cell(self) -> str:
        """For the table."""
        if math.isnan(self.error):
            return "refused"
        mark = " *" if self.named else ""
        return f"{self.error:.1e} ({self.estimate:.1e}){mark}"


def asked(case: Case, rtol: float) -> Run:
    """`Contrastive(rtol=…)` on a problem."""
    try:
        result = eg.meta_gradient(
            case.problem,
            case.params,
            case.meta_params,
            solver=eg.LBFGS(),
            estimator=eg.Contrastive(rtol=rtol),
        )
    except eg.EquigradError:  # a refusal is named, too
        return Run(rtol, math.nan, math.inf, True, 0)
    assert result.error_estimate is not None
    return Run(
        rtol,
        case.relative_error(result.grads),
        result.error_estimate,
        "not reached" in result.status,
        result.gradient_evaluations,
    )


def cheapest_conjugate_gradient(case: Case, error: float) -> float:
    """Gradients of the cheapest settings that reach the error, a product counted as two."""
    found = math.inf
    for tol in (10.0**-k for k in range(1, 8)):
        for share in (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4):
            estimator = eg.ConjugateGradient(tol=share, max_iterations=500, products="autograd")
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    result = eg.meta_gradient(
                        case.problem,
                        case.params,
                        case.meta_params,
                        solver=eg.LBFGS(tol=tol, max_steps=10_000),
                        estimator=estimator,
                    )
            except eg.EquigradError:
                continue
            if case.relative_error(result.grads) <= error:
                found = min(found, result.gradient_evaluations)
    return found


def figures(rows: dict[str, list[Run]]) -> Iterator[str]:
    """The three that count."""
    runs = [run for row in rows.values() for run in row]
    claims = [run for run in runs if not run.named]
    missed = sum(run.error > run.rtol for run in claims)
    worse = sum(
        fine.error > (1 + SLACK) * coarse.error
        for row in rows.values()
        for coarse, fine in pairwise(row)
    )
    ratios = sorted(run.estimate / run.error for run in claims)
    within = sum(1 <= ratio <= 10 for ratio in ratios)
    yield f"- {len(runs)} runs, of which {len(runs) - len(claims)} say that they missed (*)."
    yield f"- Missed, and not named: **{missed}**."
    yield (
        f"- Worse where asked for more, by a factor above 1 + {SLACK:g}: **{worse}** of "
        f"{sum(len(row) - 1 for row in rows.values())}."
    )
    yield (
        f"- Of the {len(claims)} that claim what was asked for, the estimate is 1 to 10 times the "
        f"error in **{100 * within / len(claims):.0f} %**, from {ratios[0]:.2g} to "
        f"{ratios[-1]:.3g} times."
    )


def table(head: list[str], body: list[list[str]]) -> Iterator[str]:
    """Markdown."""
    for cells in (head, ["---", *["---:"] * (len(head) - 1)], *body):
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", default="0", help="numbers, with commas")
    parser.add_argument("--skip", default="", help="names of problems, with commas")
    parser.add_argument("--costs", action="store_true", help="compare with conjugate gradients")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[Run]] = {}
    costs: list[list[str]] = []
    for draw in map(int, options.draws.split(",")):
        for name in (name for name in PROBLEMS if name not in options.skip.split(",")):
            try:
                case = PROBLEMS[name](draw)
            except (AssertionError, eg.CurvatureError) as error:
                print(f"{name}, draw {draw}, has no exact gradient: {error}", flush=True)
                continue
            label = name if options.draws == "0" else f"{name}, {draw}"
            rows[label] = [asked(case, rtol) for rtol in RTOLS]
            print(label, *(run.cell for run in rows[label]), sep="  ", flush=True)
            if options.costs:
                ours = rows[label][1].gradients
                theirs = cheapest_conjugate_gradient(case, 1e-2)
                costs.append([label, f"{ours}", f"{theirs}", f"{ours / theirs:.2f}"])
    head = ["problem", *(f"rtol {rtol:g}" for rtol in RTOLS)]
    lines = ["True error, and in brackets the estimated one:", ""]
    lines += table(head, [[label, *(run.cell for run in row)] for label, row in rows.items()])
    lines += ["", *figures(rows)]
    if costs:
        cheaper = sum(float(row[-1]) <= 1 for row in costs)
        lines += ["", "Gradient evaluations at 1e-2, the free phase with them:", ""]
        lines += table(["problem", "rtol=1e-2", "conjugate gradients, cheapest", "ratio"], costs)
        lines += ["", f"No more on {cheaper} of {len(costs)}."]
    print("\n".join(lines))
    if options.out:
        command = f"    python benchmarks/rtol.py --draws {options.draws}"
        command += f" --skip {options.skip}" * bool(options.skip) + " --costs" * options.costs
        options.out.write_text(
            "\n".join(["# Asked for, delivered, said", "", command, "", *lines, ""])
        )


if __name__ == "__main__":
    main()
