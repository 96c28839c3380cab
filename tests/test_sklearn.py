"""The estimators keep scikit-learn's contract, and learn what the command line learns."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from equigrad import T1T2
from equigrad.sklearn import StrengthLearningClassifier, StrengthLearningRegressor
from equigrad.training.folded import GAIN

SHORT = {"hidden": (8,), "outer_steps": 1, "inner_steps": 60, "nudged_steps": 5}
SHORT |= {"initial_strength": 1e-3}


REPEATED = "a row of weight two is in one fold, and two rows may be in two"


@parametrize_with_checks(
    [
        StrengthLearningClassifier(**SHORT, random_state=0),
        StrengthLearningRegressor(**SHORT, random_state=0),
    ],
    expected_failed_checks=lambda _: {
        "check_sample_weight_equivalence_on_dense_data": REPEATED,
        "check_sample_weight_equivalence_on_sparse_data": REPEATED,
    },
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
    sizes = {"hidden": 8, "inner_steps": np.int64(60), "folds": np.int32(3)}
    one = short(StrengthLearningClassifier, **sizes).fit(x, y).predict_proba(x)
    other = short(StrengthLearningClassifier, folds=3).fit(x, y).predict_proba(x)
    np.testing.assert_array_equal(one, other)


def test_units_and_scales_do_not_matter():
    """Inputs and target are standardised: metres or millimetres, the same is learned.

    In few steps: every one of L-BFGS multiplies what rounding has changed.
    """
    x, y = data(load_diabetes)
    model = short(StrengthLearningRegressor, inner_steps=15, outer_steps=0)
    one = model.fit(x, y).predict(x)
    other = model.fit(1000 * x + 7, 60 * y - 3).predict(1000 * x + 7)
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
    with pytest.raises(ValueError, match=r"targets: values .* too large to be standardised"):
        short(StrengthLearningRegressor).fit(x, 1e300 * y)


def test_strengths_are_learned_by_the_rows_that_judge():
    """Of ten inputs two say something. A mean over five tables: one gains from -0.01 to 0.01."""
    gains, ratios = [], []
    for seed in range(5):
        random = np.random.default_rng(seed)
        x = random.normal(size=(120, 10))
        y = x[:, 0] - 2 * x[:, 1] + 0.5 * random.normal(size=120)
        held_out = random.normal(size=(500, 10))
        truth = held_out[:, 0] - 2 * held_out[:, 1]
        learned = short(StrengthLearningRegressor, outer_steps=15).fit(x, y)
        plain = short(StrengthLearningRegressor, outer_steps=0).fit(x, y)
        assert {n: s.shape for n, s in learned.strengths_.items()} == {
            "0.weight": (1, 10),
            "0.bias": (1,),
            "2.weight": (1, 1),
            "2.bias": (1,),
        }
        np.testing.assert_allclose(plain.strengths_["0.weight"], plain.initial_strength)
        gains.append(learned.score(held_out, truth) - plain.score(held_out, truth))
        logs = np.log(learned.strengths_["0.weight"][0])
        ratios.append(logs[2:].mean() - logs[:2].mean())
        stops = [row["stop_loss"] for row in learned.history_]
        assert len(stops) == 15 or min(stops[-2:]) > (1 - GAIN) * min(stops[:-2])  # patience of two
        assert learned.validation_score_ > learned.history_[0]["validation_r2"]
    assert np.mean(gains) > 0.002
    assert np.mean(ratios) > 0.2  # inputs that say nothing are pulled more strongly


def test_chosen_and_piped_as_any_other():
    x, y = data(load_iris)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    pipe = make_pipeline(StandardScaler(), short(StrengthLearningClassifier))
    grid = {
        "strengthlearningclassifier__estimator": [None, T1T2()],
        "strengthlearningclassifier__initial_strength": [100.0, 0.001],
    }
    search = GridSearchCV(pipe, grid, cv=2).fit(x, names)
    assert search.best_params_["strengthlearningclassifier__initial_strength"] == 0.001
    assert search.best_score_ > 0.9
    assert set(search.predict(x)) == set(names)


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        ({"folds": 1}, [0, 1] * 10, "folds must be a whole number of at least 2, got 1"),
        ({"tol": 0.0}, [0, 1] * 10, "tol must be a finite number above 0"),
        ({"outer_lr": -1.0}, [0, 1] * 10, "outer_lr must be a finite number above 0, got -1.0"),
        ({"initial_strength": 0.0}, [0, 1] * 10, "initial_strength must be a finite number above"),
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
        ({"inner_steps": np.array([3])}, [0, 1] * 10, r"a whole number.*got array\(\[3\]\)"),
        ({}, [0] * 20, "one class: 0"),
    ],
)
def test_what_cannot_work_is_named(change, labels, message):
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(ValueError, match=message):
        short(StrengthLearningClassifier, **change).fit(x, labels)


def test_strengths_start_at_the_best_single_one_unless_told():
    """Where nothing is learned, the best of some is what is left: here a strong one."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8))
    y = x[:, 0] + 2 * random.normal(size=40)
    found = short(StrengthLearningRegressor, outer_steps=0, initial_strength=None).fit(x, y)
    weak = short(StrengthLearningRegressor, outer_steps=0, initial_strength=1e-4).fit(x, y)
    assert found.strengths_["0.weight"].min() >= 0.01
    assert found.validation_score_ > weak.validation_score_


def test_weights_say_which_rows_count():
    """Of two contradictory halves, the one of all weight is learned; without weight, none."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 3))
    y = np.where(np.arange(200) < 100, x[:, 0], -x[:, 0])
    first, second = np.repeat([[1.0, 0.0], [0.0, 1.0]], 100, axis=1)
    for weights, sign in ((first, 1), (second, -1)):
        model = short(StrengthLearningRegressor).fit(x, y, sample_weight=weights)
        assert np.corrcoef(model.predict(x), sign * x[:, 0])[0, 1] > 0.9
    with pytest.raises(ValueError, match="at least 0, and not all of them 0"):
        short(StrengthLearningRegressor).fit(x, y, sample_weight=-first)


def test_balanced_classes_are_found_as_often_as_they_err():
    """One class in ten, which overlaps: weighed alike it is hardly ever said, balanced it is."""
    random = np.random.default_rng(0)
    y = (np.arange(400) % 10 == 0).astype(int)
    x = random.normal(size=(400, 2)) + y[:, None]
    plain = short(StrengthLearningClassifier, initial_strength=0.1).fit(x, y)
    even = short(StrengthLearningClassifier, initial_strength=0.1, class_weight="balanced")
    assert even.fit(x, y).predict(x)[y == 1].mean() > 0.5 > plain.predict(x)[y == 1].mean()


def test_sparse_inputs_are_those_made_dense():
    x, y = data(load_iris)
    dense = short(StrengthLearningClassifier).fit(x, y).predict_proba(x)
    sparse = short(StrengthLearningClassifier).fit(csr_array(x), y).predict_proba(csr_array(x))
    np.testing.assert_array_equal(sparse, dense)


def test_own_rows_may_judge_and_are_not_learned_from():
    """Rows that judge say the opposite: what is learned is still what the others say."""
    random = np.random.default_rng(0)
    x, x_judged = random.normal(size=(100, 3)), random.normal(size=(50, 3))
    model = short(StrengthLearningRegressor)
    model.fit(x, x[:, 0], validation=(x_judged, -x_judged[:, 0]))
    assert len(model.network_.members) == 2  # one at a single strength, one at the learned ones
    assert model.score(x, x[:, 0]) > 0.5 > 0 > model.validation_score_
    labels = (x[:, 0] > 0).astype(int)
    with pytest.raises(ValueError, match=r"classes that y has not: \[.*2"):
        short(StrengthLearningClassifier).fit(x, labels, validation=(x, labels + 1))
