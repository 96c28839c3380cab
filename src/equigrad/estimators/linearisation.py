"""The inner gradient at a settled state, ready to be differentiated once more."""

from collections.abc import Iterator

import torch
from torch import Tensor

from equigrad.errors import DoubleBackwardError
from equigrad.evaluation import Evaluation
from equigrad.solvers import Settled
from equigrad.vectors import flatten, unflatten

NO_SECOND_DERIVATIVE = (
    "is not implemented",  # fused attention, cuDNN recurrent networks
    "double backward",  # compiled functions
    "donated buffer",  # compiled functions whose backward frees what a second one would need
    "differentiate twice",  # custom functions marked once_differentiable
)
"""What torch says where a gradient cannot be differentiated again."""


class Linearisation:
    """Products with the second derivatives of the inner loss where a phase ended.

    Vectors over φ are flat tensors of `size` entries, parameter after parameter. The graph of the
    inner gradient is kept where there is one batch, and built anew for each product where there
    are several, so that memory does not grow with their number.

    Args:
        evaluation: evaluates, and counts two gradient evaluations a product and batch.
        at: where the phase ended.
        who: the estimator's name, for the error message.

    Raises:
        DoubleBackwardError: from any product, where an operation of the model has no second
            derivative.
    """

    def __init__(self, evaluation: Evaluation, at: Settled, who: str) -> None:
        self._evaluation, self._at, self._who = evaluation, at, who
        self._params = {name: p.clone().requires_grad_() for name, p in at.params.items()}
        self._meta = {
            name: m.clone().requires_grad_() for name, m in evaluation.meta_params.items()
        }
        self._kept: list[Tensor] | None = None

    @property
    def size(self) -> int:
        """Number of inner parameters."""
        return sum(p.numel() for p in self._params.values())

    def hessian(self, vector: Tensor) -> Tensor:
        """`(∂²L_in/∂φ²) vector`."""
        return flatten(self._product(vector, list(self._params.values())))

    def mixed(self, vector: Tensor) -> dict[str, Tensor]:
        """`(∂²L_in/∂θ∂φ) vector`, by name of the meta-parameter."""
        return dict(zip(self._meta, self._product(vector, list(self._meta.values())), strict=True))

    def _product(self, vector: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """`∂(∂L_in/∂φ · vector)/∂leaves`, averaged over batches."""
        direction = unflatten(vector, list(self._params.values()))
        total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        steps = self._evaluation.batch_steps("inner")
        try:
            for gradient in self._gradients(steps):
                self._evaluation.gradient_evaluations += 2
                varying = [
                    (g, d) for g, d in zip(gradient, direction, strict=True) if g.requires_grad
                ]
                if not varying:
                    continue
                product = torch.autograd.grad(
                    [g for g, _ in varying],
                    leaves,
                    [d for _, d in varying],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                torch._foreach_add_(total, product, alpha=1 / len(steps))
        except RuntimeError as error:
            if not any(sign in str(error) for sign in NO_SECOND_DERIVATIVE):
                raise
            raise DoubleBackwardError(
                f"{self._who} differentiates the inner gradient once more, and an operation of "
                f"this model has no second derivative ({str(error).splitlines()[0]}). Use "
                f"{first_order_estimators()}, which need first-order gradients only, or a model "
                f"without that operation (math attention, no torch.compile)"
            ) from error
        return total

    def _gradients(self, steps: range) -> Iterator[list[Tensor]]:
        """The inner gradient with its graph, batch after batch."""
        if self._kept is not None:
            yield self._kept
            return
        self._evaluation.stand_at(self._at)
        for step in steps:
            loss = self._evaluation.total_inner_loss(self._params, self._meta, step)
            gradient = torch.autograd.grad(
                loss,
                list(self._params.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if len(steps) == 1:
                self._kept = list(gradient)
            yield list(gradient)


def first_order_estimators() -> str:
    """The estimators that need no second derivative, in words."""
    from equigrad.estimators import ESTIMATORS

    names = [f"{e.__name__}()" for e in ESTIMATORS if not e.traits.double_backward]
    return " or ".join(names)
