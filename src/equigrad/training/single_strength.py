"""The best single strength of networks side by side, by rows that they have not seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from torch import Tensor

from equigrad.errors import SettlingError
from equigrad.problems import Params
from equigrad.solvers import Phase, Solver
from equigrad.training.folds import Folds
from equigrad.training.strengths import Network

DECADES = (0.1, 0.01, 0.001, 0.0001)
"""Single strengths that are tried first, for as long as each is better than the one before."""

WORTHWHILE = 0.01
"""Share by which the loss of rows that are held out has to fall for more of the same."""

MOST_GOES = 10
"""Times that networks at the best single strength learn on."""


@dataclass(frozen=True)
class Single:
    """The folds' networks at a single strength for all weights.

    Attributes:
        params: of shape folds × …, each.
        strength: that all weights have.
        loss: of the rows that are held out.
    """

    params: dict[str, Tensor]
    strength: float
    loss: float


@dataclass(frozen=True)
class Search:
    """The best single strength, and its networks after they have learned on from all rows.

    Attributes:
        single: the best of those that were tried.
        network: its refit.
        gradient_evaluations: that all of them took.
        seconds: likewise.
    """

    single: Single
    network: Network
    gradient_evaluations: int
    seconds: float


Settled = tuple[dict[str, Tensor], int, Phase]
"""Parameters, the gradients that they took, and how they settled."""


@dataclass
class Trials:
    """Single strengths that are tried.

    Attributes:
        settled: settles networks by a solver, at a strength, from a start, on weighed rows.
        loss: of weighed rows.
        start: where networks begin.
        folds: how the rows are shared.
        gradient_evaluations: that all trials took.
    """

    settled: Callable[[Solver, float, Params, Tensor], Settled]
    loss: Callable[[Params, Tensor], float]
    start: dict[str, Tensor]
    folds: Folds
    gradient_evaluations: int = 0

    def at(self, solver: Solver, strength: float, start: Params) -> Single:
        """The folds' networks at a strength; a loss of infinity where they diverge."""
        try:
            params, cost, _ = self.settled(solver, strength, start, self.folds.train)
        except SettlingError as error:
            self._diverged = error
            return Single(dict(start), strength, inf)
        self.gradient_evaluations += cost
        loss = self.loss(params, self.folds.held)
        return Single(params, strength, loss if loss == loss else inf)

    def decades(self, solver: Solver, strengths: Sequence[float]) -> Single:
        """The best of the strengths; by default of decades, until one is worse than that before.

        Each begins at the start: a network that a strong one has silenced does not wake again.

        Raises:
            SettlingError: networks diverge under each of them.
        """
        first, *others = strengths or DECADES
        best = self.at(solver, first, self.start)
        for strength in others:
            other = self.at(solver, strength, self.start)
            if not strengths and best.loss < min(other.loss, inf):
                break
            best = min(best, other, key=by_loss)
        if best.loss == inf:
            raise self._diverged
        return best

    def further(self, solver: Solver, best: Single, factors: Sequence[float]) -> Single:
        """Networks that learn on, for as long as the rows that are held out gain from it.

        Args:
            solver: how far in one go.
            best: where from.
            factors: of its strength, under which the first go is made as well.
        """
        for _ in range(MOST_GOES):
            on = [self.at(solver, f * best.strength, best.params) for f in (1.0, *factors)]
            other = min(on, key=by_loss)
            gained, factors = other.loss < (1 - WORTHWHILE) * best.loss, ()
            best = min(best, other, key=by_loss)
            if not gained:
                break
        return best


def by_loss(single: Single) -> float:
    """What the better one has less of."""
    return single.loss
