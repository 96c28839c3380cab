"""T1-T2: implicit differentiation with the identity in place of the inverse Hessian."""

from dataclasses import dataclass

import torch

from equigrad.errors import DoubleBackwardError
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.evaluation import Evaluation
from equigrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class T1T2(Estimator):
    r"""One mixed second derivative at the settled state (Luketina et al. 2016).

        ∇̂_θ = ∂L_out/∂θ - (∂²L_in/∂θ∂φ) ∂L_out/∂φ

    Implicit differentiation would have `(∂²L_in/∂φ²)^{-1} ∂L_out/∂φ` on the right; the inverse
    Hessian is replaced by the identity, and the error this makes does not shrink with compute.
    Cheap, but needs a double backward wherever θ acts through the model.

    Raises:
        DoubleBackwardError: from `meta_gradient`, where an operation on the way from θ to the
            gradient has no second derivative (fused attention, a compiled model).
    """

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, then take the mixed derivative along the outer gradient."""
        free = evaluation.settle(solver)
        params = {name: p.clone().requires_grad_() for name, p in free.params.items()}
        meta = {name: m.clone().requires_grad_() for name, m in evaluation.meta_params.items()}
        leaves, meta_leaves = list(params.values()), list(meta.values())

        evaluation.stand_at(free)
        steps = evaluation.batch_steps("outer")
        pressure = [torch.zeros_like(p, requires_grad=False) for p in leaves]
        grads = [torch.zeros_like(m, requires_grad=False) for m in meta_leaves]
        for step in steps:
            with torch.enable_grad():
                loss = evaluation.data_loss("outer", params, meta, step)
            both = torch.autograd.grad(
                loss, [*leaves, *meta_leaves], allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(pressure, both[: len(leaves)], alpha=1 / len(steps))
            torch._foreach_add_(grads, both[len(leaves) :], alpha=1 / len(steps))
            evaluation.gradient_evaluations += 1

        evaluation.stand_at(free)
        steps = evaluation.batch_steps("inner")
        for step in steps:
            mixed = _mixed_derivative(evaluation, params, meta, pressure, step)
            torch._foreach_add_(grads, mixed, alpha=-1 / len(steps))
            evaluation.gradient_evaluations += 2
        return Estimate(grads=dict(zip(meta, grads, strict=True)), phases=(free,))


def _mixed_derivative(
    evaluation: Evaluation,
    params: dict[str, torch.Tensor],
    meta: dict[str, torch.Tensor],
    direction: list[torch.Tensor],
    step: int,
) -> tuple[torch.Tensor, ...]:
    """`(∂²L_in/∂θ∂φ) direction`, by differentiating the inner gradient once more."""
    try:
        with torch.enable_grad():
            loss = evaluation.total_inner_loss(params, meta, step)
            inner = torch.autograd.grad(
                loss,
                list(params.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        varying = [(g, d) for g, d in zip(inner, direction, strict=True) if g.requires_grad]
        if not varying:
            return tuple(torch.zeros_like(m, requires_grad=False) for m in meta.values())
        return torch.autograd.grad(
            [g for g, _ in varying],
            list(meta.values()),
            [d for _, d in varying],
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NO_SECOND_DERIVATIVE):
            raise
        raise DoubleBackwardError(
            f"T1T2 differentiates the inner gradient once more, and an operation of this model "
            f"has no second derivative ({str(error).splitlines()[0]}). Use Contrastive(), which "
            f"needs first-order gradients only, or a model without that operation (math "
            f"attention, no torch.compile)"
        ) from error


NO_SECOND_DERIVATIVE = (
    "is not implemented",  # fused attention, cuDNN recurrent networks
    "double backward",  # compiled functions
    "donated buffer",  # compiled functions whose backward frees what a second one would need
    "differentiate twice",  # custom functions marked once_differentiable
)
"""What torch says where a gradient cannot be differentiated again."""
