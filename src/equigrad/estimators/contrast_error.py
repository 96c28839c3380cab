"""The estimated error of a contrastive hypergradient, from the phases that it was computed from."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equigrad.evaluation import Evaluation
from equigrad.problems import Params
from equigrad.solvers import Phase, Settled
from equigrad.vectors import flatten, relative

SAFETY = 3
"""The factor by which the estimate exceeds the measured differences."""

RESTLESS = 0.3
"""With a residual above this share of the nudge, the advice is about the free phase."""

TOO_SMALL = "is too small for"
"""What the status says of a β whose contrast is lost in rounding; the diagnostics look for it."""

NAMED = 0.1
"""An error above this is reported in the status, with advice."""


@dataclass(frozen=True)
class ContrastError:
    """The relative error of a contrast, by its causes.

    Attributes:
        finite: error from finite β.
        unsettled: error from nudged phases that ended before they had settled.
        rounding: error from rounding of φ and of `∂L_in/∂θ`.
        drift: the free phase's residual in units of the nudge `β ‖∂L_out/∂φ‖`; not an error in
            itself if phases are matched, but a sign that the learner has not settled.
        adaptive: whether the solver scales its steps by past gradients, as Adam does.
    """

    finite: float = 0.0
    unsettled: float = 0.0
    rounding: float = 0.0
    drift: float = 0.0
    adaptive: bool = False

    @property
    def total(self) -> float:
        """The estimated relative error."""
        return SAFETY * (self.finite + self.unsettled + self.rounding)

    def sentence(self, *, advised: bool = True) -> str:
        """The error in words, with advice unless that has been given already."""
        much = f"{100 * self.total:.0f} %" if self.total < 1 else "100 % or more"
        return f"estimated error {much}" + (f": {self._advice()}" if advised else "")

    def _advice(self) -> str:
        if self.rounding > self.finite + self.unsettled:
            return f"beta {TOO_SMALL} this number format; raise beta, or use torch.float64"
        if self.drift > RESTLESS:
            return (
                f"the free phase has not converged (its residual is {self.drift:.2g} times the "
                f"nudge); settle longer, or raise beta"
                + (
                    "; with an adaptive optimiser, the contrast is not a gradient unless the "
                    "free phase has converged: use Unrolled(products='contrast') before that"
                )
                * self.adaptive
            )
        if self.finite < self.unsettled:
            return (
                "the nudged phases have not converged; give them more steps, larger steps, or a "
                "tolerance"
            )
        return (
            "lower beta; if that does not help, the minimum may have a flat direction, or inner "
            "and outer loss a common symmetry: try nudge='loss'"
        )


def contrast_error(
    evaluation: Evaluation,
    free: Settled,
    ends: Sequence[Settled],
    halves: Sequence[Settled] | None,
    *,
    full: Params,
    half: Params | None,
    force: Params,
    weight: float,
    order: int,
    symmetric: bool,
    adaptive: bool,
) -> ContrastError:
    """Estimate a contrast's error from the contrast half-way and the change of the outer force.

    *Unsettled phases.* A nudged phase has answered the nudge when its residual is zero; until then
    a share of the nudge is left. Between half the steps and the end, this share falls and the
    contrast changes. The change per unit of the share, times the share left at the end, is the
    estimate. If the contrast half-way is unknown, the estimate is the share itself.

    *Finite β.* The outer force ∂L_out/∂φ at a nudged solution differs from that at the free one by
    a relative amount of order β, called its bend; the error is the bend to the power of the
    scheme's order. Symmetric phases also show the curvature of the response to β, again of order β,
    which replaces one of two bends: if the inner loss is quadratic and the nudge a constant force,
    both are exact. A linear outer loss, as in `argmin`, has no bend, and the bend of the inner
    velocity is used instead.

    *Rounding.* The nudge moves φ and `∂L_in/∂θ` by small shares of their sizes, and a rounding
    error of each is divided by its share: the smaller β, the larger.

    Args:
        evaluation: evaluates the losses, and counts a gradient of the outer loss for up to two
            phases, and five gradients of the inner loss if the outer one is linear.
        free: the free solution.
        ends: the ends of the phases.
        halves: the phases half-way, if they are known.
        full: the contrast.
        half: the contrast half-way, if it is known.
        force: `∂L_out/∂φ` at the free solution.
        weight: the largest weight of a phase in the contrast.
        order: order of the error in β.
        symmetric: whether the phases are pairs at ±β.
        adaptive: whether the solver scales its steps by past gradients.
    """
    nudged = [state for state in ends if state.phase.beta != 0]
    size = flatten(list(force.values())).norm().item()
    if not size > 0:
        return ContrastError()
    bend = max(_bend(evaluation, state, force) for state in nudged[:2])
    if bend == 0:
        finite = _uneven(evaluation, free, nudged[0]) ** order
    elif symmetric:
        curved = _curved(free, nudged[0], nudged[1])
        finite = bend * curved * max(bend, curved) ** (order - 2)
    else:
        finite = bend**order
    drift = free.phase.residual / (abs(nudged[0].phase.beta) * size)
    left = max(_left(state.phase) for state in nudged)
    if half is None or halves is None:
        unsettled = left
    else:
        before = max(_left(state.phase) for state in halves if state.phase.beta != 0)
        changed = relative([*half.values()], [*full.values()])
        unsettled = changed * left / (before - left) if before > left else max(changed, left)
    rounding = max(_rounding(free, nudged), _rounding_of_partials(evaluation, full, weight))
    return ContrastError(finite, unsettled, rounding, drift, adaptive)


def _bend(evaluation: Evaluation, at: Settled, force: Params) -> float:
    """The change of the outer force since the free solution, relative to its size."""
    params = {n: p.real if p.is_complex() else p for n, p in at.params.items()}
    there, _ = evaluation.outer_gradients(dataclasses.replace(at, params=params))
    bend = relative([*there.values()], [*force.values()])
    return math.inf if math.isnan(bend) else bend


def _curved(free: Settled, plus: Settled, minus: Settled) -> float:
    """The curvature of the response to β: `‖φ_β + φ_-β - 2φ_0‖ / ‖φ_β - φ_-β‖`."""
    up, center, down = (
        flatten([state.params[name] for name in free.params]).double()
        for state in (plus, free, minus)
    )
    even, odd = (up + down - 2 * center).norm().item(), (up - down).norm().item()
    return even / odd if odd else math.inf if even else 0.0


def _uneven(evaluation: Evaluation, free: Settled, at: Settled) -> float:
    """The bend of the inner velocity, of first order in β: its deviation from a linear function.

    Measured on the first batch, at half and all of the distance to the nudged solution and the same
    on the opposite side: the even part, and the root of the odd part, which is of second order.
    """
    scene = evaluation.holding(free)
    velocity, moves = scene.velocity(), []
    for share in (1.0, 0.5, 0.0, -0.5, -1.0):
        scene.stage.stand_at(free)
        params = {
            n: (p + share * (at.params[n].real - p)).requires_grad_()
            for n, p in free.params.items()
        }
        with torch.no_grad():
            moves.append(flatten(velocity(params, 0)[0]).double())
    evaluation.tally.spend(len(moves))
    ahead, nearer, center, other, behind = moves
    whole = (ahead - behind).norm().item()
    even = (ahead + behind - 2 * center).norm().item()
    odd = ((ahead - behind) - 2 * (nearer - other)).norm().item()
    return max(even / whole, (odd / whole) ** 0.5) if whole else 0.0


def _rounding(free: Settled, nudged: Sequence[Settled]) -> float:
    """The rounding error of φ relative to the distance that the nudge moved it."""
    start = list(free.params.values())
    size = flatten(start).double().norm().item()
    moved = min(
        (flatten([state.params[name] for name in free.params]) - flatten(start)).norm().item()
        for state in nudged
    )
    eps = max(torch.finfo(p.dtype).eps for p in start)
    return eps * size / moved if moved else 0.0


def _rounding_of_partials(evaluation: Evaluation, full: Params, weight: float) -> float:
    """Half a unit in the last place of `∂L_in/∂θ`, as the contrast weighs it, relative to this."""
    whole = flatten([*full.values()]).double().norm().item()
    if not (evaluation.judged.partials and whole > 0):
        return 0.0
    _, partial = evaluation.judged.partials[-1]
    ulps = [
        0.5 * torch.finfo(p.dtype).eps * p.abs().double().norm().item() for p in partial.values()
    ]
    return weight * math.hypot(*ulps) / whole


def _left(phase: Phase) -> float:
    """The share of the nudge that a phase left unanswered."""
    if not phase.start_residual > 0:
        return 0.0
    share = phase.residual / phase.start_residual
    return share if math.isfinite(share) else 1.0
