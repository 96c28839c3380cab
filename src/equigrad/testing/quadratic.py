"""The quadratic model of the paper's Appendix E, with its meta-gradient in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equigrad.problems import Bilevel
from equigrad.solvers import GradientDescent
from equigrad.theory import finite_difference_weights


class Quadratic:
    r"""The analytically tractable model of Zucchet et al., Appendix E.

        L_in = ½ (φ-φᵗ)ᵀH(φ-φᵗ) + ½ λ ‖φ-θ‖²,    L_out = ½ (φ-φᵛ)ᵀH(φ-φᵛ),    H = diag(1, ½ … 1/N)

    with θ ~ N(0, 2²) and φᵗ, φᵛ drawn around φ^τ ~ N(0, 1) with standard deviation 0.2.

    Args:
        dim: N.
        strength: λ.
        seed: seed of the draw. Several seeds make independent draws side by side: all tensors then
            have a row for each draw, and the losses sum over rows, which settle independently.
        dtype: dtype of all tensors.

    Example:
        >>> quadratic = Quadratic(dim=3, strength=1.0)
        >>> quadratic.meta_gradient.shape
        torch.Size([3])
    """

    def __init__(
        self,
        dim: int = 50,
        strength: float = 0.1,
        seed: int | Sequence[int] = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.dim, self.strength, self.dtype = dim, strength, dtype
        self._hessian = (1 / torch.arange(1, dim + 1, dtype=torch.float64)).to(dtype)

        def draw(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            tau, theta, train, validation = (
                torch.randn(dim, generator=generator, dtype=torch.float64) for _ in range(4)
            )
            return torch.stack([2.0 * theta, tau + 0.2 * train, tau + 0.2 * validation]).to(dtype)

        drawn = draw(seed) if isinstance(seed, int) else torch.stack([draw(s) for s in seed], dim=1)
        self._theta, self._train, self._validation = drawn

    @property
    def problem(self) -> Bilevel:
        """The two losses, where φ is `params["phi"]` and θ is `meta_params["theta"]`."""
        h, train, validation = self._hessian, self._train, self._validation
        return Bilevel(
            inner_loss=lambda p, m: (
                0.5 * (h * (p["phi"] - train).square()).sum()
                + 0.5 * self.strength * (p["phi"] - m["theta"]).square().sum()
            ),
            outer_loss=lambda p, m: 0.5 * (h * (p["phi"] - validation).square()).sum(),
        )

    def params(self) -> dict[str, Tensor]:
        """The initial φ = 0."""
        return {"phi": torch.zeros_like(self._theta)}

    def meta_params(self) -> dict[str, Tensor]:
        """The random θ."""
        return {"theta": self._theta.clone().requires_grad_()}

    @property
    def step_size(self) -> float:
        """1/L, the inverse of the largest curvature of the inner loss."""
        return 1 / (1 + self.strength)

    def solver(self, max_steps: int) -> GradientDescent:
        """Plain gradient descent with step size 1/L."""
        return GradientDescent(lr=self.step_size, max_steps=max_steps)

    def equilibrium(self, beta: float = 0.0) -> Tensor:
        """`φ*_β = ((1+β)I + λH⁻¹)⁻¹ (φᵗ + βφᵛ + λH⁻¹θ)`."""
        pull = self.strength / self._hessian
        target = self._train + beta * self._validation + pull * self._theta
        return target / (1 + beta + pull)

    @property
    def meta_gradient(self) -> Tensor:
        """`∇_θ = -λ (I + λH⁻¹)⁻² ((φᵛ-φᵗ) + λH⁻¹(φᵛ-θ))`."""
        pull = self.strength / self._hessian
        psi = (self._validation - self._train) + pull * (self._validation - self._theta)
        return -self.strength * psi / (1 + pull).square()

    def contrast(self, beta: float, nodes: Sequence[int]) -> Tensor:
        """The result of the contrastive rule at exact equilibria, for any nodes.

        A phase at β contributes `∂θL(φ*_β) - ∂θL(φ*_0) = β A (A + βI)⁻¹ ∇_θ` with `A = I + λH⁻¹`
        (Appendix E), so that the rule gives `Σ_i α_i n_i A (A + n_i β I)⁻¹ ∇_θ`.
        """
        a = 1 + self.strength / self._hessian
        weights = finite_difference_weights(nodes)
        factor = sum(
            float(w) * node * a / (a + node * beta) for w, node in zip(weights, nodes, strict=True)
        )
        return factor * self.meta_gradient

    def contrast_error_bounds(self, beta: float) -> tuple[float, float]:
        """Bounds of the error of `contrast(beta, [0, 1])`, relative to `‖∇_θ‖` (Eq. 8).

        They are `h β / ((1+β) h + λ)` with the smallest and the largest curvature h of the data.
        """
        smallest, largest = 1 / self.dim, 1.0
        lower, upper = (h * beta / ((1 + beta) * h + self.strength) for h in (smallest, largest))
        return lower, upper

    def relative_error(self, estimate: Tensor) -> float:
        """`‖estimate - ∇_θ‖ / ‖∇_θ‖`; the geometric mean over several draws."""
        exact = self.meta_gradient
        errors = (estimate - exact).norm(dim=-1) / exact.norm(dim=-1)
        return errors.log().mean().exp().item()
