"""Estimators of scikit-learn: networks that learn how strongly each input is held back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.estimators import Estimator
from equigrad.fields import CountFrom0, CountFrom2, Positive, expect
from equigrad.nn import tanh_network
from equigrad.nn.committee import named_by_member, tanh_committee
from equigrad.training.folded import RULE, SOLVER, FoldedLearner
from equigrad.training.folds import Folds
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import Split
from equigrad.training.strengths import Recipe, with_nudged
from equigrad.training.targets import Classes, Numbers, Target

try:
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_is_fitted,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        f"equigrad.sklearn needs scikit-learn 1.6 or newer ({error}): "
        f"pip install 'equigrad[experiments]'"
    ) from error

Rows = tuple[np.ndarray, np.ndarray]
"""Inputs and targets."""


class StrengthLearning(BaseEstimator):
    """Networks that learn how strongly the weights of each input are pulled to zero.

    Networks learn side by side, one a fold, each without the rows that judge it. The strengths λ of
    the pull, one an input and one a later layer, which the folds share, follow the gradient of half
    of those rows' loss; the other half say when to stop. In the end each network learns on from all
    rows. A prediction is the mean of theirs, and of those that learned with the best single
    strength. Inputs are standardised within. All is computed in float64, and torch's generator is
    left as it was.

    Args:
        hidden: widths of the hidden tanh layers, or that of a single one.
        folds: how many; where `fit` is given rows to validate with, these judge a single one.
        outer_steps: steps on the logarithms of the strengths, at most.
        outer_lr: root mean square of such a step.
        initial_strength: where every strength starts; None for the best single one.
        inner_steps: of L-BFGS in which a network learns in one go; it goes on for as long as the
            rows that judge and stop gain from it.
        tol: it has learned where the gradient's norm is at most this.
        beta: nudging strength of the contrastive rule.
        nudged_steps: steps of its nudged phase.
        estimator: of the meta-gradient, `equigrad.T1T2()` for example; None for the contrastive
            rule, of which alone the two above speak.
        random_state: draws the folds and the networks' start.

    Attributes:
        strengths_: λ by name of the weight, with ones in their shapes where weights share a
            strength; `0.weight` is 1 × inputs.
        validation_score_: of the rows that judge and stop, by networks that have not seen them.
        history_: what each outer step saw, a dictionary each; accuracies in percent.
        network_: those that learned with the strengths, for standardised inputs.
        n_features_in_: number of inputs.
        feature_names_in_: their names, where they have any.
    """

    def __init__(
        self,
        hidden: Sequence[int] | int = (64, 64),
        *,
        folds: int = 2,
        outer_steps: int = 15,
        outer_lr: float = 0.5,
        initial_strength: float | None = None,
        inner_steps: int = 40,
        tol: float = 1e-3,
        beta: float = 0.1,
        nudged_steps: int = 5,
        estimator: Estimator | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.folds = folds
        self.outer_steps = outer_steps
        self.outer_lr = outer_lr
        self.initial_strength = initial_strength
        self.inner_steps = inner_steps
        self.tol = tol
        self.beta = beta
        self.nudged_steps = nudged_steps
        self.estimator = estimator
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _read(self, x: Any, y: Any, **options: Any) -> Rows:
        """Inputs and targets as arrays; sparse inputs are made dense."""
        options = {"dtype": np.float64, "accept_sparse": "csr", **options}
        x, y = validate_data(self, x, y, **options)
        return _dense(x), y

    def _learn(
        self, rows: Rows, judges: Rows | None, weights: np.ndarray, target: Target, groups: Any
    ) -> Self:
        """Learn the strengths, and keep the networks that learned with them.

        Args:
            rows: that are learned from.
            judges: rows that judge and stop; None where folds of the others do.
            weights: of the rows.
            target: what is learned.
            groups: a number for every row; each fold has its share of every group.
        """
        hidden = [self.hidden] if isinstance(self.hidden, int | np.integer) else list(self.hidden)
        expect(CountFrom0, outer_steps=self.outer_steps)
        expect(CountFrom2, folds=self.folds)
        expect(Positive, outer_lr=self.outer_lr)
        expect(Positive | None, initial_strength=self.initial_strength)
        if (weights < 0).any() or not weights.any():
            raise ValueError("sample weights must be at least 0, and not all of them 0")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        mean, scale = _mean_and_scale(rows[0], "inputs")
        self.mean_, self.scale_ = mean.numpy(), scale.numpy()
        parts = [rows] if judges is None else [rows, judges]
        x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
        both = self._inputs(x), torch.as_tensor(y)
        if judges is None:
            folds = Folds.draw(torch.as_tensor(groups), torch.tensor(weights), self.folds, seed)
        else:
            learned_from = torch.arange(len(y)) < len(weights)
            weights = np.concatenate([weights, np.ones(len(judges[1]))])
            folds = Folds.of(torch.tensor(weights), ~learned_from[None], refit=learned_from)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = tanh_network(x.shape[1], hidden, target.outputs).double()
            committee = tanh_committee(x.shape[1], hidden, target.outputs, 2 * len(folds.train))
        solver = replace(SOLVER, max_steps=self.inner_steps, tol=self.tol)
        rule = with_nudged(replace(RULE, beta=self.beta), solver, self.nudged_steps)
        split = Split(both, both, None, target=target, folds=folds)
        learned = FoldedLearner(network, split, seed=seed).learn_by(
            Recipe(self.estimator or rule, solver, self.outer_lr),
            outer_steps=self.outer_steps,
            initial_strength=self.initial_strength,
        )
        committee.double().load_state_dict(named_by_member(learned.network.params))
        self.network_ = committee
        self.strengths_ = {name: s.numpy() for name, s in learned.strengths.items()}
        score = learned.network.metrics[f"validation_{target.score}"]
        self.validation_score_ = score / 100 if isinstance(target, Classes) else score
        self.history_ = learned.state.history
        return self

    def _inputs(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor((x - self.mean_) / self.scale_)

    def _outputs(self, x: Any) -> Tensor:
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False, accept_sparse="csr")
        with torch.no_grad():
            return self.network_(self._inputs(_dense(x)))


def _dense(x: Any) -> np.ndarray:
    return x.toarray() if issparse(x) else x


def _mean_and_scale(values: np.ndarray, what: str) -> tuple[Tensor, Tensor]:
    try:
        return mean_and_scale(torch.tensor(values), what)
    except DataError as error:
        raise ValueError(str(error)) from error


class StrengthLearningClassifier(ClassifierMixin, StrengthLearning):
    """Classes from numbers, by networks that learn a regularisation strength for every input.

    Its other arguments and attributes are those of `StrengthLearning`.

    Args:
        class_weight: of the classes, by their names; `balanced` for as much to each of them.

    Attributes:
        classes_: in the order of the probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> model = StrengthLearningClassifier((8,), outer_steps=2, inner_steps=50, random_state=0)
        >>> model.fit(x, y).score(x, y) > 0.9, model.strengths_["0.weight"].shape
        (True, (1, 4))
    """

    def __init__(
        self,
        hidden: Sequence[int] | int = (64, 64),
        *,
        folds: int = 2,
        outer_steps: int = 15,
        outer_lr: float = 0.5,
        initial_strength: float | None = None,
        inner_steps: int = 40,
        tol: float = 1e-3,
        beta: float = 0.1,
        nudged_steps: int = 5,
        estimator: Estimator | None = None,
        class_weight: Any = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(
            hidden,
            folds=folds,
            outer_steps=outer_steps,
            outer_lr=outer_lr,
            initial_strength=initial_strength,
            inner_steps=inner_steps,
            tol=tol,
            beta=beta,
            nudged_steps=nudged_steps,
            estimator=estimator,
            random_state=random_state,
        )
        self.class_weight = class_weight

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        sample_weight: Any = None,
        *,
        validation: tuple[Any, Any] | None = None,
    ) -> Self:
        """Learn from rows × inputs and a class a row.

        Args:
            X: rows × inputs, sparse or not.
            y: their classes.
            sample_weight: of the rows.
            validation: inputs and classes of rows that judge and stop, and are not learned from.

        Raises:
            ValueError: what is no table of finite numbers, one class, an unknown one to validate.
        """
        x, y = self._read(X, y, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(
                f"{type(self).__name__} needs two classes to tell apart, and y has one class: "
                f"{self.classes_[0]}"
            )
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64)
        weights = weights * compute_sample_weight(self.class_weight, y)
        judges = None
        if validation is not None:
            x_judged, y_judged = self._read(*validation, reset=False)
            if unknown := sorted(set(y_judged) - set(self.classes_)):
                raise ValueError(f"rows to validate with have classes that y has not: {unknown}")
            judges = x_judged, np.searchsorted(self.classes_, y_judged)
        target = Classes(tuple(map(str, self.classes_)))
        return self._learn((x, labels), judges, weights, target, labels)

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities, rows × classes."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of every row."""
        chosen = self._outputs(X).argmax(1).numpy()
        return self.classes_[chosen]


class StrengthLearningRegressor(RegressorMixin, StrengthLearning):
    """A number from numbers, by networks that learn a regularisation strength for every input.

    Its arguments and attributes are those of `StrengthLearning`. The target is standardised within,
    too; predictions are in its own units.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> x, y = load_diabetes(return_X_y=True)
        >>> model = StrengthLearningRegressor((8,), outer_steps=2, inner_steps=50, random_state=0)
        >>> model.fit(x, y).score(x, y) > 0.4
        True
    """

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        sample_weight: Any = None,
        *,
        validation: tuple[Any, Any] | None = None,
    ) -> Self:
        """Learn from rows × inputs and a number a row.

        Args:
            X: rows × inputs, sparse or not.
            y: their numbers.
            sample_weight: of the rows.
            validation: inputs and numbers of rows that judge and stop, and are not learned from.

        Raises:
            ValueError: what is no table of finite numbers.
        """
        x, y = self._read(X, y, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64)
        mean, scale = _mean_and_scale(y, "targets")
        self.target_mean_, self.target_scale_ = mean.item(), scale.item()
        judges = None
        if validation is not None:
            x_judged, y_judged = self._read(*validation, y_numeric=True, reset=False)
            judges = x_judged, self._standardised(y_judged)
        target = Numbers(self.target_mean_, self.target_scale_)
        return self._learn((x, self._standardised(y)), judges, weights, target, np.zeros(len(y)))

    def _standardised(self, y: np.ndarray) -> np.ndarray:
        return (y - self.target_mean_) / self.target_scale_

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """A number for every row, in the target's own units."""
        return self._outputs(X).squeeze(1).numpy() * self.target_scale_ + self.target_mean_
