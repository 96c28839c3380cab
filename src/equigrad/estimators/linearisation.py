"""The linearised residual at a settled state, for products with its derivatives."""

import warnings
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from equigrad.errors import CurvatureError, DoubleBackwardError, ProblemError
from equigrad.estimators.estimator import serving
from equigrad.evaluation import Evaluation
from equigrad.problems import pull_back
from equigrad.solvers import Settled
from equigrad.vectors import finite, flatten, unflatten

DONATED = "donated buffer"
"""Torch's message if the backward of a compiled function freed what a second one would need."""

NO_SECOND_DERIVATIVE = (
    "is not implemented",  # fused attention, cuDNN recurrent networks
    "double backward",  # compiled functions
    DONATED,
    "differentiate twice",  # custom functions marked once_differentiable
    "forward AD",  # fused attention in forward mode
    "forward mode AD",  # compiled functions in forward mode
)
"""Torch's messages if a gradient cannot be differentiated again."""


class Linearisation:
    """Products with the derivatives of the residual at the end of a phase.

    The residual r is `∂L_in/∂φ` for a `Bilevel` and `φ - F(φ, θ)` for a `FixedPoint`. Vectors over
    φ are flat tensors of `size` entries, one parameter after another. The parameters are views of
    one such vector, so that a product is a single derivative however many there are. With one
    batch, the graph of the residual is kept. It is rebuilt for each product if there are several
    batches, so that memory does not grow with their number, or if compiled functions free what a
    second backward would need.

    Args:
        evaluation: evaluates the residual, and counts two gradients for each product and batch.
        at: the end of the phase.
        who: the estimator's name, for error messages.

    Attributes:
        leaves: the inner parameters at the end of the phase.

    Raises:
        DoubleBackwardError: from any product, if an operation of the model has no second
            derivative.
    """

    accuracy: ClassVar[float] = 0.0
    """The error of a product beyond rounding; see `ContrastProducts`."""

    largest: ClassVar[float] = 0.0

    def __init__(self, evaluation: Evaluation, at: Settled, who: str) -> None:
        self._evaluation, self._at = evaluation.holding(at), at
        self._explaining = SecondDerivatives(self._evaluation, who)
        self.leaves = [p.detach() for p in at.params.values()]
        self._flat = flatten(self.leaves).requires_grad_()
        self._params = dict(zip(at.params, unflatten(self._flat, self.leaves), strict=True))
        self._meta = {
            name: m.detach().requires_grad_() for name, m in evaluation.meta_params.items()
        }
        self._kept: Tensor | None = None
        self._steps = evaluation.batch_steps("inner")
        self._keeps = len(self._steps) == 1

    @property
    def params(self) -> list[str]:
        """Names of the inner parameters."""
        return list(self._params)

    @property
    def samples(self) -> bool:
        """Whether the first dimension counts samples that settle independently."""
        return self._evaluation.problem.samples

    @property
    def size(self) -> int:
        """Number of inner parameters."""
        return self._flat.numel()

    @property
    def symmetric(self) -> bool:
        """Whether `∂r/∂φ` is a Hessian."""
        return self._evaluation.problem.symmetric

    def residual(self) -> Tensor:
        """r, as a flat vector; takes a gradient of each batch if there are several."""
        total = torch.zeros_like(self._flat, requires_grad=False)
        total = total if torch.finfo(total.dtype).bits >= 32 else total.float()
        with self._explaining:
            for residual in self._residuals():
                self._evaluation.tally.spend(0 if self._keeps else 1)
                total = total + residual.detach()
        return total / len(self._steps)

    def at(self, moved: Settled) -> Self:
        """The linearisation at other params; the graph of this one is freed."""
        self._kept = None
        return type(self)(self._evaluation, moved, self._explaining.who)

    def product(self, vector: Tensor) -> Tensor:
        """`(∂r/∂φ)ᵀ vector`, which for an inner loss is `(∂²L_in/∂φ²) vector`."""
        return checked(self._product(vector, [self._flat])[0], vector)

    def mixed(self, vector: Tensor) -> dict[str, Tensor]:
        """`(∂r/∂θ)ᵀ vector`, by name of the meta-parameter.

        If θ acts only through the regulariser, the model is not differentiated twice.
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
        leading = self._flat.dtype
        if vector.dtype != leading and torch.finfo(leading).bits < 32:
            return self._narrow_product(vector, leading, leaves)
        direction = [vector.to(leading)]
        total: list[Tensor] = []
        with self._explaining:
            for residual in self._residuals():
                self._evaluation.tally.spend(2)
                try:
                    product = pull_back([residual], direction, leaves, retain_graph=self._keeps)
                except RuntimeError as error:
                    if not (self._keeps and DONATED in str(error)):
                        raise
                    self._keeps, self._kept = False, None
                    (residual,) = self._residuals()
                    product = pull_back([residual], direction, leaves)
                if total:
                    torch._foreach_add_(total, product)
                else:
                    total = list(product)
        return [t / len(self._steps) for t in total] if len(self._steps) > 1 else total

    def _narrow_product(
        self, vector: Tensor, dtype: torch.dtype, leaves: list[Tensor]
    ) -> list[Tensor]:
        """The product of 16-bit params with a wider vector, scaled against overflow."""
        largest = vector.abs().max()
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        return [
            p.to(vector.dtype) * scale for p in self._product((vector / scale).to(dtype), leaves)
        ]

    def _residuals(self) -> Iterator[Tensor]:
        """The residual as a flat vector with its graph, for each batch in turn."""
        if self._kept is not None:
            yield self._kept
            return
        self._evaluation.stage.stand_at(self._at)
        for step in self._steps:
            with warnings.catch_warnings():  # torch's compiler looks at .grad of every input
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a")
                residual = flatten(self._evaluation.residual(self._params, self._meta, step))
            if self._keeps:
                self._kept = residual
            yield residual


def checked(product: Tensor, vector: Tensor) -> Tensor:
    """A product with `∂r/∂φ`, checked to be finite unless its vector is large.

    Raises:
        CurvatureError: it is not finite.
    """
    if not finite(product):
        largest = vector.abs().max().item()
        if largest < torch.finfo(product.dtype).max ** 0.5:
            raise CurvatureError(
                "a second derivative of the inner loss, or a derivative of the map, is NaN or "
                "infinite at the settled params, either by overflow or as that of a norm or a "
                "square root at zero. Smooth the function there, for example by sqrt(x + 1e-6), "
                "or use Contrastive(), which needs no second derivatives"
            )
    return product


class SecondDerivatives:
    """A context that explains the error of a model without second derivative.

    Args:
        evaluation: the evaluation of the problem.
        who: the estimator's name, for error messages.

    Raises:
        DoubleBackwardError: in place of torch's own error, with what works without.
        ProblemError: something that a second derivative needs was written in place.
    """

    def __init__(self, evaluation: Evaluation, who: str) -> None:
        self._evaluation, self.who = evaluation, who

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError):
            self._explain(error)

    def _explain(self, error: RuntimeError) -> None:
        said, evaluation, who = str(error).splitlines(), self._evaluation, self.who
        if "modified by an inplace operation" in str(error):
            raise ProblemError(
                f"{who} differentiates an earlier computation, but a tensor that it needs has "
                f"since been changed in place ({said[0][:160]}). Change no "
                f"tensor in place in the losses, or use "
                f"{serving(evaluation, lambda traits: not traits.double_backward)}"
            ) from error
        if not any(sign in str(error) for sign in NO_SECOND_DERIVATIVE):
            return
        without = serving(evaluation, lambda traits: not traits.double_backward)
        if who == "Unrolled" and evaluation.problem.symmetric:
            without = f"Unrolled(products='contrast') or {without}"
        raise DoubleBackwardError(
            f"{who} differentiates the inner gradient once more, and an operation of this model "
            f"has no second derivative ({said[0]}). Use {without}, which need no second "
            f"derivatives, or a model without that operation (math attention, no torch.compile)"
        ) from error
