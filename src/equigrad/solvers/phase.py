"""What a phase reports, and where it stands."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.problems import Params


@dataclass(frozen=True)
class Phase:
    """What is reported of one phase.

    Attributes:
        beta: nudging strength of the phase; 0 for a free one.
        steps: steps taken.
        start_residual: norm of the velocity at the start.
        residual: norm of the velocity where it was last evaluated: at the settled state where
            `converged` or where the solver jumps (`BlackBox`), else one step before the end.
        outcome: `converged` (residual ≤ tol), `not converged` (a tolerance was asked for and not
            reached), `stalled` (the solver found no step that helps, short of the tolerance) or
            `stopped` (ran the steps it was given; no tolerance applied).
        tol: the tolerance that applied, or None.
        residuals: of each sample, where samples settle on their own; `residual` is the largest of
            those that have not diverged.
        diverged: the samples whose velocity was no longer finite. They are left where the phase
            started, and their residual is infinite.
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
        """Whether it missed its tolerance or, without one, went away from rest; all or in part."""
        return self.outcome in ("not converged", "stalled") or self.grew or bool(self.diverged)

    @property
    def unsettled(self) -> list[int]:
        """The samples whose residual is above the tolerance, and those that have diverged."""
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
    """The samples that have diverged on the way.

    Attributes:
        samples: their numbers.
        params: in whose rows they are held from then on.
    """

    samples: tuple[int, ...]
    params: Params


Watch = Callable[[int, Params, Any], None]
"""`(step, params, solver state)`: is shown both as they are before a step; not to change them."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a phase stands between two steps: enough to go on from there.

    Attributes:
        params: the parameters, detached but where a graph was asked for.
        solver_state: the solver's state (momentum, for example).
        end_step: number of the step that comes next.
        buffers: the modules' buffers, as `KeptBuffers.snapshot` takes them.
        lost: the samples that are held in whatever goes on from there; None where all settle.
    """

    params: dict[str, Tensor]
    solver_state: Any
    end_step: int
    buffers: tuple[Tensor, ...] = ()
    lost: Lost | None = None


@dataclass(frozen=True, kw_only=True)
class Settled(Moment):
    """Where a phase ended.

    Attributes:
        phase: the report.
        velocity: where it came to rest, from solvers of a fixed loss; else None.
    """

    phase: Phase
    velocity: tuple[Tensor, ...] | None = None


def resting(params: Params, buffers: tuple[Tensor, ...] = ()) -> Settled:
    """Params to be looked at as a free phase's end."""
    phase = Phase(0.0, 0, math.nan, math.nan, "stopped")
    return Settled(params=dict(params), solver_state=None, end_step=0, buffers=buffers, phase=phase)


def numbered(samples: list[int]) -> str:
    """Samples in words, the first five of them by number."""
    shown = ", ".join(map(str, samples[:5]))
    if len(samples) == 1:
        return f"sample {shown}"
    return f"{len(samples)} samples ({shown}{', …' if len(samples) > 5 else ''})"
