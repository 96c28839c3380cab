"""The report of a phase, and the state in which it ended."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.problems import Params


@dataclass(frozen=True)
class Phase:
    """The report of one phase.

    Attributes:
        beta: nudging strength of the phase; 0 for a free one.
        steps: steps taken.
        start_residual: norm of the velocity at the start.
        residual: norm of the velocity where it was last evaluated: at the settled state if the
            phase `converged` or the solver jumps (`BlackBox`), else one step before the end.
        outcome: `converged` (residual ≤ tol), `not converged` (the tolerance was not reached),
            `stalled` (the solver found no step that helps, before the tolerance was reached) or
            `stopped` (ran the given number of steps, without a tolerance).
        tol: the tolerance that applied, or None.
        residuals: residual of each sample, if samples settle independently; `residual` is the
            largest of those that have not diverged.
        diverged: indices of the samples whose velocity was not finite. They are left at their
            start, and their residual is infinite.
    """

    beta: complex
    steps: int
    start_residual: float
    residual: float
    outcome: Literal["converged", "not converged", "stalled", "stopped"]
    tol: float | None = None
    residuals: Tensor | None = field(default=None, compare=False, repr=False)
    diverged: tuple[int, ...] = ()

    @property
    def grew(self) -> bool:
        """Whether a phase without a tolerance ended with more than twice its first residual."""
        return self.outcome == "stopped" and self.residual > 2 * self.start_residual

    @property
    def failed(self) -> bool:
        """Whether the phase missed its tolerance, its residual grew, or samples diverged."""
        return self.outcome in ("not converged", "stalled") or self.grew or bool(self.diverged)

    @property
    def unsettled(self) -> list[int]:
        """Indices of the samples that have diverged or whose residual is above the tolerance."""
        if self.residuals is None or self.tol is None:
            return list(self.diverged)
        return torch.nonzero(~(self.residuals <= self.tol)).flatten().tolist()

    def __str__(self) -> str:
        slow = [sample for sample in self.unsettled if sample not in self.diverged]
        missed = self.outcome in ("not converged", "stalled") and self.tol is not None
        missed = missed and bool(slow or not self.diverged)
        tolerance = f" (tol {self.tol:.2g})" if missed else ""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        said = f"{self.outcome}: residual {self.residual:.2g} after {steps}{tolerance}"
        if missed and self.residuals is not None:
            said += f" in {numbered(slow)} of {len(self.residuals)}"
        if self.grew:
            said += f", up from {self.start_residual:.2g}"
        if self.diverged and self.residuals is not None:
            said += f"; {numbered(list(self.diverged))} of {len(self.residuals)} diverged"
        return said


@dataclass(frozen=True)
class Lost:
    """The samples that have diverged.

    Attributes:
        samples: their indices.
        params: parameters whose rows hold their values from then on.
    """

    samples: tuple[int, ...]
    params: Params


Watch = Callable[[int, Params, Any], None]
"""`(step, params, solver state)`, called before each step; it must not change them."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The state of a phase between two steps, from which it can be continued.

    Attributes:
        params: the parameters, detached unless a graph was requested.
        solver_state: the solver's state (momentum, for example).
        end_step: number of the next step.
        buffers: the modules' buffers, as `KeptBuffers.snapshot` returns them.
        lost: the samples that a continuation holds constant; None if all settle.
    """

    params: dict[str, Tensor]
    solver_state: Any
    end_step: int
    buffers: tuple[Tensor, ...] = ()
    lost: Lost | None = None


@dataclass(frozen=True, kw_only=True)
class Settled(Moment):
    """The end of a phase.

    Attributes:
        phase: the report.
        velocity: where it came to rest, from solvers of a fixed loss; else None.
    """

    phase: Phase
    velocity: tuple[Tensor, ...] | None = None


def resting(params: Params, buffers: tuple[Tensor, ...] = ()) -> Settled:
    """Params in the form of the end of a free phase."""
    phase = Phase(0.0, 0, math.nan, math.nan, "stopped")
    return Settled(params=dict(params), solver_state=None, end_step=0, buffers=buffers, phase=phase)


def numbered(samples: list[int]) -> str:
    """A description of samples that lists the first five of them."""
    shown = ", ".join(map(str, samples[:5]))
    if len(samples) == 1:
        return f"sample {shown}"
    return f"{len(samples)} samples ({shown}{', …' if len(samples) > 5 else ''})"
