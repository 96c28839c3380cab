"""The inner gradient of a step, differentiated by contrast instead of a double backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.estimators.contrast_products import Errors
from equigrad.evaluation import Evaluation
from equigrad.problems import Params, Problem
from equigrad.problems.lowered import unlowered
from equigrad.solvers import Moment
from equigrad.vectors import flatten

MULTIPLIES = 0.1
"""Differences that are wrong by more than this, on average, have kinks: wrong products of many
steps in a row may make the gradient wrong by more than its size."""

POOR = 0.1
"""An estimated relative error above this is reported in the status."""

SMOOTH = 10.0
"""Up to so many times the unevenness that is aimed at is what a smooth function may have."""

SAFETY = 3
"""The factor by which the estimated rounding exceeds that of the gradients' own sizes."""

LONGEST = 4096.0
"""The distance h may become so many times the first one."""

SELDOM = 4
"""Under autocast the gradient at φ is computed in full precision for every so many products."""


class ContrastedGradient:
    r"""`∂L_in/∂φ` of a step, which autograd differentiates by central differences.

        (∂²L_in/∂φ²) b ≈ [ ∂L_in/∂φ(φ + h u) - ∂L_in/∂φ(φ - h u) ] ‖b‖ / 2h,    u = b/‖b‖

    and likewise `(∂²L_in/∂θ∂φ) b` from `∂L_in/∂θ` of the same two evaluations. The distance h is
    chosen at the first b, where its error is smallest, as for `ContrastProducts`. Optimisers that
    divide by gradients make later b long along directions in which the loss is flat, so h becomes
    longer where the gradients on both sides and at φ show less curvature than rounding. It never
    becomes shorter than at first: rounding can look like curvature, and would then grow. Under
    autocast the steps run in the lower precision and the differences in that of φ, since h would
    amplify rounding errors of 16 bits.

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
        self._count = 0
        self._shortest = 0.0
        self._sizes = self._errors = self._rounding = 0.0

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
        middle = self._middle(params, meta_params, at, here)
        if self.distance is None:
            self._choose(params, meta_params, at, unit)
        found, seen = self._difference(params, meta_params, at, unit, middle)
        self.distance = min(max(seen.better, self._shortest), self._shortest * LONGEST)
        if middle is not None:
            weight = size * flatten(found).norm().item()
            self._sizes += weight
            self._errors += weight * seen.error
        self._rounding = math.hypot(self._rounding, size * seen.rounding)
        return [size * d for d in found]

    def _middle(
        self, params: Params, meta_params: Params, at: Moment, here: Sequence[Tensor]
    ) -> Tensor | None:
        """The gradient at φ as precise as the differences: seldom where it has to be computed."""
        self._count += 1
        if not self._evaluation.lower:
            return flatten(here)
        if self._count % SELDOM != 1:
            return None
        self._evaluation.tally.spend(1)
        self._evaluation.stage.stand_at(at)
        return flatten(self._gradients(self._full, params, meta_params, at.end_step)[: len(here)])

    def error(self, grads: Params) -> float:
        """The estimated relative error of the gradient of θ; infinite where it multiplies.

        That of the differences is a mean over products; rounding errors are independent.
        """
        if self._differences > MULTIPLIES:
            return math.inf
        return self.accuracy + self._differences + self._rounded(grads)

    @property
    def _differences(self) -> float:
        return self._errors / self._sizes if self._sizes else 0.0

    def _rounded(self, grads: Params) -> float:
        size = flatten(list(grads.values())).norm().item()
        return SAFETY * self._rounding / size if size > 0 else 0.0

    def notes(self, grads: Params) -> list[str]:
        """What the user should know about the products that went into the gradient of θ."""
        said = [
            f"products by contrast (differences of gradients): the first is accurate to "
            f"{self.accuracy:.1g}, the last is taken over a distance of {self.distance or 0:.1g}"
        ]
        error, rounded = self.error(grads), self._rounded(grads)
        size = "as much as its own size or more" if error >= 1 else f"about {error:.1g} of its size"
        if error > POOR and rounded > error / 2:
            said.append(
                f"the optimiser divides by gradients that are nearly zero, which makes the vectors "
                f"of some products long and magnifies rounding, so the gradient may be wrong by "
                f"{size}. Use products='autograd', torch.float64 or a larger eps of the optimiser"
            )
        elif error > POOR:
            said.append(
                f"the inner gradient does not change smoothly over that distance "
                f"(differences are wrong by {self._differences:.2g}), as near a kink (ReLU, "
                f"max-pooling), so the gradient may be wrong by {size}. Use products='autograd', "
                f"torch.float64 or a smooth activation"
            )
        return said

    def _choose(
        self,
        params: Params,
        meta_params: Params,
        at: Moment,
        unit: Sequence[Tensor],
    ) -> None:
        """Find the best distance along the first vector that is met."""

        def difference(distance: float) -> Tensor:
            self._evaluation.tally.spend(2)
            self.distance = distance
            found, _ = self._difference(params, meta_params, at, unit, None)
            return flatten(found[: len(unit)])

        flat = flatten(list(params.values()))
        first = (flat.norm().item() or 1.0) * torch.finfo(flat.dtype).eps ** (1 / 3)
        errors = Errors.compared(difference, first)
        self.distance, self.accuracy = errors.distance, errors.error(errors.distance)
        self._shortest = self.distance

    def _difference(
        self,
        params: Params,
        meta_params: Params,
        at: Moment,
        unit: Sequence[Tensor],
        middle: Tensor | None,
    ) -> tuple[list[Tensor], "_Seen"]:
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
        seen = _Seen(
            distance=distance,
            eps=torch.finfo(there.dtype).eps,
            size=flatten(grads[0]).norm().item(),
            change=(there - back).norm().item(),
            bend=None if middle is None else (there + back - 2 * middle).norm().item(),
        )
        found = [(a - b) / (2 * distance) for a, b in zip(*grads, strict=True)]
        regularizer = self._problem.regularizer
        if regularizer is not None:
            weights = [1 / (2 * distance), -1 / (2 * distance)]
            part = regularizer.bind(meta_params).contrast(sides, weights)
            for i, name in enumerate(meta_params, len(params)):
                found[i] = found[i] + part.get(name, 0.0)
        return found, seen


@dataclass(frozen=True)
class _Seen:
    """What the gradients on both sides of φ, and that at φ, say of their difference.

    Attributes:
        distance: from φ to either side.
        eps: the rounding error of a number.
        size: the norm of a gradient, that of θ included.
        change: the norm of the difference of the gradients of φ.
        bend: that of their second difference; None if the gradient at φ is not known.
    """

    distance: float
    eps: float
    size: float
    change: float
    bend: float | None

    @property
    def uneven(self) -> float:
        """u, the second difference relative to the first."""
        if self.bend is None or not (0 < self.change < math.inf and math.isfinite(self.bend)):
            return 0.0
        return self.bend / self.change

    @property
    def _grain(self) -> float:
        """The rounding error of the difference, relative to it."""
        return 2 * self.eps * self.size / self.change if 0 < self.change < math.inf else 0.0

    @property
    def better(self) -> float:
        """The distance at which u², the error of a smooth function, is that of rounding."""
        if self.bend is None or not self._grain > 0:  # linear along b: every distance is as good
            return self.distance
        return self.distance * (self._grain / max(self.uneven, self.eps) ** 2) ** (1 / 3)

    @property
    def error(self) -> float:
        """The error of the difference, u², but u where no smooth function is as uneven.

        A kink makes a difference uneven at any distance, and it is then not that of autograd.
        """
        return self.uneven**2 if self.smooth else self.uneven

    @property
    def smooth(self) -> bool:
        """Whether a smooth function may be as uneven."""
        return self.uneven <= SMOOTH * self._grain**0.5

    @property
    def rounding(self) -> float:
        """What rounding makes of the product with a unit vector."""
        return self.eps * self.size / self.distance


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
