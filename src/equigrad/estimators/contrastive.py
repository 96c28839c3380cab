"""The contrastive rule: run the learner again with a small nudge, and contrast the phases."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from equigrad.estimators.contrast_error import NAMED, TOO_SMALL, contrast_error
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.nudged_phases import NudgedPhases
from equigrad.evaluation import ANSWERED, Evaluation
from equigrad.fields import Count, CountFrom2, Rule, Share, require
from equigrad.solvers import Settled, Solver
from equigrad.theory import finite_difference_weights, holomorphic_weights, roots_of_one


@dataclass(frozen=True, kw_only=True)
class Contrastive(Estimator):
    r"""The contrastive meta-learning rule: equilibrium propagation applied to learning.

        ∇̂_θ = (1/β) Σ_i α_i ∂L/∂θ(φ̂_{n_i β}, θ, n_i β),    L = L_in + β L_out

    where phase i settles `L` with nudging strength `n_i β`, starting at the free solution, and the
    weights `α_i` are those of `equigrad.theory.finite_difference_weights` at the nodes `n_i`
    (Zucchet et al., Eq. 4 and Appendix D). It takes first-order gradients only, and its memory does
    not grow with the number of steps. At exact equilibria the error is `O(β^{points-1})` for the
    forward scheme and `O(β^{points})` for the symmetric and the holomorphic scheme.

    **Matched phases** cancel the drift of a free phase that has not quite settled: all phases that
    start at the free solution run the same number of steps, including the one with β = 0. The
    remaining error is linear in the distance to equilibrium and is not divided by β
    (docs/matched-phases.md). The plain rule of the paper is `matched=False`.

    Attributes:
        beta: nudging strength β ≠ 0, of either sign.
        scheme: `forward` has the nodes 0, 1 … points-1; `symmetric` has ±1 … ±points/2. Nodes of
            the sign opposite to β reward a high outer loss, which may not be bounded. `holomorphic`
            has the points-th roots of one, so that the error falls with points at any β up to some
            limit (Laborieux, Zenke 2022). Its losses and activations have to be holomorphic and
            accept complex φ and θ; one of each two phases that are complex conjugates is left out.
        points: number p of nodes: p ≥ 2, and even if symmetric.
        sign: `random` draws a new sign of β for every call.
        matched: whether every phase after the free one runs the same number of steps. The first
            nudged phase runs until it settles or reaches its limit, and sets this number.
        nudged_solver: solver of the nudged phases; None for the free phase's solver.
        nudge: `loss` settles `L_in + β L_out`, the rule of the paper. `force` settles
            `L_in + β ∂L_out/∂φ(φ̂_0)·φ`: it evaluates the outer loss once instead of at every step,
            cannot pull a phase towards the minimum of the outer loss for large β, and is as
            accurate for β → 0. None is the force, but the loss for a `BlackBox`, which may have
            its own counterpart of β.
        momentum: `keep` continues with the free phase's solver state; `reset` starts a new one.
        rtol: relative error to reach. Scheme, points, nudge and tolerances are then chosen for the
            problem, ten times `beta` is the first guess, and the solver's own limits do not apply;
            see docs/accuracy.md. The inner loss has to be the same at every step, and twice
            continuously differentiable at the solution. `MetaGradient.error_estimate` says what was
            reached, and `status` why it was not reached.
        budget: gradient evaluations to spend under `rtol`.
        error: whether to estimate the relative error (`equigrad.estimators.contrast_error`), at the
            cost of up to three gradients of the outer loss, and one of the inner loss for each
            phase. `status` reports an error above a tenth, with advice.

    Raises:
        ConfigurationError: β = 0, too few points, or an odd number of symmetric points; an rtol
            outside (0, 1), or together with a setting that it chooses. From a call, a holomorphic
            scheme on functions that are not holomorphic or do not accept complex numbers.

    Example:
        >>> Contrastive(beta=0.1, scheme="symmetric").nodes
        (1, -1)
        >>> Contrastive(scheme="forward", points=3).nodes
        (0, 1, 2)
    """

    traits: ClassVar[Traits] = Traits(
        idea="contrast of free and nudged phases",
        cost="2K; 3K or 4K by loss",
        error="vanishes as β → 0, K → ∞",
        double_backward=False,
        order="p-1; p; p",
    )

    beta: Annotated[
        float,
        Rule(
            "other than 0",
            lambda beta: beta != 0,
            "with beta=0 the nudged phases do not differ from the free one; try beta=0.01",
        ),
    ] = 0.01
    scheme: Literal["forward", "symmetric", "holomorphic"] = "symmetric"
    points: CountFrom2 = 2
    sign: Literal["fixed", "random"] = "fixed"
    matched: bool = True
    nudged_solver: Solver | None = None
    nudge: Literal["loss", "force"] | None = None
    momentum: Literal["keep", "reset"] = "keep"
    rtol: Annotated[Share | None, Rule(remedy="try rtol=1e-2")] = None
    budget: Count = 100_000
    error: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.scheme != "symmetric" or self.points % 2 == 0,
            f"Contrastive(points={self.points}): scheme='symmetric', the default, needs an even "
            f"number of points, got {self.points}; use an even number, or scheme='forward'",
        )
        if self.rtol is None:
            return
        chosen = ("scheme", "points", "sign", "matched", "nudge", "nudged_solver")
        given = [name for name in chosen if getattr(self, name) != getattr(Contrastive, name)]
        require(
            not given,
            f"Contrastive(rtol={self.rtol:g}): rtol chooses {' and '.join(given)} by itself; leave "
            f"these out, or leave out rtol",
        )

    @property
    def nodes(self) -> tuple[complex, ...]:
        """The nudging strengths of the phases, in units of β."""
        if self.scheme == "holomorphic":
            return roots_of_one(self.points)
        return self._real_nodes

    @property
    def _real_nodes(self) -> tuple[int, ...]:
        if self.scheme == "forward":
            return tuple(range(self.points))
        half = range(1, self.points // 2 + 1)
        return tuple(sign * i for i in half for sign in (1, -1))

    @property
    def weights(self) -> list[complex]:
        """The weight of each phase in the contrast, in units of 1/β."""
        if self.scheme == "holomorphic":
            return holomorphic_weights(self.points)
        return [float(w) for w in finite_difference_weights(self._real_nodes)]

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle the free phase and the nudged ones, and contrast `∂L/∂θ` between them."""
        if self.rtol is not None:
            batches = len(evaluation.batch_steps("inner"))
            require(
                batches == 1,
                f"rtol={self.rtol:g} needs the same inner loss at every step, but this one has "
                f"{batches} mini-batches, so the params never come fully to rest. Average over "
                f"the mini-batches in inner_loss, or set beta instead of rtol",
            )
            from equigrad.estimators.refinement import refine
            from equigrad.estimators.refinement_phases import RefinedPhases

            phases = RefinedPhases(
                evaluation,
                solver,
                rtol=self.rtol,
                budget=self.budget,
                keep_momentum=self.momentum == "keep",
            )
            # ten times: large enough to measure the error of finite β
            return refine(phases, 10 * abs(self.beta))
        nudged_solver, beta = self.nudged_solver or solver, self.beta
        if self.sign == "random":
            beta *= evaluation.stage.sign()
        require(
            self.momentum == "reset" or nudged_solver.continues(solver),
            f"momentum='keep' passes the state of the free phase's solver, "
            f"{type(solver).__name__}, to the nudged solver, {type(nudged_solver).__name__}, "
            f"which cannot use it; use momentum='reset'",
        )
        free = evaluation.settle(solver)
        hindered = nudged_solver.hindrance(free.solver_state if self.momentum == "keep" else None)
        if hindered:
            evaluation.tally.note(hindered)
        if self.scheme == "holomorphic":
            from equigrad.estimators.holomorphic import require_holomorphic

            require_holomorphic(evaluation, free)
        force = direct = None
        if self.nudge == "force" or (self.nudge is None and not nudged_solver.jumps):
            force, direct = evaluation.outer_gradients(free)
        phases = NudgedPhases(
            evaluation, free, nudged_solver, self.momentum == "keep", force, self.error
        )
        states, halves = phases.run([node * beta for node in self.nodes], matched=self.matched)
        weights = [w / beta for w in self.weights]
        self._note_weak_contrast(evaluation, states, nudged_solver)
        departed = _note_departures(evaluation, states)
        grads = evaluation.contrast(states, weights, direct)
        error = None
        if self.error:
            half = None if halves is None else evaluation.contrast(halves, weights, direct)
            found = contrast_error(
                evaluation,
                free,
                states,
                halves,
                full=grads,
                half=half,
                force=force or evaluation.outer_gradients(free)[0],
                weight=max(map(abs, weights)),
                order=self.order,
                symmetric=self.scheme == "symmetric",
                adaptive=solver.adaptive,
            )
            error = found.total
            if not error <= NAMED:  # also where it is NaN
                evaluation.tally.note(found.sentence(advised=not departed))
        return Estimate(
            grads=grads,
            phases=(free, *(state for state in states if state is not free)),
            error_estimate=error,
        )

    @property
    def order(self) -> int:
        """The order of the error in β at exact equilibria."""
        return self.points - 1 if self.scheme == "forward" else self.points

    def _note_weak_contrast(
        self, evaluation: Evaluation, states: list[Settled], solver: Solver
    ) -> None:
        """Note that the phases differ by little more than rounding, or did not answer the nudge."""
        one, other = (list(state.params.values()) for state in states[:2])
        moved, size = (
            torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).item()
            for tensors in (torch._foreach_sub(one, other), one)
        )
        phases = [state.phase for state in states] if solver.jumps else []
        pushed = [phase for phase in phases if phase.beta != 0 and phase.start_residual > 0]
        if moved == 0 and pushed:
            betas = " and ".join(f"β={state.phase.beta:g}" for state in states[:2])
            evaluation.tally.note(
                f"the learner did not respond to the nudge: it returned the same params for "
                f"{betas}. It must minimise the objective that it is called with, or weigh the "
                f"outer loss by objective.beta in its own. If it does, lower its tolerance, or "
                f"raise beta"
            )
        elif moved <= 100 * torch.finfo(one[0].dtype).eps * size:
            evaluation.tally.note(
                f"beta={self.beta:g} {TOO_SMALL} {one[0].dtype}: the nudge moved params by "
                f"{moved:.1e}, and their norm is {size:.1e}; raise beta"
                + (", or use torch.float64" if one[0].dtype != torch.float64 else "")
            )
        elif pushed:
            left, beta = max(
                (phase.residual / phase.start_residual, phase.beta) for phase in pushed
            )
            if left > ANSWERED:
                evaluation.tally.note(
                    f"with β={beta:g} the learner ended with a residual of {left:.0%} of the "
                    f"nudge. Unless its error is the same in every phase, lower its tolerance, or "
                    f"raise beta"
                )


def _note_departures(evaluation: Evaluation, states: list[Settled]) -> bool:
    """Whether a nudged phase without a tolerance diverged from equilibrium; notes advice."""
    departed = any(state.phase.grew for state in states if state.phase.beta != 0)
    if departed:
        evaluation.tally.note(
            "a nudged phase moved away from its equilibrium, so the contrast with it is not a "
            "gradient; lower beta, or the step size of the nudged solver"
            + ", or damp the map (Picard(damping=0.5))"
            * (not evaluation.problem.symmetric)
        )
    return departed
