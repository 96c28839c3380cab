"""Feedback weights from what noise does to the outputs."""

from torch import Tensor

from equigrad.controllers.controller import OutputControl
from equigrad.controllers.linear_feedback import LinearFeedback
from equigrad.controllers.noise import Gate, correlate, powers, slope_of
from equigrad.evaluation import Evaluation
from equigrad.fields import Count, Positive, expect
from equigrad.problems import Params, Problem
from equigrad.solvers import Solver


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
    expect(Positive, noise=noise)
    expect(Count, draws=draws)
    with Evaluation(problem, params, meta_params) as evaluation:
        free = evaluation.settle(solver)
        outputs = OutputControl(LinearFeedback(), evaluation, free).outputs
        gates = {n: slope_of(gate, p) for n, p in free.params.items()}
        found = correlate(
            evaluation, solver, free, outputs, gates, noise=noise, draws=draws, seed=seed
        )
    by = powers(gates, problem.samples)
    return {n: q / by[n].clamp(min=1e-12) for n, q in found.items()}
