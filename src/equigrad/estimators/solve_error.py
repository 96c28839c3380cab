"""The error of an implicit hypergradient, estimated from the residual of its linear system."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equigrad.errors import CurvatureError
from equigrad.estimators.contrast_products import ContrastProducts
from equigrad.estimators.linearisation import Linearisation

Linear = Linearisation | ContrastProducts
"""Products with the derivatives of the residual, by autograd or by differences."""

LOOKED_INTO = 1e-5
"""A rough relative error above this justifies further products for a better estimate."""

PRODUCTS = 6
"""Number of products for the correction of a solution."""

FEW = 4
"""The same where most of the answer is known."""

MANY = 12
"""The same for a step to rest of which the solver knows nothing, which decides what is seen."""

EXACT = 100.0
"""A residual of at most this many rounding errors is taken to be exact."""


@dataclass(frozen=True)
class Solution:
    """The solution of a linear system `A x = g`.

    Attributes:
        x: a flat vector.
        residual: `g - A x`; None if it takes a further product to compute.
        unsettled: an estimate of `φ - φ*`, the distance of the settled state from rest: the
            solution of `(∂r/∂φ) u = r` by what the solver knows of the matrix; None if it knows
            too little.
        elsewhere: what `unsettled` leaves of r; None if it leaves nothing, or that is not known.
    """

    x: Tensor
    residual: Tensor | None = None
    unsettled: Tensor | None = None
    elsewhere: Tensor | None = None


@dataclass(frozen=True)
class Solved:
    """A linear system at the end of the free phase, and the gradient by its solution.

    Attributes:
        linear: products with the matrix A, and with the mixed derivative.
        solution: x.
        pressure: g, the right-hand side.
        mixed: `(∂r/∂θ)ᵀ x`.
        grads: the gradient that `mixed` is a part of.
    """

    linear: Linear
    solution: Solution
    pressure: Tensor
    mixed: Mapping[str, Tensor]
    grads: Mapping[str, Tensor]

    @property
    def weight(self) -> float:
        """The size of the implicit part of the gradient, relative to the whole."""
        return _ratio(_norm(self.mixed), _norm(self.grads))


@dataclass(frozen=True)
class SolveError:
    """The residual of a solution, and the error of the gradient.

    Attributes:
        unsolved: `‖g - A x‖ / ‖g‖`.
        relative: estimated error of the gradient, relative to its true size.
        unsettled: whether most of it comes from a free phase that is not at rest.
    """

    unsolved: float
    relative: float
    unsettled: bool = False

    def sentence(self, who: str, error: float, remedy: str) -> str:
        """A sentence with the error and a remedy."""
        much = f"about {error:.1g} of its size" if error < 1 else "its own size or more"
        if self.unsettled:
            return (
                f"the free phase is not at rest: one step of Newton's method nearer to it, {who} "
                f"has another gradient, and this one is wrong by {much}. Settle longer, or to a "
                f"lower tol; that does not help where the loss has a kink, or no minimum"
            )
        return (
            f"{who} solved its linear system to a residual of {self.unsolved:.2g} of ∂L_out/∂φ, "
            f"so the gradient is wrong by {much}: {remedy}"
        )


def solve_error(solved: Solved) -> SolveError:
    r"""Correct a solution, and measure the change of the gradient.

        δ ≈ A⁻¹ (g - A x),    error ≈ ‖(∂r/∂θ)ᵀ δ‖ / ‖∇_θ - (∂r/∂θ)ᵀ δ‖

    A rough estimate replaces `A⁻¹` by `‖x‖ / ‖g‖`, at the cost of one product with the mixed
    derivative. Only if it is above 1e-5 is δ computed, by six further products, in the Krylov space
    of the residual and with a new residual orthogonal to it (full orthogonalisation, Saad 1981).
    What a solver has left over lies along small curvatures, where δ is too short. So the error is
    multiplied by up to three, depending on the share of the residual that δ leaves, and is at least
    the unsolved share.
    """
    linear, pressure, grads = solved.linear, solved.pressure, solved.grads
    x, size = solved.solution.x, pressure.norm().item()
    if not size > 0:
        return SolveError(0.0, 0.0)
    left = solved.solution.residual
    left = pressure - linear.product(x) if left is None else left
    unsolved = left.norm().item() / size
    part = solved.weight
    if unsolved <= EXACT * torch.finfo(left.dtype).eps:
        return SolveError(unsolved, unsolved * part)
    rough = linear.mixed(left * (x.norm() / size))
    found = max(_ratio(_norm(rough), _norm(grads)), unsolved * min(part, 1.0))
    if found <= LOOKED_INTO:
        return SolveError(unsolved, found)
    missing, short = correction(linear, left)
    change = linear.mixed(missing)
    whole = _norm({name: grads[name] - change[name].to(grads[name].dtype) for name in change})
    error = (1 + 2 * short) * _ratio(_norm(change), whole)
    return SolveError(unsolved, max(error, min(unsolved, 1.0) * min(part, 1.0)))


def scale_error(solved: Solved) -> SolveError:
    r"""The error of taking the right-hand side g for the solution, from a single product.

        x' = s g,    s = ⟨g, g⟩ / ⟨g, A g⟩,    error ≈ |1 - 1/s| + ‖g - A x'‖ / ‖g‖

    The first term is the wrong length along g, the second the residual in other directions.
    """
    pressure, mixed, grads = solved.pressure, solved.mixed, solved.grads
    size = pressure.norm().item()
    if not size > 0:
        return SolveError(0.0, 0.0)
    unit = pressure / size
    image = solved.linear.product(unit)
    unsolved, along = (unit - image).norm().item(), unit.dot(image).item()
    if not along > 0:  # no positive curvature along g
        return SolveError(unsolved, 1.0)
    scale, turned = 1 / along, (unit - image / along).norm().item()
    whole = _norm({n: grads[n] + (1 - scale) * mixed[n].to(grads[n].dtype) for n in mixed})
    share = abs(1 - along) + min(turned, 1.0)
    return SolveError(unsolved, share * _ratio(scale * _norm(mixed), whole))


def newton_step(linear: Linear, solution: Solution, least: float) -> Tensor:
    """`(∂r/∂φ)⁻¹ r`: by what the solver knows of the matrix, and elsewhere by a few products.

    Args:
        linear: products with the transposed matrix.
        solution: what the solver knows.
        least: a residual below this, of which the solver knows nothing, is none.
    """
    left = linear.residual() if solution.unsettled is None else solution.elsewhere
    step = solution.unsettled
    if left is not None and left.norm().item() > least:
        most = MANY if step is None else FEW
        rest, short = correction(linear, left, most, transposed=True)
        rest = (1 + 2 * short) * rest
        step = rest if step is None else step + rest
    return torch.zeros_like(solution.x) if step is None else step


def correction(
    linear: Linear, left: Tensor, products: int = PRODUCTS, *, transposed: bool = False
) -> tuple[Tensor, float]:
    """`A⁻¹ left` by full orthogonalisation, and the share of `left` that remains, at most one.

    With `transposed`, it is `A⁻ᵀ left`, in the same space.
    """
    size = left.norm()
    basis, eps = [left / size], torch.finfo(left.dtype).eps
    hessenberg = left.new_zeros(products + 1, products)
    order = min(products, linear.size)
    for k in range(order):
        image = linear.product(basis[k])
        stiff = image.norm()
        for i, vector in enumerate(basis):
            hessenberg[i, k] = image.dot(vector)
            image = image - hessenberg[i, k] * vector
        hessenberg[k + 1, k] = image.norm()
        if hessenberg[k + 1, k] <= EXACT * eps * stiff:  # the space is closed
            order = k + 1
            break
        basis.append(image / hessenberg[k + 1, k])
    right = left.new_zeros(order)
    right[0] = size
    square = hessenberg[:order, :order]
    square = square.T if transposed else square
    if not torch.isfinite(square).all():
        raise CurvatureError("products with ∂r/∂φ are not finite where the phase settled")
    weights = torch.linalg.lstsq(square.cpu(), right.cpu()[:, None]).solution[:, 0].to(left)
    missing = torch.stack(basis[:order], dim=1) @ weights
    short = (hessenberg[order, order - 1] * weights[-1] / size).abs().item()
    return missing, min(short, 1.0) if math.isfinite(short) else 1.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors.values()]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
