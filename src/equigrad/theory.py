"""Formulas of the theory, as functions of plain numbers."""

import cmath
from collections.abc import Sequence
from fractions import Fraction
from math import inf, pi, prod, sqrt

from equigrad.errors import ConfigurationError
from equigrad.fields import NotNegative, Positive, expect


def finite_difference_weights(nodes: Sequence[int]) -> tuple[Fraction, ...]:
    r"""Weights that turn values at `nodes` into a derivative at zero.

    The weights `α_i` are the only ones that meet the order conditions

        Σ_i α_i n_i^k = 1 if k = 1 else 0,    k = 0 … p-1,

    so that `(1/β) Σ_i α_i f(n_i β) = f'(0) + O(β^{p-1})` for p nodes `n_i` (one order more if the
    nodes are symmetric about zero). In particular `Σ α_i = 0` and `Σ n_i α_i = 1`; the paper's
    Appendix D prints the first as `Σ α_i = 1`, a misprint that its own table corrects.

    They are the derivatives at zero of the Lagrange polynomials of the nodes, computed exactly.

    Args:
        nodes: p ≥ 2 different integers, in units of β.

    Returns:
        One exact fraction for each node, in the order of the nodes.

    Raises:
        ConfigurationError: there are fewer than two nodes, or a node occurs twice.

    Example:
        >>> [str(weight) for weight in finite_difference_weights([0, 1, 2])]
        ['-3/2', '2', '-1/2']
        >>> [str(weight) for weight in finite_difference_weights([-1, 1])]
        ['-1/2', '1/2']
    """
    if len(nodes) < 2:
        raise ConfigurationError(f"a derivative needs at least 2 nodes, got {list(nodes)}")
    if len(set(nodes)) < len(nodes):
        raise ConfigurationError(f"the nodes must differ from each other, got {list(nodes)}")
    weights = []
    for i, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != i]
        numerator = sum(
            prod(-x for k, x in enumerate(others) if k != j) for j in range(len(others))
        )
        weights.append(Fraction(numerator, prod(node - other for other in others)))
    return tuple(weights)


def roots_of_one(points: int) -> tuple[complex, ...]:
    """The `points`-th roots of one that lie in the upper half plane, 1 first.

    Example:
        >>> len(roots_of_one(4)), len(roots_of_one(5))
        (3, 3)
    """
    return tuple(cmath.exp(2j * pi * k / points) for k in range(points // 2 + 1))


def holomorphic_weights(points: int) -> list[complex]:
    r"""Weights that turn values at `roots_of_one` into a derivative at zero.

        f'(0) = Re (1/(pβ)) Σ_k f(β e^{2πik/p}) e^{-2πik/p} + O(β^p)

    for a holomorphic f that is real on the real axis: Cauchy's formula on a circle, by the
    trapezoidal rule (Laborieux, Zenke 2022). Values in the lower half plane are conjugate to those
    in the upper one, whose weights are therefore doubled.

    Args:
        points: p ≥ 2.

    Returns:
        One weight for each root, in units of 1/β.

    Example:
        >>> [round(w.real, 3) for w in holomorphic_weights(2)]
        [0.5, -0.5]
    """
    doubled = [1 if 2 * k in (0, points) else 2 for k in range(points // 2 + 1)]
    pairs = zip(roots_of_one(points), doubled, strict=True)
    return [times * root.conjugate() / points for root, times in pairs]


def error_bound(
    free_error: float,
    nudged_error: float,
    beta: float,
    *,
    inner_lipschitz: float = 1.0,
    outer_lipschitz: float = 1.0,
    constant: float = 1.0,
) -> float:
    r"""The bound of Theorem 2 on the error of the two-point contrastive rule.

        B(δ, δ', β) = B_in (δ + δ')/β + B_out δ' + C β/(1 + β)

    in the form of Zucchet et al., Appendix C. The first two terms come from phases that end at a
    distance from their equilibrium, the third from the finite difference.

    Args:
        free_error: δ ≥ 0, distance of the free phase's end to its equilibrium, in the units of φ.
        nudged_error: δ' ≥ 0, the same for the nudged phase.
        beta: nudging strength β > 0, dimensionless.
        inner_lipschitz: B_in > 0, Lipschitz constant of `∂L_in/∂θ` as a function of φ.
        outer_lipschitz: B_out ≥ 0, that of `∂L_out/∂θ`.
        constant: C > 0, in the units of the meta-gradient.

    Returns:
        The bound, in the units of the meta-gradient.

    Raises:
        ConfigurationError: an argument is out of range.

    Example:
        >>> round(error_bound(0.01, 0.01, 0.25), 12)
        0.29
    """
    _check_bound(free_error, nudged_error, inner_lipschitz, outer_lipschitz, constant)
    if not 0 < beta < inf:
        raise ConfigurationError(f"the bound holds only for a positive, finite beta, got {beta}")
    finite_difference = constant * beta / (1 + beta)
    phases = inner_lipschitz * (free_error + nudged_error) / beta + outer_lipschitz * nudged_error
    return phases + finite_difference


def best_beta(
    free_error: float,
    nudged_error: float,
    *,
    inner_lipschitz: float = 1.0,
    constant: float = 1.0,
) -> float:
    r"""Corollary 1: the nudging strength with the smallest bound.

        β* = √(B_in (δ + δ')) / (√C - √(B_in (δ + δ')))

    Args:
        free_error: δ ≥ 0, distance of the free phase's end to its equilibrium.
        nudged_error: δ' ≥ 0, the same for the nudged phase.
        inner_lipschitz: B_in > 0, as in `error_bound`.
        constant: C > 0, as in `error_bound`.

    Returns:
        β*; zero for δ = δ' = 0, where the bound is smallest for β → 0.

    Raises:
        ConfigurationError: an argument is out of range, or δ + δ' ≥ C/B_in, where the bound
            decreases for all β and has no minimum.

    Example:
        >>> round(best_beta(0.02, 0.02), 12)
        0.25
    """
    _check_bound(free_error, nudged_error, inner_lipschitz, 0.0, constant)
    total = inner_lipschitz * (free_error + nudged_error)
    if not total < constant:
        raise ConfigurationError(
            f"the bound has no minimum over beta, because it decreases for all beta if free_error "
            f"+ nudged_error = {free_error + nudged_error:g} is not below constant / "
            f"inner_lipschitz = {constant / inner_lipschitz:g}. Make the errors of the phases "
            f"smaller"
        )
    return sqrt(total) / (sqrt(constant) - sqrt(total))


def best_bound(
    free_error: float,
    nudged_error: float,
    *,
    inner_lipschitz: float = 1.0,
    outer_lipschitz: float = 1.0,
    constant: float = 1.0,
) -> float:
    r"""The bound of Theorem 2 at the best β.

        B(δ, δ', β*) = B_out δ' + 2 √(C B_in (δ + δ')) - B_in (δ + δ')

    This expression precedes the last upper bound in the proof of Corollary 1 (Appendix C.3); the
    corollary itself omits the last term.

    Args:
        free_error: δ ≥ 0, distance of the free phase's end to its equilibrium.
        nudged_error: δ' ≥ 0, the same for the nudged phase.
        inner_lipschitz: B_in > 0, as in `error_bound`.
        outer_lipschitz: B_out ≥ 0, as in `error_bound`.
        constant: C > 0, as in `error_bound`.

    Returns:
        The bound, in the units of the meta-gradient.

    Raises:
        ConfigurationError: as `best_beta`.

    Example:
        >>> round(best_bound(0.02, 0.02), 12)
        0.38
        >>> round(error_bound(0.02, 0.02, best_beta(0.02, 0.02)), 12)
        0.38
    """
    best_beta(free_error, nudged_error, inner_lipschitz=inner_lipschitz, constant=constant)
    _check_bound(free_error, nudged_error, inner_lipschitz, outer_lipschitz, constant)
    total = inner_lipschitz * (free_error + nudged_error)
    return outer_lipschitz * nudged_error + 2 * sqrt(constant * total) - total


def _check_bound(
    free_error: float,
    nudged_error: float,
    inner_lipschitz: float,
    outer_lipschitz: float,
    constant: float,
) -> None:
    errors = {"free_error": free_error, "nudged_error": nudged_error}
    expect(NotNegative, **errors, outer_lipschitz=outer_lipschitz)
    expect(Positive, inner_lipschitz=inner_lipschitz, constant=constant)
