"""The best single strength of networks side by side, by the loss of held-out rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.problems import Params
from equigrad.solvers import Solver

DECADES = (0.1, 0.01, 0.001, 0.0001)
"""Single strengths that are tried first, for as long as each is better than the one before."""

HALF = 10**0.5
"""Factor of half a decade."""

WORTHWHILE = 0.01
"""Share by which the held-out loss has to fall for the networks to be trained further."""

MOST_GOES = 10
"""Times that networks at the best single strength are trained further."""


@dataclass(frozen=True)
class Single:
    """The folds' networks at a single strength for all weights.

    Attributes:
        strength: that all weights have.
        params: of shape folds × …, each.
        loss: of the held-out rows.
        gradient_evaluations: that these networks took, or a search that ended with them.
    """

    strength: float
    params: dict[str, Tensor]
    loss: float
    gradient_evaluations: int


def search(
    trial: Callable[[Solver, float, Params], Single],
    solver: Solver,
    start: dict[str, Tensor],
    strengths: Sequence[float] = (),
) -> Single:
    """The best single strength by the held-out rows, and networks trained with it.

    Few steps choose a decade, each from the start: a network whose weights a strong pull has
    brought to zero does not recover. From the best one the networks are trained further: first for
    as few steps, under half a decade more and less as well, and then for as long as the held-out
    loss falls.

    Args:
        trial: trains networks by a solver, at a strength, from a start.
        solver: its steps are those between two looks at the held-out rows.
        start: where networks begin.
        strengths: to be tried in place of decades, all of them.

    Raises:
        SettlingError: networks diverge under each of the strengths.
    """
    spent = 0

    def tried(solver: Solver, strength: float, start: dict[str, Tensor]) -> Single:
        """A loss of infinity where the networks diverge."""
        nonlocal spent, diverged
        try:
            found = trial(solver, strength, start)
        except SettlingError as error:
            diverged = error
            return Single(strength, start, inf, 0)
        spent += found.gradient_evaluations
        return found if found.loss < inf else replace(found, loss=inf)

    diverged: SettlingError | None = None
    best = Single(0.0, start, inf, 0)
    for strength in strengths or DECADES:
        found = tried(part(2, solver), strength, start)
        if best.loss < found.loss and not strengths:
            break
        best = min(best, found, key=by_loss)
    if best.loss == inf and diverged is not None:
        raise diverged
    factors, further = (1.0,) if strengths else (1.0, 1 / HALF, HALF), part(2, solver)
    for _ in range(MOST_GOES):
        goes = [tried(further, factor * best.strength, best.params) for factor in factors]
        before, factors, further = best.loss, (1.0,), solver
        best = min(best, *goes, key=by_loss)
        if not best.loss < (1 - WORTHWHILE) * before:
            break
    return replace(best, gradient_evaluations=spent)


def by_loss(single: Single) -> float:
    """What the better one has less of."""
    return single.loss


def part(share: int, solver: Solver) -> Solver:
    """The solver with a part of its steps, half of them for two."""
    return replace(solver, max_steps=max(1, (solver.max_steps or 1000) // share))
