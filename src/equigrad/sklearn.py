"""Estimators of scikit-learn: networks whose every weight learns how strongly it is held back."""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError, SettlingWarning
from equigrad.estimators import Contrastive, Estimator
from equigrad.nn import tanh_network
from equigrad.solvers import GradientDescent
from equigrad.solvers.solver import require_whole
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import Split, divide
from equigrad.training.strengths import Recipe, StrengthLearner, with_nudged
from equigrad.training.targets import Classes, Numbers, Target

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"equigrad.sklearn needs scikit-learn 1.6 or newer ({error}): "
        f"pip install 'equigrad[experiments]'"
    ) from error


class StrengthLearning(BaseEstimator):
    """A network of which every weight learns how strongly it is pulled to zero.

    Part of the rows is learned from, the others judge what was learned, and the strength λ of every
    weight's pull follows the gradient of their loss. Inputs are standardised within. All is
    computed in float64, and torch's generator is left as it was.

    Args:
        hidden: widths of the hidden tanh layers, or that of a single one.
        validation_fraction: share of the rows that judge; of every class, for classes.
        outer_steps: steps of Adam on the strengths.
        outer_lr: its step size.
        initial_strength: where every strength starts, None for the best of 13 single ones, chosen
            by the rows that judge; strengths are clamped at zero.
        lr: step size of the network's gradient descent, which has a Nesterov momentum of 0.9.
        inner_steps: how many steps it takes each time, always from the same start.
        beta: nudging strength of the contrastive rule.
        nudged_steps: steps of its nudged phase.
        estimator: of the meta-gradient, `equigrad.T1T2()` for example; None for the contrastive
            rule, of which alone the two above speak.
        batch_size: rows of a mini-batch at most; None for all at once.
        random_state: draws the split and the network's start.

    Attributes:
        strengths_: λ by name of the weight, of the weights' shapes; `0.weight` is units × inputs.
        validation_score_: of the rows that judged, to which the strengths are fitted.
        history_: what each outer step saw, a dictionary each; accuracies in percent.
        network_: that learned with the strengths, for standardised inputs.
        n_features_in_: number of inputs.
        feature_names_in_: their names, where they have any.
    """

    def __init__(
        self,
        hidden: Sequence[int] | int = (64, 64),
        *,
        validation_fraction: float = 0.5,
        outer_steps: int = 50,
        outer_lr: float = 0.001,
        initial_strength: float | None = None,
        lr: float = 0.02,
        inner_steps: int = 400,
        beta: float = 0.1,
        nudged_steps: int = 100,
        estimator: Estimator | None = None,
        batch_size: int | None = 1000,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.validation_fraction = validation_fraction
        self.outer_steps = outer_steps
        self.outer_lr = outer_lr
        self.initial_strength = initial_strength
        self.lr = lr
        self.inner_steps = inner_steps
        self.beta = beta
        self.nudged_steps = nudged_steps
        self.estimator = estimator
        self.batch_size = batch_size
        self.random_state = random_state

    def _learn(self, x: Any, y: np.ndarray, target: Target, groups: np.ndarray) -> Self:
        """Divide the rows, learn the strengths, and keep the network that learned with them."""
        hidden = [self.hidden] if isinstance(self.hidden, int | np.integer) else list(self.hidden)
        require_whole("outer_steps", self.outer_steps, least=0)
        if self.batch_size is not None:
            require_whole("batch_size", self.batch_size, ", or None")
        if not 0 < self.validation_fraction < 1:
            raise ConfigurationError(
                f"validation_fraction must be between 0 and 1, got {self.validation_fraction}"
            )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        try:
            rows = divide(
                torch.as_tensor(groups),
                test_share=0,
                training_share=1 - self.validation_fraction,
                samples=None,
                seed=seed,
                names=[str(name) for name in getattr(self, "classes_", ())],
            )
            mean, scale = mean_and_scale(torch.tensor(x), "inputs")
        except DataError as error:
            raise ValueError(str(error)) from error
        self.mean_, self.scale_ = mean.numpy(), scale.numpy()
        inputs, targets = self._inputs(x), torch.as_tensor(y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = tanh_network(x.shape[1], hidden, target.outputs).double()
        learner = StrengthLearner(
            network,
            Split(
                (inputs[rows.train], targets[rows.train]),
                (inputs[rows.validation], targets[rows.validation]),
                None,
                target=target,
            ),
            seed=seed,
            batch_sizes=(self.batch_size, self.batch_size),
        )
        solver = GradientDescent(
            lr=self.lr, momentum=0.9, nesterov=True, max_steps=self.inner_steps
        )
        learned = learner.learn_by(
            Recipe(
                self.estimator
                or with_nudged(Contrastive(beta=self.beta), solver, self.nudged_steps),
                solver,
                self.outer_lr,
            ),
            outer_steps=self.outer_steps,
            initial_strength=self.initial_strength,
        )
        if learned.network.phase.failed:
            warnings.warn(
                f"the network that learned with the strengths did not: {learned.network.phase}; "
                f"lower lr or outer_lr",
                SettlingWarning,
                stacklevel=3,
            )
        network.load_state_dict(learned.network.params)
        self.network_ = network
        self.strengths_ = {name: s.numpy() for name, s in learned.strengths.items()}
        score = learned.network.metrics[f"validation_{target.score}"]
        self.validation_score_ = score / 100 if isinstance(target, Classes) else score
        self.history_ = learned.state.history
        return self

    def _inputs(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor((x - self.mean_) / self.scale_)

    def _outputs(self, x: Any) -> Tensor:
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False)
        with torch.no_grad():
            return self.network_(self._inputs(x))


class StrengthLearningClassifier(ClassifierMixin, StrengthLearning):
    """Classes from numbers, by a network that learns a regularisation strength for every weight.

    Its arguments and attributes are those of `StrengthLearning`.

    Attributes:
        classes_: in the order of the probabilities.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> model = StrengthLearningClassifier((8,), outer_steps=3, inner_steps=50, random_state=0)
        >>> model.fit(x, y).score(x, y) > 0.9, model.strengths_["0.weight"].shape
        (True, (8, 4))
    """

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 (scikit-learn's name)
        """Learn from rows × inputs and a class a row.

        Raises:
            ValueError: what is no table of finite numbers, a class with a single row, one class.
        """
        x, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(
                f"{type(self).__name__} needs two classes to tell apart, and y has one class: "
                f"{self.classes_[0]}"
            )
        return self._learn(x, labels, Classes(tuple(map(str, self.classes_))), labels)

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities, rows × classes."""
        return self._outputs(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of every row."""
        chosen = self._outputs(X).argmax(1).numpy()
        return self.classes_[chosen]


class StrengthLearningRegressor(RegressorMixin, StrengthLearning):
    """A number from numbers, by a network that learns a regularisation strength for every weight.

    Its arguments and attributes are those of `StrengthLearning`. The target is standardised within,
    too; predictions are in its own units.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> x, y = load_diabetes(return_X_y=True)
        >>> model = StrengthLearningRegressor((8,), outer_steps=3, inner_steps=50, random_state=0)
        >>> model.fit(x, y).score(x, y) > 0.4
        True
    """

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Learn from rows × inputs and a number a row.

        Raises:
            ValueError: what is no table of finite numbers.
        """
        x, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = y.astype(np.float64)
        try:
            mean, scale = mean_and_scale(torch.tensor(y), "targets")
        except DataError as error:
            raise ValueError(str(error)) from error
        self.target_mean_, self.target_scale_ = mean.item(), scale.item()
        target = Numbers(self.target_mean_, self.target_scale_)
        standardised = (y - self.target_mean_) / self.target_scale_
        return self._learn(x, standardised, target, np.zeros(len(y), dtype=int))

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """A number for every row, in the target's own units."""
        return self._outputs(X).squeeze(1).numpy() * self.target_scale_ + self.target_mean_
