"""Settings shared by the few-shot experiments, and the learner made of them."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import Module

from equigrad.controllers import DynamicInversion
from equigrad.estimators import (
    Estimator,
    LeastControl,
)
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.experiments.runs.experiment import Training, one_of
from equigrad.experiments.runs.model import restored, saved_model
from equigrad.fields import Count, CountFrom0, CountFrom2, NotNegative
from equigrad.nn import LearnedRates
from equigrad.nn.side_by_side import Batching
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.tasks import FewShotLearner, TaskSampler
from equigrad.tasks.learner import Statistics
from equigrad.training import (
    pick_dtype,
)
from equigrad.training.few_shot import Metric
from equigrad.training.strengths import with_nudged

if TYPE_CHECKING:
    from equigrad.experiments.few_shot.meta_training import MetaTrainer

TASK_LEARNER = "equigrad few-shot learner 1"
"""The format of a saved learner."""

VALIDATION, TEST = -1, -2
"""Seeds of the tasks that judge: the same for all methods and runs, whose own seeds are not < 0."""


@dataclass(frozen=True)
class Tasks:
    """Where the tasks of an experiment come from.

    Attributes:
        train: of meta-training.
        validation: that models are chosen by; None where there are none.
        test: that neither has seen.
        note: where they come from, printed beside the results.
        digest: a checksum of the examples, where they are not drawn from a formula.
    """

    train: TaskSampler
    validation: TaskSampler | None
    test: TaskSampler
    note: str
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class FewShot(Training):
    """Learn from many tasks how to learn the next one: settings, tasks and network.

    Attributes:
        score: class attribute; name of the metric, `accuracy` for example.
        best: class attribute; which score is best.
        metric: class attribute; a score a task, as `equigrad.training.few_shot.Metric`.
        loss: class attribute; of one task's outputs and targets, its mean over examples.
        control: class attribute; the default of the methods under least control.
    """

    score: ClassVar[str]
    best: ClassVar[Literal["highest", "lowest"]]
    metric: ClassVar[Metric]
    loss: ClassVar[Callable[[Tensor, Tensor], Tensor]]
    control: ClassVar[LeastControl] = LeastControl(
        controller=DynamicInversion(gain=0.0, proportional=0.3)
    )

    method: FewShotMethodName = "contrastive-modulation"
    """What learns: a division of the network with an estimator of the meta-gradient."""

    seed: CountFrom0 = 0
    """Draws the network's start and the tasks of meta-training."""

    solver: GradientDescent
    """How a task is learned: the free phase."""

    nudged_steps: Count
    """Steps of each nudged phase of the contrastive rule, or of the phase under control."""

    strength: NotNegative = 0.1
    """λ, which pulls weights to their meta-learned centre (the synaptic methods and imaml)."""

    outer_steps: Count
    """Steps of Adam on what tasks share: batches of tasks."""

    decay: bool = False
    tasks: Count
    """Tasks of a batch."""

    shot: Count = 1
    """Examples that a task is learned from, of each class where there are classes."""

    queries: Count = 15
    """Examples that judge what was learned in meta-training, likewise."""

    test_queries: Count = 15
    """Examples that judge in validation and test, likewise."""

    test_steps: Count | None = None
    """Steps in which a task is learned in validation and test; those of meta-training if None."""

    statistics: Statistics = "query"
    """Batch normalisation's: of a task's queries together (transductive), or its support set."""

    weight_decay: NotNegative = 0.0
    """By which an outer step shrinks what tasks share, times its size (AdamW)."""

    average_from: CountFrom0 | None = None
    """Keep the mean of what is learned from this outer step on (Polyak averaging), and judge it."""

    validate_every: Count = 100
    """Outer steps between two validations."""

    validation_tasks: CountFrom2 = 100
    """Tasks of a validation; what does best is kept."""

    test_tasks: CountFrom2 = 600
    """Tasks of the test."""

    chunk_size: Count | None = None
    """Tasks that settle at once; all of a batch if None. Memory grows with it."""

    batching: Batching
    """How networks are computed at once; `auto` measures, and may differ by rounding each time."""

    checkpoint_every: Count = 50

    @property
    def kind(self) -> type[Estimator]:
        """The method's estimator."""
        return FEW_SHOT_METHODS[self.method].estimator

    @property
    def label(self) -> str:
        """The method, in words."""
        return FEW_SHOT_METHODS[self.method].label

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `method`, `scale` and, where there is, `setting`."""
        method = one_of(FEW_SHOT_METHODS, "method", chosen.pop("method", "contrastive-modulation"))
        defaults = cls._preset(method, **chosen)
        kind = FEW_SHOT_METHODS[method].estimator
        own = {type(rule): rule for rule in (cls.control, defaults.estimator)}
        return replace(defaults, method=method, estimator=own.get(kind) or kind())

    @classmethod
    @abstractmethod
    def _preset(cls, method: FewShotMethodName, **chosen: str) -> Self:
        """The defaults of the other words for a method, with the contrastive rule where it is one.

        What is returned is still of the default method.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """What is learned, in a few words."""

    @property
    def outer_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What judges queries in meta-training, where it is another than the task's own loss."""
        return None

    @abstractmethod
    def network(self) -> Module:
        """The network, with a start that torch's generator draws."""

    @abstractmethod
    def sources(self, device: torch.device, dtype: torch.dtype) -> Tasks:
        """Where tasks come from. Those of `VALIDATION` and `TEST` are seeds of the others."""

    def notes(self) -> Sequence[str]:
        """What else the reader of the numbers should know."""
        return ()

    def published(self) -> Mapping[str, float] | None:
        """What the paper reports of this, by name of the metric."""
        return None

    def draw(self, trainer: "MetaTrainer", meta_params: Params, folder: Path) -> None:
        """Leave figures of what was learned."""
        return

    def learner(self, network: Module) -> FewShotLearner:
        """What learns tasks."""
        rate = self.solver.lr
        model = FEW_SHOT_METHODS[self.method].division(network, self.strength, rate)
        learned = isinstance(model, LearnedRates)
        return FewShotLearner(
            model=model,
            loss=self.loss,
            outer_loss=self.outer_loss,
            solver=replace(self.solver, lr=model.rates) if learned else self.solver,
            estimator=with_nudged(self.estimator, self.solver, self.nudged_steps),
            chunk_size=self.chunk_size,
            statistics=self.statistics,
            batching=self.batching,
        )

    def as_tested(self, learner: FewShotLearner) -> FewShotLearner:
        """The learner with as many steps as in validation and test."""
        if self.test_steps is None:
            return learner
        return replace(learner, solver=replace(learner.solver, max_steps=self.test_steps))

    @classmethod
    def load_learner(cls, folder: Path | str) -> tuple[FewShotLearner, dict[str, Tensor]]:
        """What a run has left in `model.pt`: the learner of new tasks, and the θ it learned.

        Args:
            folder: of the run, or the file itself.

        Returns:
            The learner, which takes as many steps as in the test, and θ, on the CPU.

        Raises:
            RunError: there is none, it is damaged, or another experiment's. Nothing of it is
                executed.
        """
        saved = "a run of few-shot learning saves it at its end"
        with saved_model(folder, TASK_LEARNER, what="a few-shot learner", saved=saved) as loaded:
            name = cls.__name__.lower()
            if loaded["experiment"] != name:
                raise ValueError(f"it is of {loaded['experiment']!r}, expected {name!r}")
            config = restored(cls, loaded["config"])
            with torch.random.fork_rng(devices=[]):
                network = config.network().to(pick_dtype(config.dtype))
            network.load_state_dict(loaded["network"])
            return config.as_tested(config.learner(network)), loaded["meta_params"]
