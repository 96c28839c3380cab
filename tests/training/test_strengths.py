import pytest
import torch
from torch.nn import Linear

from equigrad import T1T2, GradientDescent
from equigrad.errors import SettlingError
from equigrad.training import folded
from equigrad.training.folds import Folds
from equigrad.training.proportional import ProportionalDescent
from equigrad.training.split import Split
from equigrad.training.strengths import Recipe, StrengthLearner, with_nudged
from equigrad.training.targets import Numbers


@pytest.fixture
def learner():
    x = torch.randn(60, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    parts = [(x[i::3], y[i::3]) for i in range(3)]
    return StrengthLearner(Linear(3, 1), Split(*parts, target=Numbers(0.0, 1.0)), seed=0)


def test_strengths_under_which_the_network_diverges_are_left_out(learner):
    solver = GradientDescent(lr=0.3, max_steps=400)  # diverges for λ > 2 / 0.3
    with pytest.raises(SettlingError):
        learner.best_single(solver, [100.0])
    best, strength = learner.best_single(solver, [100.0, 1.0, 1e-3])
    assert strength == 1e-3
    assert best.metrics["validation_r2"] > 0.999


def test_only_validation_chooses_a_single_strength(learner, monkeypatch):
    """Thirteen looks at thousands of test rows cost more than the learning."""
    looks = []
    metrics = StrengthLearner.metrics

    def counted(self, synapse, params, *parts):
        looks.append(parts)
        return metrics(self, synapse, params, *parts)

    monkeypatch.setattr(StrengthLearner, "metrics", counted)
    best, _ = learner.best_single(GradientDescent(lr=0.05, max_steps=20), [0.1, 1.0])
    assert looks == [("validation",), ("validation",), ()]
    assert set(best.metrics) >= {"validation_r2", "test_r2"}


def test_seconds_are_those_of_all_that_was_computed(learner, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    recipe = Recipe(T1T2(), GradientDescent(lr=0.05, max_steps=20), 0.01)
    given = learner.learn_by(recipe, outer_steps=2, initial_strength=0.1)
    searched = learner.learn_by(recipe, outer_steps=2, initial_strength=None)
    for learned in (given, searched):  # three looks at the clock a step, two around the rest
        assert learned.state.seconds == 2 * 2
        assert learned.seconds == 1 + learned.state.seconds + 1
    one = learner.settle(recipe.solver).gradient_evaluations
    assert searched.gradient_evaluations - given.gradient_evaluations == 13 * one


def test_adam_takes_mini_batches_where_there_are_too_many_rows(monkeypatch):
    """By folds of 40 rows in two mini-batches: what 40 rows say of a line is found all the same."""
    monkeypatch.setattr(folded, "MOST_AT_ONCE", 50)
    monkeypatch.setattr(folded, "BATCH", 40)
    monkeypatch.setattr(folded, "ADAMS_LR", 0.1)
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    folds = Folds.draw(torch.zeros(80), torch.ones(80), 2, seed=0)
    split = Split((x, y), (x, y), (x, y), target=Numbers(0.0, 1.0), folds=folds)
    learner = folded.FoldedLearner(Linear(3, 1), split, seed=0)
    assert learner.batch_count == 2
    rule = with_nudged(folded.RULE, folded.SOLVER, 10)
    recipe = Recipe(rule, folded.SOLVER, 0.5)
    learned = learner.learn_by(recipe, outer_steps=2, initial_strength=None)
    assert learned.network.metrics["validation_r2"] > 0.95
    assert learned.network.metrics["test_r2"] > 0.95


def test_folds_share_the_rows():
    """Every row is held out once, by half as judge, by half to stop; each fold has every class."""
    groups = torch.tensor([0] * 30 + [1] * 6)
    weights = torch.arange(1.0, 37.0)
    folds = Folds.draw(groups, weights, 3, seed=0)
    held = folds.held > 0
    assert (held.sum(0) == 1).all()
    assert not (held & (folds.train > 0)).any()
    assert ((folds.judge > 0) ^ (folds.stop > 0)).equal(held)
    assert [groups[rows].bincount().tolist() for rows in held] == [[10, 2]] * 3
    for part in (folds.train, folds.judge, folds.stop):
        torch.testing.assert_close(part.sum(1), torch.ones(3))
    assert folds.shrink == pytest.approx(2 / 3)  # of all weight, what is learned from on average
    torch.testing.assert_close(folds.refit, weights / weights.sum())


def test_what_matters_most_moves_most_and_by_a_factor_of_e_at_most():
    theta = torch.zeros(4, requires_grad=True)
    theta.grad = torch.tensor([0.0, 1.0, -2.0, 1e4])
    ProportionalDescent([theta], lr=0.5).step()
    root = (torch.tensor([0.0, 1.0, 4.0, 1e8]).mean()).sqrt()
    expected = torch.tensor([0.0, -0.5 / root, 1.0 / root, -1.0])
    torch.testing.assert_close(theta.detach(), expected)
    theta.grad = torch.zeros(4)
    ProportionalDescent([theta], lr=0.5).step()
    torch.testing.assert_close(theta.detach(), expected)
