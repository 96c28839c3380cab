"""Estimators of scikit-learn: networks that learn a regularisation strength for every input."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
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
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_regressor
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


@dataclass(eq=False, repr=False)
class StrengthLearning(BaseEstimator):
    """Networks that learn how strongly the weights of each input are pulled to zero.

    Networks are trained side by side, one a fold, each on the rows of the other folds. The
    strengths λ of the pull, one an input and one a later layer, are shared by the folds. They
    follow the gradient of the loss on half of the held-out rows; the other half decide when to
    stop. Then each network is trained further on all rows. A prediction is the mean of these
    networks and of those trained with the best single strength. Inputs are standardised, and all
    is computed in float64. Torch's random generator is left as it was.

    Args:
        hidden: widths of the hidden tanh layers, or that of a single one.
        folds: how many; not used where `fit` is given a validation set.
        outer_steps: steps on the logarithms of the strengths, at most.
        outer_lr: root mean square of such a step.
        initial_strength: where every strength starts; None for the best single one.
        inner_steps: steps of L-BFGS between two looks at the held-out rows, for as long as the loss
            on these falls.
        tol: a network has converged where the gradient's norm is at most this.
        beta: nudging strength of the contrastive rule.
        nudged_steps: steps of its nudged phase.
        estimator: of the meta-gradient, `equigrad.T1T2()` for example; None for the contrastive
            rule, which alone uses `beta` and `nudged_steps`.
        random_state: draws the folds and the networks' initial weights.

    Attributes:
        strengths_: λ by name of the weight, with ones in their shapes where weights share a
            strength; `0.weight` is 1 × inputs.
        validation_score_: on the held-out rows, each scored by networks that have not seen it.
        history_: a dictionary for each outer step; accuracies in percent.
        network_: the trained networks, for standardised inputs.
        n_features_in_: number of inputs.
        feature_names_in_: their names, where they have any.
    """

    hidden: Sequence[int] | int = (64, 64)
    _: KW_ONLY
    folds: int = 2
    outer_steps: int = 15
    outer_lr: float = 0.5
    initial_strength: float | None = None
    inner_steps: int = 40
    tol: float = 1e-3
    beta: float = 0.1
    nudged_steps: int = 5
    estimator: Estimator | None = None
    random_state: Any = None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    @abstractmethod
    def _target(self, y: np.ndarray) -> tuple[Target, np.ndarray | float]:
        """What kind of target y is, and factors of the rows' weights."""

    @abstractmethod
    def _encoded(self, y: np.ndarray) -> np.ndarray:
        """Targets as the networks learn them."""

    def fit(
        self,
        X: Any,  # noqa: N803 (scikit-learn's name)
        y: Any,
        sample_weight: Any = None,
        *,
        validation: tuple[Any, Any] | None = None,
    ) -> Self:
        """Learn the strengths, and keep the networks that were trained with them.

        Args:
            X: rows × inputs, sparse or not.
            y: a class or a number for every row.
            sample_weight: weights of the rows.
            validation: inputs and targets of a validation set, which takes the place of the folds.

        Raises:
            ValueError: X is no table of finite numbers, a weight is negative, an argument of the
                estimator is out of range, there is one class only, or the validation set has a
                class that y does not have.
        """
        expect(CountFrom0, outer_steps=self.outer_steps)
        expect(CountFrom2, folds=self.folds)
        expect(Positive, outer_lr=self.outer_lr)
        expect(Positive | None, initial_strength=self.initial_strength)
        x, y = self._read(X, y, ensure_min_samples=2)
        weights = _check_sample_weight(sample_weight, x, dtype=np.float64)
        target, factors = self._target(y)
        weights, y = torch.tensor(weights * factors), self._encoded(y)
        if (weights < 0).any() or not weights.any():
            raise ValueError("sample weights must be at least 0, and not all of them 0")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        mean, scale = _mean_and_scale(x, "inputs")
        self.mean_, self.scale_ = mean.numpy(), scale.numpy()
        if validation is None:
            groups = torch.tensor(y if isinstance(target, Classes) else np.zeros(len(y)))
            folds = Folds.draw(groups, weights, self.folds, seed)
        else:
            x_held, y_held = self._read(*validation, reset=False)
            learned_from = torch.arange(len(y) + len(y_held)) < len(y)
            x, y = np.concatenate([x, x_held]), np.concatenate([y, self._encoded(y_held)])
            weights = torch.cat([weights, weights.new_ones(len(y_held))])
            folds = Folds.of(weights, ~learned_from[None], refit=learned_from)
        return self._learn(self._inputs(x), torch.tensor(y), target, folds, seed)

    def _read(self, x: Any, y: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets as arrays; sparse inputs are made dense."""
        options |= {"dtype": np.float64, "accept_sparse": "csr", "y_numeric": is_regressor(self)}
        x, y = validate_data(self, x, y, **options)
        return _dense(x), y

    def _learn(self, x: Tensor, y: Tensor, target: Target, folds: Folds, seed: int) -> Self:
        hidden = [self.hidden] if isinstance(self.hidden, int | np.integer) else list(self.hidden)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = tanh_network(x.shape[1], hidden, target.outputs).double()
            committee = tanh_committee(x.shape[1], hidden, target.outputs, 2 * len(folds.train))
        solver = replace(SOLVER, max_steps=self.inner_steps, tol=self.tol)
        rule = with_nudged(replace(RULE, beta=self.beta), solver, self.nudged_steps)
        learned = FoldedLearner(
            network, Split((x, y), (x, y), None, target=target, folds=folds), seed=seed
        ).learn_by(
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


@dataclass(eq=False, repr=False, kw_only=True)
class StrengthLearningClassifier(ClassifierMixin, StrengthLearning):
    """Classes from numbers, by networks that learn a regularisation strength for every input.

    Its other arguments and attributes are those of `StrengthLearning`.

    Args:
        class_weight: weights of the classes by name; `balanced` for the same weight in total for
            each class.

    Attributes:
        classes_: in the order of the probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> model = StrengthLearningClassifier((8,), outer_steps=2, inner_steps=50, random_state=0)
        >>> model.fit(x, y).score(x, y) > 0.9, model.strengths_["0.weight"].shape
        (True, (1, 4))
    """

    class_weight: Any = None

    def _target(self, y: np.ndarray) -> tuple[Target, np.ndarray]:
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) == 1:
            raise ValueError(
                f"{type(self).__name__} needs two classes to tell apart, and y has one class: "
                f"{self.classes_[0]}"
            )
        names = tuple(map(str, self.classes_))
        return Classes(names), compute_sample_weight(self.class_weight, y)

    def _encoded(self, y: np.ndarray) -> np.ndarray:
        if unknown := sorted(set(y) - set(self.classes_)):
            raise ValueError(f"the validation set has classes that y has not: {unknown}")
        return np.searchsorted(self.classes_, y)

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities, rows × classes."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of every row."""
        chosen = self._outputs(X).argmax(1).numpy()
        return self.classes_[chosen]


@dataclass(eq=False, repr=False)
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

    def _target(self, y: np.ndarray) -> tuple[Target, float]:
        mean, scale = _mean_and_scale(y.astype(np.float64), "targets")
        self.target_mean_, self.target_scale_ = mean.item(), scale.item()
        return Numbers(self.target_mean_, self.target_scale_), 1.0

    def _encoded(self, y: np.ndarray) -> np.ndarray:
        return (y - self.target_mean_) / self.target_scale_

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """A number for every row, in the target's own units."""
        return self._outputs(X).squeeze(1).numpy() * self.target_scale_ + self.target_mean_
