"""Views and phases leave the evaluation as it was, and what is opened is closed."""

import pytest
import torch

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.testing import Quadratic

SOLVER = eg.Picard(max_steps=30)
START = {"h": torch.full((3, 2), 0.5, dtype=torch.float64)}
META = {"b": torch.tensor([1.0, 2.0], dtype=torch.float64)}


def beside_one_that_diverges():
    """Sample 1 of three overflows; the others settle at `h = 2 b`."""
    slopes = torch.tensor([[0.5], [1e30], [0.5]], dtype=torch.float64)
    return eg.FixedPoint(
        lambda p, m: {"h": slopes * p["h"] + m["b"]},
        lambda p, m: 0.5 * p["h"].square().sum(),
        samples=True,
    )


def test_a_lost_sample_belongs_to_what_settled_and_not_to_the_problem():
    problem = beside_one_that_diverges()
    with Evaluation(problem, START, META) as evaluation:
        first, again = evaluation.settle(SOLVER), evaluation.settle(SOLVER)
        pressure, _ = evaluation.outer_gradients(first)
        force = evaluation.residual(START, META, 0)[0]
        matched = evaluation.settle_nudged(first, SOLVER, 0.0, keep_momentum=False)
    assert evaluation.problem.function("inner") is problem.map
    # the second phase loses the sample by itself, as the first one did
    assert first.phase.diverged == again.phase.diverged == (1,)
    assert matched.phase.diverged == ()
    assert matched.lost is first.lost is not None
    # it is held where what settled is looked at, and nowhere else
    torch.testing.assert_close(pressure["h"], first.params["h"] * torch.tensor([[1.0], [0], [1]]))
    torch.testing.assert_close(force[1], START["h"][1] * (1 - 1e30) - META["b"])


def test_a_view_has_its_own_meta_parameters_and_the_same_tally():
    quadratic = Quadratic(dim=3)
    params, meta = quadratic.params(), quadratic.meta_params()
    moved = {name: m + 1 for name, m in meta.items()}
    solver = eg.GradientDescent(lr=0.5, max_steps=20)
    with Evaluation(quadratic.problem, params, meta) as evaluation:
        before = evaluation.tally.gradient_evaluations
        there = evaluation.at(params, moved)
        aside = there.settle(solver)
        here = evaluation.settle(solver)
    with Evaluation(quadratic.problem, params, moved) as other:
        expected = other.settle(solver)
    assert there.tally is evaluation.tally
    assert evaluation.tally.gradient_evaluations == before + 2 * 20
    assert torch.equal(aside.params["phi"], expected.params["phi"])
    assert not torch.equal(here.params["phi"], expected.params["phi"])


def test_the_outer_loss_is_not_evaluated_again_where_its_gradient_was_taken():
    calls = []

    def outer(p, m):
        calls.append(1)
        return p["w"].square().sum()

    problem = eg.Bilevel(lambda p, m: (p["w"] - m["b"]).square().sum(), outer)
    start = {"w": torch.zeros(2, dtype=torch.float64)}
    solver = eg.GradientDescent(lr=0.25, max_steps=3)
    with Evaluation(problem, start, META) as evaluation:
        one, other = evaluation.settle(solver), evaluation.settle(solver)
        evaluation.outer_gradients(one)
        count = len(calls)
        known, found = evaluation.outer_loss(one), evaluation.outer_loss(other)
    assert len(calls) == count + 1  # of the other alone
    assert known.item() == found.item()


def test_a_problem_that_is_refused_leaves_nothing_open():
    problem = eg.Bilevel(lambda p, m: p["w"].sum() * m["b"], lambda p, m: m["b"].sum())
    start, meta = {"w": torch.ones(2)}, {"b": torch.tensor(1.0)}
    torch.manual_seed(0)
    torch.randint(2**62, ())  # the one draw
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.no_grad():
        with pytest.raises(eg.ProblemError, match="outer_loss does not depend on any of params"):
            Evaluation(problem, start, meta)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
