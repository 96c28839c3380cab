"""How far a learner that has converged by its tolerance may still be from a minimum."""

import math

import torch

from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled
from equigrad.vectors import flatten, unflatten

FAR = 1e-2
"""A distance from rest above this, relative to φ, is reported."""

ROUNDING = 10.0
"""A gradient of at most this many rounding errors of the first one is zero."""


def not_at_rest(evaluation: Evaluation, free: Settled) -> str | None:
    r"""A note on a loss that still falls where a phase has converged; None where it does not.

        ‖r‖ / κ,    κ = ⟨r, H r⟩ / ⟨r, r⟩

    is the length of a step of steepest descent to the minimum along the gradient r. Where the loss
    has a minimum, it vanishes with the tolerance. Where it has none but flattens out, as `exp(-φ)`
    or the loss of separable classes, it does not, however small the residual; and κ ≤ 0 shows that
    there is no minimum nearby. This takes two gradients of the inner loss, three if the solver
    does not keep the last. Mini-batches are not looked at, nor phases without a tolerance.

    Args:
        evaluation: evaluates the inner loss.
        free: the end of a phase.
    """
    batches = len(evaluation.batch_steps("inner"))
    if not evaluation.problem.symmetric or batches > 1 or free.phase.outcome != "converged":
        return None
    scene = evaluation.holding(free)
    velocity, start = scene.velocity(), list(free.params.values())

    def at(shift: torch.Tensor | float) -> torch.Tensor:
        scene.stage.stand_at(free)
        moves = unflatten(shift + torch.zeros_like(flatten(start)), start)
        params = {n: p.detach() + m for (n, p), m in zip(free.params.items(), moves, strict=True)}
        with torch.no_grad():
            found, _ = velocity({n: p.requires_grad_() for n, p in params.items()}, 0)
        return flatten(list(found))

    here = at(0.0) if free.velocity is None else flatten(list(free.velocity))
    force, eps = here.norm().item(), torch.finfo(here.dtype).eps
    moved = torch._foreach_sub(start, list(evaluation.params.values()))
    size = max(flatten(start).norm().item(), flatten(list(moved)).norm().item())
    if not force > ROUNDING * eps * free.phase.start_residual or not size > 0:
        return None
    step = eps ** (1 / 3) * size * here / force
    curvature = (at(-step) - at(step)).dot(here).item() / (2 * eps ** (1 / 3) * size * force)
    far = force / curvature / size if curvature > 0 else math.inf
    if not far > FAR:
        return None
    where = (
        f"the minimum along it is further by about {far:.1g} of the size of params"
        if curvature > 0
        else "its curvature there is not positive"
    )
    return (
        f"the inner loss still falls along its gradient, and {where}: either tol is large for this "
        f"loss, or it has no minimum and flattens out (separable classes, for example). Lower tol, "
        f"or regularise it"
    )
