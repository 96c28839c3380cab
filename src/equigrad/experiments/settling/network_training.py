"""Settings and trainer shared by the experiments on networks that settle."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from equigrad.experiments.runs.experiment import Training
from equigrad.experiments.runs.training import Trainer
from equigrad.fields import Count, Positive
from equigrad.solvers import Solver
from equigrad.training import Callback, OuterState
from equigrad.training.relaxation import SettlingNetwork, train_network


@dataclass(frozen=True, kw_only=True)
class NetworkTraining(Training):
    """The settings of a run that trains a network whose neurons settle.

    Attributes:
        score: class attribute; the metric of the learning curves, `accuracy` for example.
    """

    score: ClassVar[str]

    solver: Solver
    """Settles the neurons, in training and, for every method, in validation and test."""

    epochs: Positive
    """Passes over the training examples."""

    minutes: Positive | None = None
    """End training after this time instead of after a number of epochs; includes validation."""

    batch: Count
    """Number of examples in a mini-batch."""

    clip: Positive | None = None
    """Largest norm of the gradient; larger gradients are scaled down."""

    checkpoint_every: Count = 200
    """Number of steps between two checkpoints."""


Config = TypeVar("Config", bound=NetworkTraining)
Trained = TypeVar("Trained", bound=SettlingNetwork)


class NetworkTrainer(Trainer[Config], Generic[Config, Trained]):
    """Trains a network whose neurons settle, and tests it.

    Args:
        config: settings of the experiment.
        network: the network, with initial weights until it learns.
        examples: inputs and targets for training.
        digest: a checksum of all data.

    Attributes:
        config, network, examples, digest: the arguments.
    """

    def __init__(
        self,
        config: Config,
        network: Trained,
        examples: tuple[Tensor, Tensor],
        digest: str,
    ) -> None:
        self.config = config
        self.network = network
        self.examples = examples
        self.digest = digest
        self.score = config.score

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the network's parameters."""

    @abstractmethod
    def measured(self, *parts: str) -> dict[str, float]:
        """The scores on `training`, `validation` and `test`, as far as these exist, by name."""

    def epochs(self, state: OuterState) -> float:
        """Passes over the training examples."""
        return state.step * self.config.batch / len(self.examples[0])

    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Train the network in place."""
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return train_network(
                self.network,
                self.examples,
                solver=config.solver,
                estimator=config.estimator,
                optimizer=self.optimizer(),
                epochs=config.unless_timed(config.epochs),
                limit=config.limit,
                batch_size=config.batch,
                seed=config.seed,
                clip=config.clip,
                validate=lambda: self.measured("validation"),
                callbacks=callbacks,
            )
