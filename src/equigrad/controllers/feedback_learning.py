"""Learned feedback weights, from the correlation of noise with the outputs that it changes."""

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
    r"""Feedback weights Q for `LinearFeedback`, from the correlation of noise with its effect.

        Q = E[g' ∘ ξ (δh)ᵀ] / (σ² E[g'²]),    δh = h(φ_ξ) - h(φ_-ξ) over 2,    velocity(φ_ξ) + ξ = 0

    A constant force ξ ~ N(0, σ²) on every parameter moves the settled φ by `(∂r/∂φ)⁻¹ ξ`, and
    therefore the outputs by `∂h/∂φ (∂r/∂φ)⁻¹ ξ`. Hence `E[ξ δhᵀ] = σ² (∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ`, the
    matrix that maps U to the least control; with a gate, Q is the matrix whose gated product is
    nearest to it in mean square. Only forward dynamics are used. The average over samples and draws
    has a relative error of about `√(size of φ / (samples · draws))`. The update
    `Q ← (1-η) Q + η learn_feedback(…)` averages over mini-batches and follows θ.

    Args:
        problem: the problem.
        params: initial φ.
        meta_params: θ.
        solver: solver of the free phase and the noisy ones.
        noise: σ.
        draws: number of draws of ξ, each of which is used with both signs.
        gate: g, as in the controller.
        seed: seed of the draws.

    Returns:
        Q by parameter name, including the outputs.

    Raises:
        ConfigurationError: a value is out of range.
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
