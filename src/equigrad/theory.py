"""Formulas of the theory, on plain numbers."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod

from equigrad.errors import ConfigurationError


def finite_difference_weights(nodes: Sequence[int]) -> tuple[Fraction, ...]:
    r"""Weights that turn values at `nodes` into a derivative at zero.

    The weights `α_i` are the only ones that meet the order conditions

        Σ_i α_i n_i^k = 1 if k = 1 else 0,    k = 0 … p-1,

    so that `(1/β) Σ_i α_i f(n_i β) = f'(0) + O(β^{p-1})` for p nodes `n_i` (one order more where
    the nodes are symmetric about zero). In particular `Σ α_i = 0` and `Σ n_i α_i = 1`; the paper's
    Appendix D prints the first as `Σ α_i = 1`, a slip that its own table corrects.

    They are the derivatives at zero of the Lagrange polynomials of the nodes, computed exactly.

    Args:
        nodes: p ≥ 2 different integers, in units of β.

    Returns:
        One exact fraction a node, in the order of the nodes.

    Raises:
        ConfigurationError: fewer than two nodes, or a node given twice.

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
