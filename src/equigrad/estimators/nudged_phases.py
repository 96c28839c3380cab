"""The nudged phases of a contrast, and their states half-way."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from equigrad.evaluation import ANSWERED, Evaluation
from equigrad.problems import Params
from equigrad.randomness import Stream
from equigrad.solvers import Settled, Solver

HALF_WAY = 10
"""Under a tolerance a phase is half-way when its residual is this many times the final one."""


@dataclass(frozen=True)
class NudgedPhases:
    """Phases that start at the free solution and take the same number of steps.

    Attributes:
        evaluation: runs the phases and counts gradients.
        free: the free solution.
        solver: solver of the phases.
        keep_momentum: whether to continue with the free phase's solver state or a new one.
        force: a constant `∂L_out/∂φ` that replaces the outer loss, or None.
        halved: whether to record the phases half-way, where that is possible.
    """

    evaluation: Evaluation
    free: Settled
    solver: Solver
    keep_momentum: bool
    force: Params | None
    halved: bool

    def run(
        self, betas: Sequence[complex], *, matched: bool
    ) -> tuple[list[Settled], list[Settled] | None]:
        """Run a phase for every nudging strength.

        Args:
            betas: the strengths; the phase of a strength of zero is the free or a matched one.
            matched: whether all phases take the same number of steps, until each nudged phase has
                settled.

        Returns:
            The ends of the phases, and their states half-way if these are known for all.
        """
        ends: dict[complex, Settled] = {}
        halves: dict[complex, Settled] = {}
        for beta in (beta for beta in betas if beta != 0):
            half = self._first_half(beta)
            ends[beta] = self._onward(beta, half)
            if half is not None and not _ended(half):
                halves[beta] = half
        if matched:
            longest = max(end.phase.steps for end in ends.values())
            for beta, end in ends.items():
                ends[beta] = self._further(beta, end, longest - end.phase.steps)
            if 0 in betas:
                first = max((half.phase.steps for half in halves.values()), default=longest)
                free = self._settle(0.0, self.free, keep=self.keep_momentum, steps=first)
                ends[0], halves[0] = self._further(0.0, free, longest - first), free
        else:
            ends[0] = halves[0] = self.free
        known = all(beta in halves for beta in betas)
        # no phase continues from here, and solver states may be large
        forget = [dataclasses.replace(ends[beta], solver_state=None) for beta in betas]
        return forget, [halves[beta] for beta in betas] if known else None

    def _first_half(self, beta: complex) -> Settled | None:
        limit, tol = self.solver.max_steps, self.solver.tol
        if not self._halved or (limit is not None and limit < 2):
            return None
        if tol is None:
            assert limit is not None
            return self._settle(beta, self.free, keep=self.keep_momentum, steps=limit // 2)
        wide = dataclasses.replace(self.solver, tol=HALF_WAY * tol)
        return self._settle(
            beta, self.free, keep=self.keep_momentum, solver=wide, share=HALF_WAY * ANSWERED
        )

    @property
    def _halved(self) -> bool:
        """Whether the phases are recorded half-way.

        Not if a phase may converge within a pass over its mini-batches, where its position in the
        pass would differ from that of the free phase.
        """
        streams: tuple[Stream, ...] = ("inner", "outer")
        passes = max(len(self.evaluation.batch_steps(stream)) for stream in streams)
        return self.halved and not self.solver.jumps and (passes == 1 or self.solver.tol is None)

    def _onward(self, beta: complex, half: Settled | None) -> Settled:
        """Run a phase to its end, from half-way or from the free solution."""
        if half is None:
            return self._settle(beta, self.free, keep=self.keep_momentum)
        if _ended(half):
            phase = dataclasses.replace(half.phase, tol=self.solver.tol)
            return dataclasses.replace(half, phase=phase)
        limit, done = self.solver.max_steps, half.phase.steps
        if self.solver.tol is None:
            assert limit is not None
            return self._further(beta, half, limit - done)
        solver = self.solver
        if limit is not None:
            solver = dataclasses.replace(solver, max_steps=max(limit - done, 1))
        residual = half.phase.residual
        share = ANSWERED * half.phase.start_residual / residual if residual else 1.0
        end = self._settle(beta, half, keep=True, solver=solver, share=share)
        return _joined(half, end)

    def _further(self, beta: complex, state: Settled, steps: int) -> Settled:
        """Take further steps from the phase's current position in its pass over mini-batches."""
        if steps < 1:
            return state
        paused = dataclasses.replace(state.phase, outcome="stopped")
        end = self._settle(beta, dataclasses.replace(state, phase=paused), keep=True, steps=steps)
        outcome = state.phase.outcome if state.phase.tol is not None else end.phase.outcome
        phase = dataclasses.replace(end.phase, outcome=outcome, tol=state.phase.tol)
        return _joined(state, dataclasses.replace(end, phase=phase))

    def _settle(
        self,
        beta: complex,
        start: Settled,
        *,
        keep: bool,
        solver: Solver | None = None,
        steps: int | None = None,
        share: float = ANSWERED,
    ) -> Settled:
        return self.evaluation.settle_nudged(
            start,
            solver or self.solver,
            beta,
            keep_momentum=keep,
            steps=steps,
            share=share,
            force=None if beta == 0 else self.force,
        )


def _ended(half: Settled) -> bool:
    """Whether a phase ended before it was half-way: a stricter tolerance leads no further."""
    return half.phase.tol is not None and half.phase.outcome != "converged"


def _joined(first: Settled, second: Settled) -> Settled:
    """The end of the second part of a phase, reported as the end of both."""
    phase = dataclasses.replace(
        second.phase,
        steps=first.phase.steps + second.phase.steps,
        start_residual=first.phase.start_residual,
    )
    return dataclasses.replace(second, phase=phase)
