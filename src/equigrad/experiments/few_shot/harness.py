"""What the few-shot experiments share: every learner of tasks in one harness."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

import equigrad
from equigrad.controllers import DynamicInversion
from equigrad.errors import ConfigurationError
from equigrad.estimators import (
    IMAML,
    MAML,
    Contrastive,
    Estimator,
    FirstOrderMAML,
    LeastControl,
    Reptile,
)
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.config_file import CHOOSERS, overlay
from equigrad.experiments.runs.experiment import Training, at_least, one_of
from equigrad.experiments.runs.formats import words
from equigrad.experiments.runs.model import reading
from equigrad.experiments.runs.run_directory import RunDirectory, describe
from equigrad.experiments.runs.watching import watching
from equigrad.nn import ComplexSynapse, LearnedStart, Modulation
from equigrad.nn.batch_statistics import BatchStatistics
from equigrad.nn.side_by_side import Batching
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.tasks import FewShotLearner, TaskSampler
from equigrad.tasks.learner import MetaModel, Statistics
from equigrad.training import (
    Callback,
    OuterState,
    pick_device,
    pick_dtype,
)
from equigrad.training.few_shot import Metric, Score, chosen, judge, learn_tasks
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.strengths import with_nudged

MethodName = Literal[
    "contrastive-modulation",
    "contrastive-synaptic",
    "least-control-modulation",
    "least-control-synaptic",
    "imaml",
    "maml",
    "first-order-maml",
    "reptile",
    "scratch",
]

FORMAT = "equigrad few-shot learner 1"

VALIDATION, TEST = -1, -2
"""Seeds of the tasks that judge: the same for all methods and runs, whose own seeds are not < 0."""


@dataclass(frozen=True)
class Method:
    """A way to learn from tasks.

    Attributes:
        label: its name in words.
        division: of a network, with a strength λ, into what a task learns and what tasks share.
        estimator: of the meta-gradient.
    """

    label: str
    division: Callable[[Module, float], MetaModel]
    estimator: type[Estimator]


def _synapse(network: Module, strength: float) -> ComplexSynapse:
    return ComplexSynapse(network, strength, center="init", learn=("center",))


def _modulation(network: Module, strength: float) -> Modulation:
    return Modulation(network)


def _start(network: Module, strength: float) -> LearnedStart:
    return LearnedStart(network)


METHODS: dict[MethodName, Method] = {
    "contrastive-modulation": Method("contrastive, modulation", _modulation, Contrastive),
    "contrastive-synaptic": Method("contrastive, synaptic", _synapse, Contrastive),
    "least-control-modulation": Method("least control, modulation", _modulation, LeastControl),
    "least-control-synaptic": Method("least control, synaptic", _synapse, LeastControl),
    "imaml": Method("iMAML", _synapse, IMAML),
    "maml": Method("MAML", _start, MAML),
    "first-order-maml": Method("first-order MAML", _start, FirstOrderMAML),
    "reptile": Method("Reptile", _start, Reptile),
    "scratch": Method("from scratch", _start, FirstOrderMAML),
}
"""The learners; the last one learns each task from a random start, and shares nothing."""


@dataclass(frozen=True)
class Tasks:
    """Where the tasks of an experiment come from.

    Attributes:
        train: of meta-training.
        validation: that models are chosen by; None where there are none.
        test: that neither has seen.
        note: how they were had, for whoever reads the numbers.
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

    method: MethodName = "contrastive-modulation"
    """What learns: a division of the network with an estimator of the meta-gradient."""

    seed: int = 0
    """Draws the network's start and the tasks of meta-training."""

    solver: GradientDescent
    """How a task is learned: the free phase."""

    nudged_steps: int
    """Steps of each nudged phase of the contrastive rule, or of the phase under control."""

    strength: float = 0.1
    """λ, which pulls weights to their meta-learned centre (the synaptic methods and imaml)."""

    outer_steps: int
    """Steps of Adam on what tasks share: batches of tasks."""

    decay: bool = False
    """Let it fall linearly, to zero at the end."""

    tasks: int
    """Tasks of a batch."""

    shot: int = 1
    """Examples that a task is learned from, of each class where there are classes."""

    queries: int = 15
    """Examples that judge what was learned in meta-training, likewise."""

    test_queries: int = 15
    """Examples that judge in validation and test, likewise."""

    test_steps: int | None = None
    """Steps in which a task is learned in validation and test; those of meta-training if None."""

    statistics: Statistics = "query"
    """Batch normalisation's: of a task's queries together (transductive), or its support set."""

    average_from: int | None = None
    """Keep the mean of what is learned from this outer step on (Polyak averaging), and judge it."""

    validate_every: int = 100
    """Outer steps between two validations."""

    validation_tasks: int = 100
    """Tasks of a validation; what does best is kept."""

    test_tasks: int = 600
    """Tasks of the test."""

    chunk_size: int | None = None
    """Tasks that settle at once; all of a batch if None. Memory grows with it."""

    batching: Batching
    """How networks are computed at once; `auto` measures, and may differ by rounding each time."""

    checkpoint_every: int = 50
    """Outer steps between two checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("nudged_steps", "outer_steps", "tasks", "shot", "queries", "test_queries"),
            "validate_every",
        ):
            at_least(1, name, getattr(self, name))
        for name in ("chunk_size", "test_steps"):
            if (value := getattr(self, name)) is not None:
                at_least(1, name, value)
        for name in ("validation_tasks", "test_tasks"):
            at_least(2, name, getattr(self, name))
        if self.average_from is not None:
            at_least(0, "average_from", self.average_from)
        if not 0 <= self.strength < math.inf:
            raise ConfigurationError(f"strength must be at least 0, got {self.strength}")

    @property
    def kind(self) -> type[Estimator]:
        """The method's estimator."""
        return METHODS[one_of(METHODS, "method", self.method)].estimator

    @property
    def label(self) -> str:
        """The method, in words."""
        return METHODS[self.method].label

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `method`, `scale` and, where there is, `setting`."""
        method = one_of(METHODS, "method", chosen.pop("method", "contrastive-modulation"))
        defaults = cls._preset(method, **chosen)
        kind = METHODS[method].estimator
        own = {type(rule): rule for rule in (cls.control, defaults.estimator)}
        return replace(defaults, method=method, estimator=own.get(kind) or kind())

    @classmethod
    @abstractmethod
    def _preset(cls, method: MethodName, **chosen: str) -> Self:
        """The defaults of the other words for a method, with the contrastive rule where it is one.

        What is returned is still of the default method.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """What is learned, in a few words."""

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

    def draw(self, job: "Job", meta_params: Params, folder: Path) -> None:
        """Leave figures of what was learned."""
        return

    def learner(self, network: Module) -> FewShotLearner:
        """What learns tasks."""
        return FewShotLearner(
            model=METHODS[self.method].division(network, self.strength),
            loss=self.loss,
            solver=self.solver,
            estimator=with_nudged(self.estimator, self.solver, self.nudged_steps),
            chunk_size=self.chunk_size,
            statistics=self.statistics,
            batching=self.batching,
        )

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
        with reading(folder, "a few-shot learner", FORMAT, saved) as loaded:
            name = cls.__name__.lower()
            if loaded["experiment"] != name:
                raise ValueError(f"it is of {loaded['experiment']!r}, expected {name!r}")
            written = loaded["config"]
            words = {name: written[name] for name in CHOOSERS if isinstance(written.get(name), str)}
            config = overlay(cls.preset(**words), written)
            with torch.random.fork_rng(devices=[]):
                network = config.network().to(pick_dtype(config.dtype))
            network.load_state_dict(loaded["network"])
            return _as_tested(config.learner(network), config), loaded["meta_params"]


def _as_tested(learner: FewShotLearner, config: FewShot) -> FewShotLearner:
    """A learner that takes as many steps as in validation and test."""
    if config.test_steps is None:
        return learner
    return replace(learner, solver=replace(config.solver, max_steps=config.test_steps))


class Job:
    """An experiment's tasks and learner.

    Args:
        config: of the experiment.

    Attributes:
        config: likewise.
        tasks: where tasks come from.
        learner: of tasks, in meta-training.
        tested: of tasks, in validation and test.
    """

    def __init__(self, config: FewShot) -> None:
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.config = config
        self.tasks = config.sources(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = config.network()
        self.learner = config.learner(network.to(device, dtype))
        self.tested = _as_tested(self.learner, config)

    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Meta-train; from scratch, nothing is learned."""
        config = self.config
        meta_params = self.learner.model.meta_params()
        watched = self.tasks.validation is not None
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return learn_tasks(
                self.learner,
                meta_params,
                self.tasks.train,
                tasks=config.tasks,
                optimizer=torch.optim.Adam(meta_params.values(), lr=config.outer_lr),
                steps=0 if config.method == "scratch" else config.unless_timed(config.outer_steps),
                limit=config.limit,
                average_from=config.average_from,
                validate=self.validate if watched else None,
                validate_every=config.validate_every,
                keep_best=config.best if watched else None,
                callbacks=callbacks,
            )

    def validate(self, meta_params: Params) -> dict[str, float]:
        """The score on tasks of validation."""
        assert self.tasks.validation is not None
        score = self.judge(meta_params, self.tasks.validation, self.config.validation_tasks)
        return {f"validation_{self.config.score}": score.mean}

    def test(self, meta_params: Params) -> dict[str, Score]:
        """The score on tasks of the test, by each kind of statistics that makes a difference."""
        modules = self.tested.model.module().modules()
        normalised = any(isinstance(m, _BatchNorm | BatchStatistics) for m in modules)
        kinds: tuple[Statistics, ...] = ("query", "support") if normalised else ("query",)
        count = self.config.test_tasks
        return {kind: self.judge(meta_params, self.tasks.test, count, kind) for kind in kinds}

    def judge(
        self,
        meta_params: Params,
        sampler: TaskSampler,
        tasks: int,
        statistics: Statistics | None = None,
    ) -> Score:
        """The score on tasks of a sampler."""
        metric = self.config.metric
        return judge(self.tested, meta_params, sampler, metric, tasks=tasks, statistics=statistics)

    def learned(
        self, directory: RunDirectory, *, resume: bool, console: Console
    ) -> dict[str, float]:
        """Meta-train and test, and leave the run in its directory."""
        if self.tasks.digest is not None:
            directory.keep_to_data(self.tasks.digest)
        if (ended := directory.result) is not None:
            return ended["metrics"]
        config = self.config
        callbacks = watching(directory, config, config.label, resume=resume, console=console)
        state = self.learn(callbacks)
        meta_params = chosen(state)
        content = {
            "format": FORMAT,
            "equigrad": equigrad.__version__,
            "experiment": type(config).__name__.lower(),
            "config": describe(config),
            "network": self.learner.model.module().state_dict(),
            "meta_params": meta_params,
        }
        write_whole(directory.path / "model.pt", as_bytes(content))
        began = time.perf_counter()
        metrics = self.metrics(state, self.test(meta_params))
        test_seconds = time.perf_counter() - began
        if state.history:
            figure = figures.learning_curves(state.history, config.score)
            figures.save(figure, directory.path / "learning.png")
        config.draw(self, meta_params, directory.path)
        directory.end(
            config,
            estimator=type(config.estimator).__name__,
            method=config.method,
            metrics=metrics,
            paper=config.published(),
            tasks=self.tasks.note,
            notes=list(config.notes()),
            outer_steps=state.step,
            gradient_evaluations=state.gradient_evaluations,
            seconds=state.seconds,
            test_seconds=test_seconds,
        )
        return metrics

    def metrics(self, state: OuterState, scores: Mapping[str, Score]) -> dict[str, float]:
        """The best validation and all tests, by name; a test with the half of its interval."""
        name = self.config.score
        watched = [
            float(row[f"validation_{name}"]) for row in state.history if f"validation_{name}" in row
        ]
        pick = max if self.config.best == "highest" else min
        found = {f"validation_{name}": pick(watched)} if watched else {}
        for statistics, score in scores.items():
            test = "test" if statistics == "query" else f"test_{statistics}_statistics"
            found |= {f"{test}_{name}": score.mean, f"{test}_{name}_interval": score.interval}
        return found


def run(config: FewShot, out: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Meta-train and test in `out`, and print what was reached.

    Returns:
        The metrics by name.
    """
    torch.set_num_threads(config.threads)
    job = Job(config)
    directory = RunDirectory(out, config, resume=resume)
    for line in (job.tasks.note, *config.notes()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    metrics = job.learned(directory, resume=resume, console=console)
    console.print(make_table(config, metrics))
    return metrics


def make_table(config: FewShot, metrics: Mapping[str, float]) -> Table:
    """Every metric, a test's with its interval, the paper's beside."""
    table = Table(title=f"{config.name}, {config.label}, seed {config.seed}, scale {config.scale}")
    table.add_column("")
    table.add_column("reached", justify="right")
    published = config.published()
    if published is not None:
        table.add_column("in the paper", justify="right")
    for name, value in metrics.items():
        if name.endswith("_interval"):
            continue
        said = f"{value:.4g}"
        if (interval := metrics.get(f"{name}_interval")) is not None:
            said += f" ± {interval:.2g} ({config.test_tasks} tasks)"
        cells = [words(name), said]
        if published is not None:
            paper = published.get(name)
            spread = published.get(f"{name}_standard_deviation")
            cells.append("" if paper is None else f"{paper} ± {spread}")
        table.add_row(*cells)
    return table
