"""Implicit differentiation by a Nyström approximation of the Hessian."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equigrad.estimators.estimator import Traits
from equigrad.estimators.implicit import Implicit, Linear, Solution
from equigrad.fields import Count, Positive


@dataclass(frozen=True, kw_only=True)
class Nystrom(Implicit):
    r"""Inverts `H_k + ρI`, where H_k is a Nyström approximation of rank k (Hataya, Yamada 2023).

        H_k = C W⁺ Cᵀ,   C = H[:, S],  W = H[S, S],   S: k coordinates drawn at random

    so that, by Woodbury's identity, `x = (g - C (ρW + CᵀC)⁻¹ Cᵀ g) / ρ`. This takes no iteration,
    and its inverse is bounded for any Hessian; the part of H that the sampled columns do not span
    is taken to be zero.

    The damping is relative, so that the gradient does not depend on the units of the inner loss:
    `ρ = damping ‖C‖₂`. The largest singular value of the sampled columns is at most the largest
    curvature, and close to it if the columns see its direction.

    Attributes:
        rank: k, the number of Hessian-vector products, at most that of the inner parameters.
        damping: `ρ / ‖C‖₂` > 0: directions with less curvature than ρ are treated as having ρ.
        seed: seed of the random coordinates.
    """

    traits: ClassVar[Traits] = Traits(
        idea="implicit, Nyström columns",
        cost="2K + 3",
        error="depends on damping, rank",
        double_backward=True,
        symmetric=True,
        one_system=True,
    )

    remedy: ClassVar[str] = (
        "raise rank, lower damping well below the curvatures that matter, or use GMRES()"
    )

    rank: Count = 20
    damping: Positive = 1e-2
    seed: int = 0

    def solve(self, linear: Linear, pressure: Tensor, notes: list[str]) -> Solution:
        """Sample columns, and apply Woodbury's identity."""
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randperm(linear.size, generator=generator)[: self.rank].to(pressure.device)
        units = torch.zeros(len(sample), linear.size, dtype=pressure.dtype, device=pressure.device)
        units[torch.arange(len(sample), device=pressure.device), sample] = 1
        columns = torch.stack([linear.product(unit) for unit in units], dim=1)
        damping = self.damping * (torch.linalg.matrix_norm(columns, 2).item() or 1.0)
        inner = damping * columns[sample] + columns.T @ columns
        # a pseudo-inverse, since sampled columns may be linearly dependent
        inverse = torch.linalg.pinv(inner, hermitian=True)

        def solved(right: Tensor) -> Tensor:
            return (right - columns @ (inverse @ (columns.T @ right))) / damping

        return Solution(solved(pressure), unsettled=solved(linear.residual()))
