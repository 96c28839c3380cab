"""A test whether a controlled equilibrium is one of least control."""

import torch
from torch import Tensor

from equigrad.controllers import LinearFeedback
from equigrad.controllers.controller import OutputControl
from equigrad.errors import ConfigurationError
from equigrad.estimators.linearisation import Linearisation
from equigrad.evaluation import Evaluation
from equigrad.problems import Params, Problem
from equigrad.solvers.phase import resting
from equigrad.solvers.rows import move_rows, rows
from equigrad.vectors import flatten, unflatten


def column_space_condition(
    problem: Problem, params: Params, meta_params: Params, *, max_size: int = 2000
) -> Tensor:
    r"""The share of a control that violates the optimality condition of least control.

        ‖ψ - Pψ‖ / ‖ψ‖,    P onto  col[(∂r/∂φ)⁻ᵀ (∂h/∂φ)ᵀ],    ψ = r(φ, θ)

    for the outputs h(φ), which are the parameters that the outer loss depends on. It is 0 if and
    only if the control satisfies the optimality condition of the least-control principle (Meulemans
    et al. 2022), under which `-(∂_θ velocity)ᵀ ψ` is the gradient of `½‖ψ*‖²`. If all parameters
    are outputs, it is always 0. It forms `∂r/∂φ`.

    Args:
        problem: the problem.
        params: φ under control, as `LeastControl(start="params")` reports it; the control is the
            residual there.
        meta_params: θ.
        max_size: the largest number of parameters (of a sample) for which it forms the matrix.

    Returns:
        One number for each sample if the problem has samples, else a tensor without dimensions; 0
        if there is no control.

    Raises:
        ConfigurationError: there are more parameters than `max_size`.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.FixedPoint(
        ...     map=lambda p, m: {"h": m["w"] + 0 * p["h"], "y": 2 * p["h"]},
        ...     outer_loss=lambda p, m: p["y"].square().sum(),
        ... )
        >>> led = {"h": torch.tensor([0.5]), "y": torch.tensor([0.0])}  # ψ = (-0.5, -1)
        >>> share = column_space_condition(problem, led, {"w": torch.ones(1)})
        >>> round(share.item(), 4)  # the least control is a multiple of (2, 1)
        0.6
    """
    at = resting({name: p.detach() for name, p in params.items()})
    with Evaluation(problem, params, meta_params) as evaluation:
        samples = problem.samples
        outputs = OutputControl(LinearFeedback(), evaluation, at).outputs
        tensors = list(at.params.values())
        steps = evaluation.batch_steps("inner")
        moves = [problem.velocity(at.params, meta_params, step=s).values() for s in steps]
        control = rows([-torch.stack(vs).mean(0) for vs in zip(*moves, strict=True)], samples)
        count, size = control.shape
        if size > max_size:
            raise ConfigurationError(
                f"column_space_condition would form a {size} × {size} matrix, more than "
                f"max_size={max_size}; raise it, or ask for a smaller network"
            )
        linear = Linearisation(evaluation, at, "column_space_condition")
        matrix = control.new_zeros(count, size, size)
        for i in range(size):
            unit = torch.zeros_like(control)
            unit[:, i] = 1
            matrix[:, :, i] = _product(linear, tensors, unit, samples)
        ones = [torch.full_like(t, float(n in outputs)) for n, t in at.params.items()]
        seen = rows(ones, samples)[0] > 0
    least = torch.linalg.solve(matrix, torch.eye(size).to(matrix)[:, seen])
    basis, _ = torch.linalg.qr(least)
    along = (basis @ (basis.mT @ control[:, :, None])).squeeze(2)
    whole = control.norm(dim=1)
    share = (control - along).norm(dim=1) / torch.where(whole > 0, whole, 1.0)
    return share if samples else share[0]


def _product(linear: Linearisation, like: list[Tensor], vectors: Tensor, samples: bool) -> Tensor:
    """The product of `(∂r/∂φ)ᵀ` with one vector for each sample."""
    shaped = [torch.zeros_like(t) for t in like]
    move_rows(shaped, vectors)
    return rows(unflatten(linear.product(flatten(shaped)), like), samples)
