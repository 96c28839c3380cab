"""What the experiments share that learn from data that the user brings."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch.nn import Module

from equigrad.errors import ConfigurationError
from equigrad.estimators import Contrastive
from equigrad.experiments.runs.experiment import at_least
from equigrad.experiments.runs.model import Architecture, Model
from equigrad.experiments.strengths.strength_learning import LearningAlike
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.training.split import Split

LEARNER = GradientDescent(lr=0.02, momentum=0.9, nesterov=True, max_steps=400)
RULE = Contrastive(beta=0.1)


@dataclass(frozen=True, kw_only=True)
class OwnData(LearningAlike):
    """Data that the user brings, and how they are divided."""

    scale: Literal["smoke", "small"] = "small"
    """`smoke` presets a few short steps, to see that all works."""

    test_share: float = 0.2
    """Share of the rows that is held back and used for the test column alone."""

    training_share: float = 0.5
    """Share of the others that the network learns from; the rest judges it."""

    samples: int | None = None
    """Rows for training and validation together; all that are not for testing by default."""

    batch: int | None = 1000
    """Rows of a mini-batch at most; None for all at once."""

    initial_strength: float | None = None
    """Where every strength starts; None for the best single one. They are clamped at zero."""

    outer_steps: int = 50
    """Steps of Adam on the strengths."""

    outer_lr: float = 0.001
    """Adam's step size."""

    solver: GradientDescent = LEARNER
    """How the network learns: the free phase, from the same start each time."""

    contrastive: Contrastive = RULE
    """The contrastive rule; its nudged phases settle like the free one, but for their length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("test_share", "training_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigurationError(
                    f"{name} must be between 0 and 1, got {getattr(self, name)}"
                )
        for name in ("samples", "batch"):
            if (size := getattr(self, name)) is not None:
                at_least(1, name, size)

    @classmethod
    def _preset(cls, **chosen: str) -> Self:
        """The defaults of a scale; what has none is for the command line to ask for."""
        defaults = cls(**cls._asked_for())
        if chosen.get("scale") != "smoke":
            return defaults
        return replace(
            defaults,
            scale="smoke",
            outer_steps=3,
            solver=replace(defaults.solver, max_steps=20),
            nudged_steps=5,
        )

    @classmethod
    @abstractmethod
    def _asked_for(cls) -> dict[str, Any]:
        """What stands for the options that have no default."""

    @abstractmethod
    def architecture(self, split: Split) -> Architecture:
        """Of the network for these data."""

    def network(self, split: Split) -> Module:
        """The network."""
        return self.architecture(split).build()

    def model(self, split: Split, params: Params) -> Model:
        """What `equigrad predict` needs."""
        return Model(self.architecture(split), dict(params), split.target, split.encoding)

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Rows of a mini-batch for training and for validation; None for all at once."""
        return self.batch, self.batch
