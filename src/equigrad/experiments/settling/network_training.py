"""What the experiments share that train one settling network on examples of their own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import Training, at_least, positive
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.runs.watching import watching
from equigrad.solvers import Solver
from equigrad.training import Callback, OuterState
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.relaxation import SettlingNetwork, train_network


@dataclass(frozen=True, kw_only=True)
class NetworkTraining(Training):
    """The settings of a run that trains a network whose neurons settle.

    Attributes:
        score: class attribute; the metric that the curves show, `accuracy` for example.
    """

    score: ClassVar[str]

    solver: Solver
    """How neurons settle, in training and, whatever the method, in validation and test."""

    epochs: float
    """Passes over the examples of training."""

    minutes: float | None = None
    """End training after so long, instead of after so many epochs; validation included."""

    batch: int
    """Examples of a mini-batch."""

    clip: float | None = None
    """Scale gradients down to this norm where theirs is larger."""

    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "batch", self.batch)
        positive("epochs", self.epochs)
        if self.clip is not None:
            positive("clip", self.clip)


Config = TypeVar("Config", bound=NetworkTraining)
Network = TypeVar("Network", bound=SettlingNetwork)


class Job(ABC, Generic[Config, Network]):
    """An experiment's examples and network.

    Args:
        config: of the experiment.
        network: as drawn, until it learns.
        examples: inputs and targets of training.
        digest: a checksum of all data.

    Attributes:
        config, network, examples, digest: likewise.
    """

    def __init__(
        self,
        config: Config,
        network: Network,
        examples: tuple[Tensor, Tensor],
        digest: str,
    ) -> None:
        self.config = config
        self.network = network
        self.examples = examples
        self.digest = digest

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """Over the network's parameters."""

    @abstractmethod
    def measured(self, *parts: str) -> dict[str, float]:
        """The score on `training`, `validation` and `test`, of those that there are, by name."""

    @abstractmethod
    def model(self) -> Mapping[str, Any]:
        """What is saved of the network."""

    @abstractmethod
    def finish(self, directory: RunDirectory, console: Console) -> Mapping[str, Any]:
        """Measure what was learned, draw it, and say the results, `metrics` among them."""

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

    def learned(
        self, directory: RunDirectory, *, resume: bool, console: Console
    ) -> dict[str, float]:
        """Train and test, and leave the run in its directory."""
        directory.keep_to_data(self.digest)
        if (ended := directory.result) is not None:
            return ended["metrics"]
        config = self.config
        callbacks = watching(directory, config, config.label, resume=resume, console=console)
        state = self.learn(callbacks)
        write_whole(directory.path / "model.pt", as_bytes(self.model()))
        found = self.finish(directory, console)
        curves = figures.learning_curves(state.history, config.score)
        figures.save(curves, directory.path / "learning.png")
        directory.end(
            config,
            estimator=type(config.estimator).__name__,
            method=config.method,
            paper=None,
            epochs=state.step * config.batch / len(self.examples[0]),
            outer_steps=state.step,
            gradient_evaluations=state.gradient_evaluations,
            seconds=state.seconds,
            **found,
        )
        return found["metrics"]
