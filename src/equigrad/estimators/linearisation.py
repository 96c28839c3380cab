"""The residual at a settled state, ready to be differentiated once more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.errors import CurvatureError, DoubleBackwardError, ProblemError
from equigrad.estimators.estimator import serving
from equigrad.evaluation import Evaluation
from equigrad.problems import pull_back
from equigrad.solvers import Settled
from equigrad.vectors import flatten, unflatten

DONATED = "donated buffer"
"""What torch says where a compiled function's backward frees what a second one would need."""

NO_SECOND_DERIVATIVE = (
    "is not implemented",  # fused attention, cuDNN recurrent networks
    "double backward",  # compiled functions
    DONATED,
    "differentiate twice",  # custom functions marked once_differentiable
    "forward AD",  # fused attention in forward mode
    "forward mode AD",  # compiled functions in forward mode
)
"""What torch says where a gradient cannot be differentiated again."""


class Linearisation:
    """Products with the derivatives of the residual where a phase ended.

    The residual r is `∂L_in/∂φ` of a `Bilevel`, `φ - F(φ, θ)` of a `FixedPoint`. Vectors over φ
    are flat tensors of `size` entries, parameter after parameter. The residual's graph is kept
    where there is one batch, and built anew for each product where there are several, so that
    memory does not grow with their number, and where compiled functions free what a second
    backward would need.

    Args:
        evaluation: evaluates, and counts two gradient evaluations a product and batch.
        at: where the phase ended.
        who: the estimator's name, for the error message.

    Raises:
        DoubleBackwardError: from any product, where an operation of the model has no second
            derivative.
    """

    accuracy: ClassVar[float] = 0.0
    """Of a product beyond rounding; see `ContrastProducts`."""

    largest: ClassVar[float] = 0.0

    def __init__(self, evaluation: Evaluation, at: Settled, who: str) -> None:
        self._evaluation, self._at, self._who = evaluation.holding(at), at, who
        self._params = {name: p.detach().requires_grad_() for name, p in at.params.items()}
        self._meta = {
            name: m.detach().requires_grad_() for name, m in evaluation.meta_params.items()
        }
        self._kept: tuple[Tensor, ...] | None = None
        self._keeps = len(evaluation.batch_steps("inner")) == 1

    @property
    def params(self) -> list[str]:
        """Names of the inner parameters."""
        return list(self._params)

    @property
    def leaves(self) -> list[Tensor]:
        """The inner parameters where the phase ended."""
        return list(self._params.values())

    @property
    def samples(self) -> bool:
        """Whether the first dimension is one of samples that settle on their own."""
        return self._evaluation.problem.samples

    @property
    def size(self) -> int:
        """Number of inner parameters."""
        return sum(p.numel() for p in self._params.values())

    @property
    def symmetric(self) -> bool:
        """Whether `∂r/∂φ` is a Hessian."""
        return self._evaluation.problem.symmetric

    def product(self, vector: Tensor) -> Tensor:
        """`(∂r/∂φ)ᵀ vector`, which is `(∂²L_in/∂φ²) vector` where there is an inner loss."""
        return checked(flatten(self._product(vector, list(self._params.values()))), vector)

    def mixed(self, vector: Tensor) -> dict[str, Tensor]:
        """`(∂r/∂θ)ᵀ vector`, by name of the meta-parameter.

        Where θ acts through the regulariser alone, nothing else is differentiated twice.
        """
        meta = list(self._meta.values())
        inner = self._evaluation.reaches.functions["inner"]
        found = self._product(vector, meta) if inner else self._pulled(vector, meta)
        return dict(zip(self._meta, found, strict=True))

    def _pulled(self, vector: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
        """`∂(∂R/∂φ · vector)/∂leaves` of the regulariser R."""
        params, regularizer = list(self._params.values()), self._evaluation.problem.regularizer
        if regularizer is None:
            return [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        pull = torch.autograd.grad(
            regularizer.penalty(self._params, self._meta),
            params,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return pull_back(pull, unflatten(vector, params), leaves)

    def _product(self, vector: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """`∂(r · vector)/∂leaves`, averaged over batches."""
        leading = next(iter(self._params.values())).dtype
        if vector.dtype != leading and torch.finfo(leading).bits < 32:
            return self._narrow_product(vector, leading, leaves)
        direction = unflatten(vector, list(self._params.values()))
        total: list[Tensor] = []
        steps = self._evaluation.batch_steps("inner")
        with second_derivatives(self._evaluation, self._who):
            for residual in self._residuals(steps):
                self._evaluation.tally.spend(2)
                try:
                    product = pull_back(residual, direction, leaves, retain_graph=self._keeps)
                except RuntimeError as error:
                    if not (self._keeps and DONATED in str(error)):
                        raise
                    self._keeps, self._kept = False, None
                    (residual,) = self._residuals(steps)
                    product = pull_back(residual, direction, leaves)
                if total:
                    torch._foreach_add_(total, product)
                else:
                    total = list(product)
        return [t / len(steps) for t in total] if len(steps) > 1 else total

    def _narrow_product(
        self, vector: Tensor, dtype: torch.dtype, leaves: list[Tensor]
    ) -> list[Tensor]:
        """The product where params have 16 bits and the vector more, scaled against overflow."""
        largest = vector.abs().max()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        return [
            p.to(vector.dtype) * scale for p in self._product((vector / scale).to(dtype), leaves)
        ]

    def _residuals(self, steps: range) -> Iterator[tuple[Tensor, ...]]:
        """The residual with its graph, batch after batch."""
        if self._kept is not None:
            yield self._kept
            return
        self._evaluation.stage.stand_at(self._at)
        for step in steps:
            residual = self._evaluation.residual(self._params, self._meta, step)
            if self._keeps:
                self._kept = residual
            yield residual


def checked(product: Tensor, vector: Tensor) -> Tensor:
    """A product with `∂r/∂φ`, which has to be finite where its vector is no large one.

    Raises:
        CurvatureError: it is not.
    """
    if not torch.isfinite(product).all():
        largest = vector.abs().max().item()
        if largest < torch.finfo(product.dtype).max ** 0.5:
            raise CurvatureError(
                "the curvature is not finite where the phase settled: a second derivative of the "
                "inner loss or the map is NaN or infinite there, as of a norm or a square root at "
                "zero, or overflows. Smooth the function there, such as sqrt(x + 1e-6), or use "
                "Contrastive(), which asks for no second derivatives"
            )
    return product


@contextmanager
def second_derivatives(evaluation: Evaluation, who: str) -> Iterator[None]:
    """Say it clearly where a model has no second derivative, and what works without."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise ProblemError(
                f"{who} differentiates what was computed before, and something has been written in "
                f"place into a tensor that this needs ({str(error).splitlines()[0][:160]}). Write "
                f"nothing in place in the losses, or use "
                f"{serving(evaluation, lambda traits: not traits.double_backward)}"
            ) from error
        if not any(sign in str(error) for sign in NO_SECOND_DERIVATIVE):
            raise
        without = serving(evaluation, lambda traits: not traits.double_backward)
        raise DoubleBackwardError(
            f"{who} differentiates the inner gradient once more, and an operation of this model "
            f"has no second derivative ({str(error).splitlines()[0]}). Use {without}, which need "
            f"no second derivatives, or a model without that operation (math attention, no "
            f"torch.compile)"
        ) from error
