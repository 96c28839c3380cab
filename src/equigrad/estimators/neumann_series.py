"""Implicit differentiation by a Neumann series."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.errors import CurvatureError
from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import Count, Positive


@dataclass(frozen=True, kw_only=True)
class NeumannSeries(Implicit):
    r"""Approximates the inverse Hessian by K terms of its Neumann series (Lorraine et al. 2020).

        H⁻¹ g ≈ α Σ_{k<K} (I - αH)^k g,    H = ∂²L_in/∂φ²   or   (I - ∂F/∂φ)ᵀ

    It equals the contrast of K matched gradient steps of size α with infinitesimal nudge, at
    equilibrium. For a `FixedPoint` with α = 1 it is recurrent backpropagation (Almeida 1987, Pineda
    1987): `x ← (∂F/∂φ)ᵀ x + g`. The residual of the system, `g - H x = (I - αH)^K g`, is known at
    no cost, and is reported if it exceeds `tol` times g.

    Attributes:
        terms: K.
        alpha: step size α. The default is 1 for a map, and 1/L for an inner loss, where L is the
            largest curvature, found by power iteration.
        tol: share of g that may remain without a report.

    Raises:
        CurvatureError: from `meta_gradient`, if the series does not converge.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, Neumann series",
        cost="2K + 3, 40 to find α",
        error="vanishes as K → ∞",
        double_backward=True,
        energy=False,
    )

    remedy: ClassVar[str] = "raise terms, or use GMRES()"

    terms: Count = 100
    alpha: Positive | None = None
    tol: Positive = 1e-2

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Sum the series."""
        alpha = self.alpha or (1 / largest_curvature(linear, pressure) if linear.symmetric else 1)
        x, term = torch.zeros_like(pressure), pressure.clone()
        size = pressure.norm().item()
        # for a symmetric matrix, the terms of a convergent series never grow; others may at first
        growth = 1.01 if linear.symmetric else 1e6
        for k in range(self.terms):
            x += alpha * term
            term = term - alpha * linear.product(term)
            last = k + 1 == self.terms
            if not term.norm().item() <= (1.01 if last else growth) * size:
                raise CurvatureError(
                    f"NeumannSeries diverges: after {k + 1} terms with alpha={alpha:.3g} the "
                    f"remainder is {term.norm().item() / size:.3g} of ∂L_out/∂φ. Lower alpha. If "
                    f"that does not help, the settled params are not a minimum, or the map is not "
                    f"a contraction there: settle longer, or use GMRES()"
                )
        remainder = term.norm().item() / size if size else 0.0
        if remainder > self.tol:
            notes.append(
                f"the Neumann series did not converge: {remainder:.2g} of ∂L_out/∂φ remains after "
                f"{self.terms} terms (tol {self.tol:.2g}); raise terms"
            )
        return Solution(x, term)


def largest_curvature(linear: Linear, start: Tensor, iterations: int = 20) -> float:
    """The Hessian's largest eigenvalue by power iteration, plus a margin of a tenth."""
    generator = torch.Generator(device=start.device).manual_seed(0)
    noise = torch.randn(start.shape, generator=generator, device=start.device, dtype=start.dtype)
    vector = noise / noise.norm()
    size = 0.0
    for _ in range(iterations):
        image = linear.product(vector)
        size = image.norm().item()
        if size == 0:
            break
        vector = image / size
    if size == 0:
        raise CurvatureError(
            "the inner Hessian is zero at the settled params: the inner loss is linear there, "
            "and its minimiser is not a smooth function of θ. Add a regulariser, such as a "
            "quadratic penalty, to the inner loss"
        )
    return 1.1 * size
