from fractions import Fraction

import pytest

from equigrad import ConfigurationError
from equigrad.theory import finite_difference_weights

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
