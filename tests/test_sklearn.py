"""The estimators keep scikit-learn's contract, and learn what the command line learns."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from equigrad import T1T2
from equigrad.errors import SettlingWarning
from equigrad.sklearn import StrengthLearningClassifier, StrengthLearningRegressor
from equigrad.training.strengths import SINGLE_STRENGTHS

SHORT = {"hidden": (8,), "outer_steps": 1, "inner_steps": 60, "nudged_steps": 5}
SHORT |= {"initial_strength": 1e-3}


@parametrize_with_checks(
    [
        StrengthLearningClassifier(**SHORT, random_state=0),
        StrengthLearningRegressor(**SHORT, random_state=0),
    ]
)
def test_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


def short(kind: Any, **changes: Any) -> Any:
    return kind(**{**SHORT, "random_state": 0, **changes})


def data(load: Any) -> tuple[np.ndarray, np.ndarray]:
    return load(return_X_y=True)


def test_same_seed_same_bits_and_nothing_else_is_touched():
    x, y = data(load_iris)
    before, drawn = torch.get_rng_state(), np.random.get_state(legacy=False)
    model = short(StrengthLearningClassifier).fit(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state(legacy=False)["state"]["key"] == drawn["state"]["key"]).all()
    probabilities = model.predict_proba(x)
    again: Any = clone(model)
    assert (again.fit(x, y).predict_proba(x) == probabilities).all()
    assert (
        short(StrengthLearningClassifier, random_state=1).fit(x, y).predict_proba(x)
        != probabilities
    ).any()
    assert (pickle.loads(pickle.dumps(model)).predict_proba(x) == probabilities).all()


@pytest.mark.parametrize("start", [None, 1e-3])
def test_torch_draws_on_as_if_nothing_had_been_learned(start):
    x, y = data(load_iris)
    before = torch.get_rng_state()
    short(StrengthLearningClassifier, initial_strength=start).fit(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_of_numpy_are_numbers():
    x, y = data(load_iris)
    sizes = {"hidden": 8, "inner_steps": np.int64(60), "batch_size": np.int32(40)}
    one = short(StrengthLearningClassifier, **sizes).fit(x, y).predict_proba(x)
    other = short(StrengthLearningClassifier, batch_size=40).fit(x, y).predict_proba(x)
    np.testing.assert_array_equal(one, other)


def test_a_network_that_blows_up_does_not_pass_for_one_that_learned():
    x, y = data(load_iris)
    with pytest.warns(SettlingWarning, match="did not: .*lower lr"):
        short(StrengthLearningClassifier, lr=1e4).fit(x, y)


def test_units_and_scales_do_not_matter():
    """Inputs and target are standardised: metres or millimetres, the same is learned."""
    x, y = data(load_diabetes)
    one = short(StrengthLearningRegressor).fit(x, y).predict(x)
    other = short(StrengthLearningRegressor).fit(1000 * x + 7, 60 * y - 3).predict(1000 * x + 7)
    np.testing.assert_allclose(other, 60 * one - 3, rtol=1e-6)


def test_constant_inputs_are_not_blown_up_by_rounding():
    """By rounding a column of 0.1 has a deviation of 8e-16, which no input should be divided by."""
    x, y = data(load_diabetes)
    constant = np.full((len(x), 1), 0.1)
    model = short(StrengthLearningRegressor).fit(np.hstack([x, constant]), y)
    moved = model.predict(np.hstack([x, constant + 1e-9]))
    np.testing.assert_allclose(moved, model.predict(np.hstack([x, constant])), rtol=1e-6)
    flat = short(StrengthLearningRegressor).fit(x[:12], constant[:12, 0])
    assert flat.target_scale_ == 1.0
    with pytest.raises(ValueError, match="targets: too large to standardise"):
        short(StrengthLearningRegressor).fit(x, 1e300 * y)


def test_strengths_are_learned_by_the_rows_that_judge():
    """Of ten inputs two say something, in 60 rows that are learned from and 60 that judge."""
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 10))
    y = x[:, 0] - 2 * x[:, 1] + 0.5 * random.normal(size=120)
    held_out = random.normal(size=(500, 10))
    truth = held_out[:, 0] - 2 * held_out[:, 1]
    settings = {"outer_steps": 15, "outer_lr": 0.02, "inner_steps": 100, "nudged_steps": 30}
    learned = short(StrengthLearningRegressor, **settings).fit(x, y)
    plain = short(StrengthLearningRegressor, **{**settings, "outer_steps": 0}).fit(x, y)
    assert {n: s.shape for n, s in learned.strengths_.items()} == {
        "0.weight": (8, 10),
        "0.bias": (8,),
        "2.weight": (1, 8),
        "2.bias": (1,),
    }
    assert (plain.strengths_["0.weight"] == plain.initial_strength).all()
    # at most half of what the fixed strengths leave unexplained
    assert 1 - learned.score(held_out, truth) < 0.5 * (1 - plain.score(held_out, truth))
    assert len(learned.history_) == 15
    assert learned.validation_score_ > learned.history_[0]["validation_r2"]


def test_chosen_and_piped_as_any_other():
    x, y = data(load_iris)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    pipe = make_pipeline(StandardScaler(), short(StrengthLearningClassifier))
    grid = {
        "strengthlearningclassifier__estimator": [None, T1T2()],
        "strengthlearningclassifier__lr": [0.0001, 0.1],
    }
    search = GridSearchCV(pipe, grid, cv=2).fit(x, names)
    assert search.best_params_["strengthlearningclassifier__lr"] == 0.1
    assert search.best_score_ > 0.9
    assert set(search.predict(x)) == set(names)


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        ({"validation_fraction": 1.0}, [0, 1] * 10, "in \\(0, 1\\), got 1.0"),
        ({"lr": 0.0}, [0, 1] * 10, "lr must be a finite number above 0, got 0.0"),
        (
            {"hidden": (0,)},
            [0, 1] * 10,
            "hidden must be a tuple of values, each a whole number of at least 1",
        ),
        (
            {"outer_steps": -1},
            [0, 1] * 10,
            "outer_steps must be a whole number of at least 0, got -1",
        ),
        ({"outer_steps": 1.5}, [0, 1] * 10, "a whole number of at least 0, got 1.5"),
        (
            {"batch_size": 0},
            [0, 1] * 10,
            "batch_size must be a whole number of at least 1, or None, got 0",
        ),
        ({"inner_steps": np.array([3])}, [0, 1] * 10, r"a whole number.*got array\(\[3\]\)"),
        ({"batch_size": 1e3}, [0, 1] * 10, "a whole number of at least 1, or None, got 1000.0"),
        ({}, [0] * 20, "one class: 0"),
        ({}, [0] * 19 + [1], r"too few rows for training and validation.*: 1 \(1\)"),
    ],
)
def test_what_cannot_work_is_named(change, labels, message):
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(ValueError, match=message):
        short(StrengthLearningClassifier, **change).fit(x, labels)


def test_strengths_start_at_the_best_single_one_unless_told():
    """Where nothing is learned, the best of thirteen is what is left: here a strong one."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8))
    y = x[:, 0] + 2 * random.normal(size=40)
    scores = {
        strength: short(StrengthLearningRegressor, outer_steps=0, initial_strength=strength)
        .fit(x, y)
        .validation_score_
        for strength in (*SINGLE_STRENGTHS, None)
    }
    assert scores.pop(None) == max(scores.values())
    assert max(SINGLE_STRENGTHS, key=lambda strength: scores[strength]) >= 0.01
