"""What the experiments share that learn a regularisation strength for every weight."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Module

from equigrad.errors import ConfigurationError
from equigrad.estimators import (
    T1T2,
    Contrastive,
    Estimator,
)
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import Experiment, at_least, one_of, one_or_many, positive
from equigrad.experiments.runs.formats import mean_and_error, with_error
from equigrad.experiments.runs.methods import LABELS, OTHERS, EstimatorName
from equigrad.experiments.runs.model import Model
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.runs.watching import watching
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.training import (
    Callback,
    pick_device,
    pick_dtype,
)
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.split import Split
from equigrad.training.strengths import (
    SINGLE_STRENGTHS,
    Learned,
    Recipe,
    StrengthLearner,
    with_nudged,
)
from equigrad.training.targets import Classes, Target


@dataclass(frozen=True)
class Published:
    """Accuracies of the paper in percent: mean and standard error over its seeds."""

    validation: tuple[float, float]
    test: tuple[float, float]

    def numbers(self) -> dict[str, float]:
        """By name, as results have them."""
        return {
            f"{part}_accuracy{suffix}": value
            for part in ("validation", "test")
            for suffix, value in zip(("", "_standard_error"), getattr(self, part), strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class StrengthLearning(Experiment, ABC):
    """Learn a regularisation strength for every weight of a network: settings, data and model."""

    seed: int = 0
    """Draws the split and the network's start."""

    seeds: int | None = None
    """Run seeds 0, 1 … N-1 instead and print mean ± standard error."""

    estimator: EstimatorName = "contrastive"
    """What learns the strengths that are saved and drawn."""

    other: Estimator | None = None
    """The estimator's own knobs, where it is neither the contrastive rule nor T1–T2."""

    compare: bool = True
    """Run the other rows of the table too."""

    outer_steps: int = 100
    """Steps of Adam on the strengths."""

    initial_strength: float | None = 1e-3
    """Where every strength starts; None for the best single one. They are clamped at zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "outer_steps", self.outer_steps)
        one_or_many(self.seed, self.seeds)
        if self.other is not None and type(self.other) is not OTHERS.get(self.estimator):
            raise ConfigurationError(
                f"other={type(self.other).__name__}(…) has the knobs of another estimator than "
                f"{self.estimator!r}, which learns the strengths"
            )
        if self.initial_strength is not None and not self.initial_strength >= 0:
            raise ConfigurationError(
                f"initial_strength must be at least 0, got {self.initial_strength}"
            )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `scale`, `setting` and `estimator`."""
        defaults = cls._preset(**chosen)
        if "estimator" not in chosen:
            return defaults
        name = one_of(get_args(EstimatorName), "estimator", chosen["estimator"])
        if name in OTHERS:
            return replace(defaults, estimator=name, other=OTHERS[name]())
        return defaults

    @classmethod
    @abstractmethod
    def _preset(cls, **chosen: str) -> Self:
        """The defaults that all words but `estimator` choose."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What is learned, in a word."""

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The data of this seed, a test part among them."""

    @abstractmethod
    def network(self, split: Split) -> Module:
        """The network for these data, with a start that torch's generator draws."""

    @abstractmethod
    def recipe(self, name: EstimatorName) -> Recipe:
        """How an estimator learns the strengths."""

    def model(self, split: Split, params: Params) -> Model | None:
        """What `equigrad predict` needs; None where there is nothing to ask."""
        return None

    def another(self, name: EstimatorName) -> Estimator:
        """An estimator that is neither the contrastive rule nor T1–T2."""
        return self.other or OTHERS[name]()

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Rows of a mini-batch for training and for validation; None for all at once."""
        return None, None

    def published(self, name: str) -> Published | None:
        """What the paper reports of a row of the table."""
        return None


@dataclass(frozen=True, kw_only=True)
class LearningAlike(StrengthLearning):
    """Strengths learned by any estimator in the same way, whatever the data."""

    outer_lr: float
    """Adam's step size."""

    solver: GradientDescent
    """How the network learns: the free phase, from the same start each time."""

    contrastive: Contrastive
    """The contrastive rule; its nudged phases settle like the free one, but for their length."""

    nudged_steps: int = 100
    """Steps of each nudged phase."""

    threads: int = 1
    """CPU threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "nudged_steps", self.nudged_steps)
        positive("outer_lr", self.outer_lr)

    def recipe(self, name: EstimatorName) -> Recipe:
        """All estimators learn in the same way."""
        if name == "contrastive":
            estimator = with_nudged(self.contrastive, self.solver, self.nudged_steps)
        else:
            estimator = T1T2() if name == "t1t2" else self.another(name)
        return Recipe(estimator, self.solver, self.outer_lr)


@dataclass(frozen=True)
class Row:
    """A line of the table: the score on validation and test data, and what it cost."""

    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


class Job(StrengthLearner):
    """One seed's data, network and losses, shared by all rows of the table."""

    def __init__(self, config: StrengthLearning, seed: int) -> None:
        self.config = replace(config, seed=seed, seeds=None)
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        split = self.config.load(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.config.network(split).to(device, dtype)
        super().__init__(network, split, seed=seed, batch_sizes=self.config.batch_sizes())

    def row(self, metrics: Mapping[str, float], gradient_evaluations: int, seconds: float) -> Row:
        """What stands in the table of these metrics."""
        score = self.split.target.score
        return Row(
            metrics[f"validation_{score}"], metrics[f"test_{score}"], gradient_evaluations, seconds
        )

    def single(self, strengths: Sequence[float]) -> tuple[Row, float]:
        """The best of some single strengths, chosen by the validation data."""
        began = time.perf_counter()
        best, strength = self.best_single(self.config.recipe("contrastive").solver, strengths)
        seconds = time.perf_counter() - began
        return self.row(best.metrics, best.gradient_evaluations, seconds), strength

    def baselines(self) -> dict[str, Any]:
        """No regularisation, and the best single strength: rows as JSON has them."""
        unregularised, _ = self.single([0.0])
        single, strength = self.single(SINGLE_STRENGTHS)
        rows = {"unregularised": vars(unregularised), "single": vars(single)}
        return {"rows": rows, "best_single_strength": strength}

    def learn(
        self, name: EstimatorName, callbacks: Sequence[Callback] = (), *, watched: bool = True
    ) -> tuple[Learned, Row]:
        """Learn a strength for every weight, as the experiment has it for an estimator."""
        learned = self.learn_by(
            self.config.recipe(name),
            outer_steps=self.config.outer_steps,
            initial_strength=self.config.initial_strength,
            watched=watched,
            callbacks=callbacks,
        )
        metrics, evaluations = learned.network.metrics, learned.gradient_evaluations
        return learned, self.row(metrics, evaluations, learned.seconds)

    def learned(
        self, name: EstimatorName, directory: RunDirectory, *, resume: bool, console: Console
    ) -> Row:
        """Learn a strength for every weight, and leave the run in its directory."""
        if (ended := directory.result) is not None:
            return self.row(ended["metrics"], ended["gradient_evaluations"], ended["seconds"])
        learned, row = self.learn(
            name,
            watching(
                directory,
                self.config,
                f"seed {self.seed} {name}",
                resume=resume,
                console=console,
            ),
        )
        state, network = learned.state, learned.network
        console.print(f"seed {self.seed} {name}: {state.history[-1]['status']}", highlight=False)
        meta_params = {n: m.detach() for n, m in state.meta_params.items()}
        content = {"params": network.params, "meta_params": meta_params}
        write_whole(directory.path / "learned.pt", as_bytes(content))
        if (model := self.config.model(self.split, network.params)) is not None:
            write_whole(directory.path / "model.pt", as_bytes(model.plain()))
        figures.strength_learning(
            directory.path / "strengths.png",
            history=[
                *state.history,
                {"outer_step": self.config.outer_steps, **network.metrics},
            ],
            strengths={n: s.cpu() for n, s in learned.strengths.items()},
            title=f"{LABELS[name]}, seed {self.seed}",
            target=self.split.target,
            inputs=self.split.inputs,
        )
        published = self.config.published(name)
        directory.end(
            self.config,
            estimator=name,
            metrics=network.metrics,
            paper=None if published is None else published.numbers(),
            outer_steps=state.step,
            gradient_evaluations=row.gradient_evaluations,
            seconds=row.seconds,
        )
        return row


def run(
    config: StrengthLearning, out: Path, *, resume: bool, console: Console
) -> dict[str, list[Row]]:
    """Run one seed in `out`, or several in `out/seed-N`, and print the table.

    Returns:
        The rows of the table by name, one a seed.
    """
    torch.set_num_threads(config.threads)
    seeds = [config.seed] if config.seeds is None else list(range(config.seeds))
    whole = None if config.seeds is None else RunDirectory(out, config, resume=resume)
    rows: dict[str, list[Row]] = {}
    target: Target = Classes()
    for seed in seeds:
        job = Job(config, seed)
        target = job.split.target
        folder = out if whole is None else out / f"seed-{seed}"
        directory = RunDirectory(folder, job.config, resume=resume)
        for name, row in run_seed(job, directory, resume=resume, console=console).items():
            rows.setdefault(name, []).append(row)
    console.print(make_table(config, rows, target))
    if whole is not None:
        summary = {name: [vars(row) for row in each] for name, each in rows.items()}
        whole.write_json("summary.json", summary)
    return rows


def run_seed(
    job: Job, directory: RunDirectory, *, resume: bool, console: Console
) -> dict[str, Row]:
    """All rows of the table for one seed."""
    config = job.config
    if job.split.note:
        said = f"seed {config.seed}: {config.outer_steps} outer steps; {job.split.note}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if job.split.encoding is not None:  # of files that may change under a run
        directory.keep_to_data(job.split.digest)
    rows: dict[str, Row] = {}
    if config.compare:
        baselines = directory.read_json("baselines.json")
        if baselines is None:
            baselines = job.baselines()
            directory.write_json("baselines.json", baselines)
        rows |= {name: Row(**row) for name, row in baselines["rows"].items()}
        strength = baselines["best_single_strength"]
        console.print(f"seed {config.seed} best single strength {strength:.3g}", highlight=False)
        second: EstimatorName = "t1t2" if config.estimator == "contrastive" else "contrastive"
        beside = RunDirectory(
            directory.path / second, replace(config, estimator=second, other=None), resume=resume
        )
        rows[second] = job.learned(second, beside, resume=resume, console=console)
    rows[config.estimator] = job.learned(
        config.estimator, directory, resume=resume, console=console
    )
    if config.compare:
        directory.write_json("table.json", {name: vars(row) for name, row in rows.items()})
    return {name: rows[name] for name in LABELS if name in rows}


def make_table(config: StrengthLearning, rows: dict[str, list[Row]], target: Target) -> Table:
    """Mean ± standard error over seeds; one number where there is one seed."""
    last = (config.seeds or 1) - 1
    seeds = f"seeds 0–{last}" if last else f"seed {config.seed}"
    table = Table(title=f"{config.name}, {seeds}, scale {config.scale}: {target.axis} and cost")
    table.add_column("")
    for name in (f"validation {target.unit}", f"test {target.unit}", "gradients", "seconds"):
        table.add_column(name, justify="right")
    for name, each in rows.items():

        def column(read: Callable[[Row], float], each: list[Row] = each) -> str:
            return with_error(*mean_and_error([read(row) for row in each]), target.form)

        table.add_row(
            LABELS[name],
            column(lambda row: row.validation),
            column(lambda row: row.test),
            format(round(fmean(row.gradient_evaluations for row in each)), ","),
            format(fmean(row.seconds for row in each), ".1f"),
        )
        if (paper := config.published(name)) is not None:
            table.add_row(
                "  in the paper",
                with_error(*paper.validation, ".2f"),
                with_error(*paper.test, ".2f"),
            )
    return table
