"""Settings shared by the few-shot experiments, and the few-shot learner made from them."""

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
from equigrad.fields import Count, CountFrom0, CountFrom2, NotNegative, require
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
from equigrad.training.precision import Precision
from equigrad.training.strengths import with_nudged

if TYPE_CHECKING:
    from equigrad.experiments.few_shot.meta_training import MetaTrainer

TASK_LEARNER = "equigrad few-shot learner 1"
"""The format of a saved learner."""

VALIDATION, TEST = -1, -2
"""Seeds of validation and test tasks, the same for all methods and runs; seeds of runs are ≥ 0."""


@dataclass(frozen=True)
class Tasks:
    """The sources of an experiment's tasks.

    Attributes:
        train: tasks of meta-training.
        validation: tasks by which parameters are chosen; None if there are none.
        test: tasks that are used for the test alone.
        note: the source of the tasks, printed beside the results.
        digest: a checksum of the examples; None if they are drawn from a formula.
    """

    train: TaskSampler
    validation: TaskSampler | None
    test: TaskSampler
    note: str
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class FewShot(Training):
    """Learn from many tasks how to learn a new one: settings, tasks and network.

    Attributes:
        score: class attribute; name of the metric, `accuracy` for example.
        best: class attribute; which score is best.
        metric: class attribute; a score for each task, an `equigrad.training.few_shot.Metric`.
        loss: class attribute; the loss of one task's outputs and targets, a mean over examples.
        control: class attribute; the default estimator of the methods under least control.
    """

    score: ClassVar[str]
    best: ClassVar[Literal["highest", "lowest"]]
    metric: ClassVar[Metric]
    loss: ClassVar[Callable[[Tensor, Tensor], Tensor]]
    control: ClassVar[LeastControl] = LeastControl(
        controller=DynamicInversion(gain=0.0, proportional=0.3)
    )

    method: FewShotMethodName = "contrastive-modulation"
    """The method: which parameters tasks share, and the estimator of the meta-gradient."""

    seed: CountFrom0 = 0
    """Seed of the network's initialisation and of the meta-training tasks."""

    solver: GradientDescent
    """How a task is learned (the free phase)."""

    nudged_steps: Count
    """Number of steps of each nudged phase of the contrastive rule, or of the controlled phase."""

    strength: NotNegative = 0.1
    """λ, which pulls weights to their meta-learned centre (in the synaptic methods and imaml)."""

    outer_steps: Count
    """Number of Adam's steps on the shared parameters, each with a batch of tasks."""

    decay: bool = False
    tasks: Count
    """Number of tasks in a batch."""

    shot: Count = 1
    """Number of support examples of a task; with classes, of each class."""

    queries: Count = 15
    """Number of query examples of a task in meta-training; with classes, of each class."""

    test_queries: Count = 15
    """Number of query examples of a task in validation and test; with classes, of each class."""

    test_steps: Count | None = None
    """Number of steps on a task in validation and test; None for that of meta-training."""

    statistics: Statistics = "query"
    """Batch normalisation uses statistics of a task's query set (transductive) or support set."""

    weight_decay: NotNegative = 0.0
    """Weight decay of the shared parameters, times the step size (AdamW)."""

    average_from: CountFrom0 | None = None
    """First outer step of the average of shared parameters that is validated (Polyak averaging)."""

    validate_every: Count = 100
    """Number of outer steps between two validations."""

    validation_tasks: CountFrom2 = 100
    """Number of validation tasks; the parameters with the best score are kept."""

    test_tasks: CountFrom2 = 600
    """Number of test tasks."""

    chunk_size: Count | None = None
    """Number of tasks that are trained side by side, in more memory; None for the whole batch."""

    batching: Batching
    """How networks are computed side by side; `auto` measures, so that rounding may differ."""

    precision: Precision = "float32"
    """Of products and convolutions: `tf32` on CUDA alone; `bf16` keeps φ, θ and losses float32."""

    checkpoint_every: Count = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.precision == "float32" or self.dtype == "float32",
            f"precision {self.precision!r} is a way to multiply float32 tensors, and dtype is "
            f"{self.dtype!r}; use dtype float32, or leave precision as it is",
        )

    @property
    def kind(self) -> type[Estimator]:
        """The estimator of the method."""
        return FEW_SHOT_METHODS[self.method].estimator

    @property
    def label(self) -> str:
        """The method, in words."""
        return FEW_SHOT_METHODS[self.method].label

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The default settings for `method`, `scale` and, if there is one, `setting`."""
        method = one_of(FEW_SHOT_METHODS, "method", chosen.pop("method", "contrastive-modulation"))
        defaults = cls._preset(method, **chosen)
        kind = FEW_SHOT_METHODS[method].estimator
        own = {type(rule): rule for rule in (cls.control, defaults.estimator)}
        return replace(defaults, method=method, estimator=own.get(kind) or kind())

    @classmethod
    @abstractmethod
    def _preset(cls, method: FewShotMethodName, **chosen: str) -> Self:
        """The default settings for the other choices, with the contrastive rule where it is used.

        The method of what is returned is still the default one.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the tasks, in a few words."""

    @property
    def outer_loss(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The loss of queries in meta-training, if it differs from the task's own loss."""
        return None

    @abstractmethod
    def network(self) -> Module:
        """The network, initialised by torch's generator."""

    @abstractmethod
    def sources(self, device: torch.device, dtype: torch.dtype) -> Tasks:
        """The sources of tasks. `VALIDATION` and `TEST` are the seeds of those sets."""

    def notes(self) -> Sequence[str]:
        """Notes for readers of the results."""
        return ()

    def published(self) -> Mapping[str, float] | None:
        """The paper's results, by name of the metric."""
        return None

    def draw(self, trainer: "MetaTrainer", meta_params: Params, folder: Path) -> None:
        """Draw figures of the results."""
        return

    def learner(self, network: Module) -> FewShotLearner:
        """The few-shot learner."""
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
        """The few-shot learner with the number of steps of validation and test."""
        if self.test_steps is None:
            return learner
        return replace(learner, solver=replace(learner.solver, max_steps=self.test_steps))

    @classmethod
    def load_learner(cls, folder: Path | str) -> tuple[FewShotLearner, dict[str, Tensor]]:
        """The few-shot learner and the θ that a run has saved in `model.pt`.

        Args:
            folder: of the run, or the file itself.

        Returns:
            The learner, with the number of steps of the test, and θ, on the CPU.

        Raises:
            RunError: the file is missing or damaged, or belongs to another experiment. No code in
                it is executed.
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
