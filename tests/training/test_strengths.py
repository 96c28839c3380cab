import pytest
import torch
from torch.nn import Linear

from equigrad import T1T2, GradientDescent
from equigrad.errors import SettlingError
from equigrad.training.split import Split
from equigrad.training.strengths import Recipe, StrengthLearner
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
