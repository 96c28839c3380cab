"""Feedback weights from what noise does to the outputs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from equigrad.controllers.controller import OutputControl, parts, prefixed
from equigrad.controllers.linear_feedback import Gate, LinearFeedback, slope_of
from equigrad.evaluation import Evaluation, no_loss
from equigrad.problems import Params, Problem
from equigrad.solvers import Settled, Solver
from equigrad.solvers.rows import rows
from equigrad.solvers.solver import require


def learn_feedback(
    problem: Problem,
    params: Params,
    meta_params: Params,
    *,
    solver: Solver,
    noise: float = 1e-2,
    draws: int = 10,
    gate: Gate | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Feedback weights Q for `LinearFeedback`, by correlating noise with what it does.

        Q = E[g' ∘ ξ (δh)ᵀ] / (σ² E[g'²]),    δh = h(φ_ξ) - h(φ_-ξ) over 2,    velocity(φ_ξ) + ξ = 0

    A constant force ξ ~ N(0, σ²) on every parameter moves the settled φ by `(∂r/∂φ)⁻¹ ξ`, and so
    the outputs by `∂h/∂φ (∂r/∂φ)⁻¹ ξ`. Hence `E[ξ δhᵀ] = σ² (∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ`, the very matrix
    that the least control is a multiple of; with a gate, the Q whose gated product is nearest to it
    in mean square. Only forward dynamics are used. The average is over samples and draws, with a
    relative error of about `√(size of φ / (samples · draws))`; `Q ← (1-η) Q + η learn_feedback(…)`
    averages over mini-batches, and follows θ.

    Args:
        problem: what settles.
        params: where it starts.
        meta_params: θ.
        solver: settles the free phase and the noisy ones.
        noise: σ.
        draws: of ξ, each of them with both signs.
        gate: as of the controller.
        seed: of the draws.

    Returns:
        Q by name of the parameter, those of the outputs included.

    Raises:
        ConfigurationError: a value outside its range.
    """
    require(0 < noise < math.inf, f"noise must be positive, got {noise}")
    require(draws >= 1, f"draws must be at least 1, got {draws}")
    with Evaluation(problem, params, meta_params) as evaluation:
        samples = problem.samples
        free = evaluation.settle(solver)
        outputs = OutputControl(LinearFeedback(), evaluation, free).outputs
        generator = torch.Generator().manual_seed(seed)
        gates = {n: torch.ones_like(p) * slope_of(gate, p) for n, p in free.params.items()}
        found: dict[str, Tensor] = {}
        for _ in range(draws):
            force = {
                n: noise * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                for n, p in free.params.items()
            }
            one, other = (_settle(evaluation, solver, free, force, sign) for sign in (1, -1))
            moved = rows([(one[n] - other[n]) / 2 for n in outputs], samples)
            for n, f in force.items():
                pushed = rows([gates[n] * f / (noise**2 * draws)], samples)
                correlation = pushed.T @ moved / len(moved)
                found[n] = found[n] + correlation if n in found else correlation
        powers = {n: rows([g.square()], samples).mean(0) for n, g in gates.items()}
    return {n: q / powers[n].clamp(min=1e-12)[:, None] for n, q in found.items()}


def _settle(
    evaluation: Evaluation, solver: Solver, free: Settled, force: Params, sign: int
) -> dict[str, Tensor]:
    """Where φ settles under a constant force."""
    velocity = evaluation.free_velocity()

    def pushed(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        (inner,) = parts(state, "φ")
        moves, _ = velocity(inner, step)
        return tuple(m + sign * f for m, f in zip(moves, force.values(), strict=True)), no_loss

    settled = evaluation.settle_controlled(
        pushed,
        prefixed("φ", free.params),
        solver,
        float(sign),
        after=free,
        gradients=1,
        loss=no_loss,
    )
    return parts(settled.params, "φ")[0]
