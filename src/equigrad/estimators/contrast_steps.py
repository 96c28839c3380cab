"""The inner gradient of a step, differentiated by contrast instead of a double backward."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equigrad.estimators.contrast_products import FACTOR, Errors
from equigrad.evaluation import Evaluation
from equigrad.problems import Params, Problem
from equigrad.problems.lowered import unlowered
from equigrad.solvers import Moment
from equigrad.vectors import flatten

JUMPS = 0.3
"""A mean unevenness above this comes from kinks, or from distances that are far too long."""

POOR = 0.1
"""An estimated relative error above this is reported in the status."""

REACH = 4
"""The distance h may move by at most this many factors of 8 from its first estimate."""


class ContrastedGradient:
    r"""`∂L_in/∂φ` of a step, which autograd differentiates by central differences.

        (∂²L_in/∂φ²) b ≈ [ ∂L_in/∂φ(φ + h u) - ∂L_in/∂φ(φ - h u) ] ‖b‖ / 2h,    u = b/‖b‖

    and likewise `(∂²L_in/∂θ∂φ) b` from `∂L_in/∂θ` of the same two evaluations. The distance h is
    chosen at the first b, where its error is smallest, as for `ContrastProducts`. For later b it is
    adapted such that the gradient changes by the same share of itself: optimisers that divide by
    gradients make b long in directions along which the loss is flat. Under autocast the steps run
    in the lower precision and the differences in that of φ, since h would amplify rounding errors
    of 16 bits.

    Args:
        evaluation: evaluates the losses, and counts what the choice of h takes.

    Attributes:
        distance: h; None before the first product.
        accuracy: of the first product, relative to its size.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._problem, self._full = evaluation.problem, unlowered(evaluation.problem)
        self.distance: float | None = None
        self.accuracy = 0.0
        self._sizes = self._uneven = self._squares = self._rounding = 0.0
        self._share = self._best = 0.0
        self._shortest, self._longest = 0.0, torch.inf

    def __call__(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """The gradient, one tensor for each of `params`."""
        return _Contrasted.apply(  # pyright: ignore[reportReturnType]
            self, step, tuple(params), tuple(meta_params), *params.values(), *meta_params.values()
        )

    def moment(self, step: int) -> Moment:
        """The buffers before a step, to evaluate its loss once more."""
        return Moment(
            params={}, solver_state=None, end_step=step, buffers=self._evaluation.stage.snapshot()
        )

    def at(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """`∂L_in/∂φ`, in the precision of the steps."""
        return tuple(self._gradients(self._problem, params, meta_params, step)[: len(params)])

    def _gradients(
        self, problem: Problem, params: Params, meta_params: Params, step: int
    ) -> list[Tensor]:
        """`∂L_in/∂φ`, then `∂L_in/∂θ` without the regulariser's part."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        meta = {n: m.detach().requires_grad_() for n, m in meta_params.items()}
        with torch.enable_grad():
            loss = problem.evaluate("inner", leaves, meta, step)
        wanted = [*leaves.values(), *meta.values()]
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        dense = [g.to_dense() if g.is_sparse else g for g in found]
        regularizer = self._problem.regularizer
        if regularizer is not None:
            pull = regularizer.bind({n: m.detach() for n, m in meta.items()})
            fall = tuple(-g for g in dense[: len(leaves)])
            held = {n: p.detach() for n, p in leaves.items()}
            dense[: len(leaves)] = [-v for v in pull.add_velocity(fall, held)]
        return dense

    def products(
        self,
        params: Params,
        meta_params: Params,
        at: Moment,
        vector: Sequence[Tensor],
        here: Sequence[Tensor],
    ) -> list[Tensor]:
        """`(∂²L_in/∂φ²) b`, then `(∂²L_in/∂θ∂φ) b`, where the gradient is `here`."""
        size = flatten(vector).norm().item()
        if not size > 0:  # also of NaN, which the gradient then is
            lost = 0.0 if size == 0 else torch.nan
            return [torch.full_like(t, lost) for t in (*params.values(), *meta_params.values())]
        unit = [v / size for v in vector]
        if self.distance is None:
            self._choose(params, meta_params, at, unit)
        found = self._difference(params, meta_params, at, unit)
        if self._off > FACTOR / 2:
            self._follow()
            self._evaluation.tally.spend(2)
            found = self._difference(params, meta_params, at, unit)
        self._weigh(size * flatten(found).norm().item(), here)
        self._round(size, self._grads)
        self._follow()
        return [size * d for d in found]

    def _weigh(self, size: float, here: Sequence[Tensor]) -> None:
        """Add the unevenness of a product of some size, where the gradient at φ is `here`."""
        there, back = self._sides
        uneven = (there + back - 2 * flatten(here)).norm() / (there - back).norm()
        share = uneven.item() if torch.isfinite(uneven) else 0.0
        self._sizes += size
        self._uneven += size * share
        self._squares += size * share**2

    def _round(self, size: float, grads: Sequence[Sequence[Tensor]]) -> None:
        """Add what the rounding of two gradients makes of a product with a vector of some size."""
        assert self.distance is not None
        eps = torch.finfo(grads[0][0].dtype).eps
        norms = [flatten(g).norm().item() for g in grads]
        self._rounding += size * eps * max(norms) / self.distance

    @property
    def uneven(self) -> float:
        """The gradient's second difference relative to its first, a mean over products."""
        return self._uneven / self._sizes if self._sizes else 0.0

    def error(self, grads: Params) -> float:
        """The estimated relative error of the gradient of θ.

        In a smooth function a difference is wrong by about the square of the unevenness. A kink
        makes it uneven at any distance, and the products are then not those of autograd.
        """
        if self.uneven > JUMPS:
            return math.inf
        uneven = self._squares / self._sizes if self._sizes else 0.0
        return self.accuracy + uneven + self._rounded(grads)

    def _rounded(self, grads: Params) -> float:
        size = flatten(list(grads.values())).norm().item()
        return self._rounding / size if size > 0 else 0.0

    def notes(self, grads: Params) -> list[str]:
        """What the user should know about the products that went into the gradient of θ."""
        said = [
            f"products by contrast (differences of gradients): the first is accurate to "
            f"{self.accuracy:.1g}, the last is taken over a distance of {self.distance or 0:.1g}"
        ]
        error, rounded = self.error(grads), self._rounded(grads)
        size = "as much as its own size or more" if error >= 1 else f"about {error:.1g} of its size"
        if rounded > POOR:
            said.append(
                f"the optimiser divides by gradients that are nearly zero, which makes the vectors "
                f"of some products long and magnifies rounding, so the gradient may be wrong by "
                f"{size}. Use products='autograd', torch.float64 or a larger eps of the optimiser"
            )
        elif error > POOR:
            said.append(
                f"the inner gradient does not change smoothly over that distance "
                f"({self.uneven:.2g} of its change is uneven), as near a kink (ReLU, "
                f"max-pooling), so the gradient may be wrong by {size}. Use products='autograd', "
                f"torch.float64 or a smooth activation"
            )
        return said

    @property
    def _off(self) -> float:
        """By what factor the gradient's change is off the one that was best; at least 1."""
        share = self._share / self._best if self._best else 1.0
        return max(share, 1 / share) if share > 0 else FACTOR

    def _follow(self) -> None:
        """Move the distance to where the gradient's change should be again, within limits.

        Where the loss is linear along b, there is none, and every distance is as good.
        """
        assert self.distance is not None
        self._best = self._best or self._share
        if 0 < self._share < torch.inf:
            wanted = self.distance * self._best / self._share
            self.distance = min(max(wanted, self._shortest), self._longest)

    def _choose(
        self, params: Params, meta_params: Params, at: Moment, unit: Sequence[Tensor]
    ) -> None:
        """Find the distance along the first vector that is met."""

        def difference(distance: float) -> Tensor:
            self._evaluation.tally.spend(2)
            self.distance = distance
            found = self._difference(params, meta_params, at, unit)
            return flatten(found[: len(unit)])

        flat = flatten(list(params.values()))
        first = (flat.norm().item() or 1.0) * torch.finfo(flat.dtype).eps ** (1 / 3)
        errors = Errors.compared(difference, first)
        self.distance, self.accuracy = errors.distance, errors.error(errors.distance)
        self._shortest = min(self.distance, first * FACTOR**-REACH)
        self._longest = max(self.distance, first * FACTOR**REACH)

    def _difference(
        self,
        params: Params,
        meta_params: Params,
        at: Moment,
        unit: Sequence[Tensor],
    ) -> list[Tensor]:
        """Of the gradients on both sides, divided by how far these are apart."""
        assert self.distance is not None
        distance = self.distance
        sides, grads = [], []
        for sign in (1.0, -1.0):
            moved = torch._foreach_add(list(params.values()), list(unit), alpha=sign * distance)
            sides.append(dict(zip(params, moved, strict=True)))
            self._evaluation.stage.stand_at(at)
            grads.append(self._gradients(self._full, sides[-1], meta_params, at.end_step))
        there, back = (flatten(g[: len(unit)]) for g in grads)
        self._share = ((there - back).norm() / (there + back).norm()).item()
        self._sides, self._grads = (there, back), grads
        found = [(a - b) / (2 * distance) for a, b in zip(*grads, strict=True)]
        regularizer = self._problem.regularizer
        if regularizer is not None:
            weights = [1 / (2 * distance), -1 / (2 * distance)]
            part = regularizer.bind(meta_params).contrast(sides, weights)
            for i, name in enumerate(meta_params, len(params)):
                found[i] = found[i] + part.get(name, 0.0)
        return found


class _Contrasted(torch.autograd.Function):
    """The gradient of a step; its transposed derivative is symmetric, and had by contrast."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        gradient: ContrastedGradient,
        step: int,
        names: tuple[str, ...],
        meta_names: tuple[str, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.names, ctx.meta_names = gradient, names, meta_names
        ctx.at = gradient.moment(step)
        params, meta = _named(ctx, tensors)
        found = gradient.at(params, meta, step)
        ctx.save_for_backward(*tensors, *found)
        return found

    @staticmethod
    def backward(ctx: Any, *vector: Tensor) -> Any:  # pyright: ignore
        saved = ctx.saved_tensors
        params, meta = _named(ctx, saved)
        here = saved[len(params) + len(meta) :]
        with torch.no_grad():
            found = ctx.gradient.products(params, meta, ctx.at, vector, here)
        return None, None, None, None, *found


def _named(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Params, Params]:
    held = [t.detach() for t in tensors]
    cut = len(ctx.names)
    return (
        dict(zip(ctx.names, held[:cut], strict=True)),
        dict(zip(ctx.meta_names, held[cut:], strict=False)),
    )
