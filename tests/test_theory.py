import math
from fractions import Fraction

import pytest

from equigrad import ConfigurationError
from equigrad.theory import best_beta, best_bound, error_bound, finite_difference_weights

PAPER_TABLE = {
    2: ["-1", "1"],
    3: ["-3/2", "2", "-1/2"],
    4: ["-11/6", "3", "-3/2", "1/3"],
    5: ["-25/12", "4", "-3", "4/3", "-1/4"],
}


@pytest.mark.parametrize("points", PAPER_TABLE)
def test_forward_weights_are_those_of_appendix_d(points):
    weights = finite_difference_weights(range(points))
    assert list(weights) == [Fraction(w) for w in PAPER_TABLE[points]]


@pytest.mark.parametrize(
    "nodes", [range(2), range(7), range(9), (1, -1), (1, -1, 2, -2), (-3, 0, 5)]
)
def test_order_conditions(nodes):
    weights = finite_difference_weights(nodes)
    for k in range(len(nodes)):
        moment = sum(w * n**k for w, n in zip(weights, nodes, strict=True))
        assert moment == (1 if k == 1 else 0)


@pytest.mark.parametrize("nodes", [[], [0], [0, 1, 1]])
def test_nodes_that_cannot_work(nodes):
    with pytest.raises(ConfigurationError, match="nodes"):
        finite_difference_weights(nodes)


CONSTANTS = {"inner_lipschitz": 2.5, "outer_lipschitz": 0.7, "constant": 3.0}
WITHOUT_OUTER = {name: CONSTANTS[name] for name in ("inner_lipschitz", "constant")}


def test_bound_by_hand():
    """2.5 · 0.4/0.5 + 0.7 · 0.3 + 3 · 0.5/1.5."""
    assert error_bound(0.1, 0.3, 0.5, **CONSTANTS) == pytest.approx(2 + 0.21 + 1)


@pytest.mark.parametrize(("free", "nudged"), [(1e-6, 0.0), (0.0, 1e-3), (0.02, 0.1), (0.4, 0.7)])
def test_best_beta_minimises_the_bound_over_a_fine_grid(free, nudged):
    best = best_beta(free, nudged, **WITHOUT_OUTER)
    grid = [10 ** (k / 1000) for k in range(-6000, 4001)]
    found = min(grid, key=lambda beta: error_bound(free, nudged, beta, **CONSTANTS))
    assert best == pytest.approx(found, rel=3e-3)  # a step of the grid is 0.23 %
    least = error_bound(free, nudged, found, **CONSTANTS)
    at_best = error_bound(free, nudged, best, **CONSTANTS)
    assert at_best <= least
    assert at_best == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize(("free", "nudged"), [(1e-9, 1e-9), (1e-3, 0.0), (0.02, 0.3), (1.0, 0.19)])
def test_best_bound_is_the_bound_at_the_best_beta(free, nudged):
    at_best = error_bound(free, nudged, best_beta(free, nudged, **WITHOUT_OUTER), **CONSTANTS)
    closed = best_bound(free, nudged, **CONSTANTS)
    assert closed == pytest.approx(at_best, rel=1e-12)
    corollary = 0.7 * nudged + 2 * math.sqrt(3.0 * 2.5 * (free + nudged))
    assert closed < corollary


def test_limits_of_the_bound():
    assert error_bound(0.0, 0.0, 1e9) == pytest.approx(1.0)  # the finite difference caps at C
    assert error_bound(0.0, 0.0, 1e-9) == pytest.approx(1e-9)
    assert error_bound(1e-3, 1e-3, 1e9) == pytest.approx(1.001)
    assert best_beta(0.0, 0.0) == best_bound(0.0, 0.0) == 0.0
    assert best_beta(5e-9, 5e-9) == pytest.approx(1e-4, rel=1e-3)  # √(δ + δ') near equilibrium
    assert best_beta(0.4999999, 0.5) > 1e6  # grows beyond all limits towards δ + δ' = C/B_in


@pytest.mark.parametrize(("free", "nudged"), [(0.5, 0.5), (2.0, 0.0)])
def test_no_best_beta_far_from_equilibrium(free, nudged):
    for function in (best_beta, best_bound):
        with pytest.raises(ConfigurationError, match="bound has no minimum over beta"):
            function(free, nudged)
    assert error_bound(free, nudged, 1e6) < error_bound(free, nudged, 1e3)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((-0.1, 0.1, 1.0), {}, "free_error"),
        ((0.1, math.nan, 1.0), {}, "nudged_error"),
        ((0.1, 0.1, 0.0), {}, "beta"),
        ((0.1, 0.1, -1.0), {}, "beta"),
        ((0.1, 0.1, math.inf), {}, "beta"),
        ((0.1, 0.1, 1.0), {"inner_lipschitz": 0.0}, "inner_lipschitz"),
        ((0.1, 0.1, 1.0), {"outer_lipschitz": -1.0}, "outer_lipschitz"),
        ((0.1, 0.1, 1.0), {"constant": 0.0}, "constant"),
    ],
)
def test_bound_outside_its_domain(arguments, options, name):
    with pytest.raises(ConfigurationError, match=name):
        error_bound(*arguments, **options)
    if "beta" not in name:
        with pytest.raises(ConfigurationError, match=name):
            best_bound(*arguments[:2], **options)
