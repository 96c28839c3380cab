"""The correlation of noise on the params with the change of the outputs that it causes."""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from equigrad.controllers.controller import parts, prefixed
from equigrad.evaluation import Evaluation, no_loss
from equigrad.fields import Rule
from equigrad.problems import Params
from equigrad.solvers import Settled, Solver
from equigrad.solvers.rows import rows

Gate = Annotated[Callable[[Tensor], Tensor], Rule("that acts on each element, such as torch.tanh")]
"""An elementwise function whose derivative gates the control of a parameter."""


def slope_of(gate: Gate | None, param: Tensor) -> Tensor:
    """The derivative of an elementwise function; ones if there is no function."""
    if gate is None:
        return torch.ones_like(param)
    with torch.enable_grad():
        leaf = param.detach().requires_grad_()
        (slope,) = torch.autograd.grad(gate(leaf).sum(), leaf)
    return slope


def correlate(
    evaluation: Evaluation,
    solver: Solver,
    at: Settled,
    outputs: list[str],
    gates: Params,
    *,
    noise: float,
    draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """`g' ∘ ξ (δh)ᵀ / σ²` by parameter name, averaged over samples and draws.

    A constant force ξ ~ N(0, σ²) on every parameter, and its opposite, move the outputs h to h_±.
    With `δh = (h_+ - h_-) / 2`, the mean tends to `g' ∘ (∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ`. Only forward dynamics
    are used.

    Args:
        evaluation: the problem at its θ.
        solver: solver of the noisy phases.
        at: the start of the noisy phases.
        outputs: names of the outputs.
        gates: g', by parameter name.
        noise: σ.
        draws: number of draws of ξ.
        seed: seed of the draws.
    """
    samples = evaluation.problem.samples
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for _ in range(draws):
        force = {
            n: noise * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            for n, p in at.params.items()
        }
        one, other = (_settle(evaluation, solver, at, force, sign) for sign in (1, -1))
        moved = rows([(one[n] - other[n]) / 2 for n in outputs], samples)
        for n, gate in gates.items():
            pushed = rows([gate * force[n] / (noise**2 * draws)], samples)
            correlation = pushed.T @ moved / len(moved)
            found[n] = found[n] + correlation if n in found else correlation
    return found


def powers(gates: Params, samples: bool) -> dict[str, Tensor]:
    """`E[g'²]` over samples, as a column by parameter name."""
    return {n: rows([g.square()], samples).mean(0)[:, None] for n, g in gates.items()}


def _settle(
    evaluation: Evaluation, solver: Solver, at: Settled, force: Params, sign: int
) -> dict[str, Tensor]:
    """The settled φ under a constant force."""
    velocity = evaluation.holding(at).velocity()

    def pushed(state: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        (inner,) = parts(state, "φ")
        moves, _ = velocity(inner, step)
        return tuple(m + sign * f for m, f in zip(moves, force.values(), strict=True)), no_loss

    settled = evaluation.settle_controlled(
        pushed,
        prefixed("φ", at.params),
        solver,
        float(sign),
        after=at,
        gradients=1,
        loss=no_loss,
    )
    return parts(settled.params, "φ")[0]
