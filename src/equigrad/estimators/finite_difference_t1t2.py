"""T1-T2 from three first-order gradients."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.implicit import POOR
from equigrad.estimators.solve_error import Solution, Solved, scale_error
from equigrad.evaluation import Evaluation
from equigrad.fields import Positive
from equigrad.solvers import Solver
from equigrad.vectors import flatten


@dataclass(frozen=True, kw_only=True)
class FiniteDifferenceT1T2(Estimator):
    r"""T1-T2 with the mixed derivative by central differences (DARTS: Liu et al. 2019).

        ∇̂_θ = ∂L_out/∂θ - [ ∂L_in/∂θ(φ + εg) - ∂L_in/∂θ(φ - εg) ] / 2ε,    g = ∂L_out/∂φ

    It takes first-order gradients only, and has the error of T1-T2. It equals the symmetric
    contrastive rule with phases of a single gradient step of size η, divided by η, for `ε = ηβ`.
    The error is estimated as for `T1T2`, by one Hessian product: two more first-order gradients at
    the same two points.

    Attributes:
        distance: `ε ‖g‖`, the distance from φ to either point.
    """

    traits: ClassVar[Traits] = Traits(
        idea="finite difference of T1-T2",
        cost="3",
        error="does not vanish",
        double_backward=False,
    )

    distance: Positive = 1e-2

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, and contrast `∂L_in/∂θ` at two points along the outer gradient."""
        free = evaluation.settle(solver)
        pressure, grads = evaluation.outer_gradients(free)
        size = torch.stack([g.norm() for g in pressure.values()]).norm().item()
        if size == 0:
            evaluation.tally.note(
                "∂L_out/∂φ is zero, so the gradient is the direct term ∂L_out/∂θ alone"
            )
            return Estimate(grads=grads, phases=(free,))
        epsilon = self.distance / size
        sides = []
        for sign in (1, -1):
            moved = {n: p + sign * epsilon * pressure[n] for n, p in free.params.items()}
            sides.append(dataclasses.replace(free, params=moved))
        mixed = evaluation.contrast(sides, [1 / (2 * epsilon), -1 / (2 * epsilon)])
        grads = {name: grads[name] - mixed[name] for name in grads}

        def judge() -> float:
            linear = ContrastProducts(evaluation, free, distance=self.distance)
            flat = flatten(list(pressure.values()))
            found = scale_error(Solved(linear, Solution(flat), flat, mixed, grads))
            if found.relative > POOR:
                remedy = (
                    "this is the error of replacing the inverse Hessian by the identity; use "
                    "Contrastive()"
                )
                said = found.sentence(type(self).__name__, found.relative, remedy)
                evaluation.tally.note(said)
            return found.relative

        return Estimate(grads=grads, phases=(free,), judge=judge)
