"""Learning a regularisation strength for every weight: settings, trainer and table of results."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import Module

from equigrad.estimators import (
    T1T2,
    Contrastive,
    Estimator,
)
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import Experiment, one_of, one_or_many
from equigrad.experiments.runs.formats import as_rich, spread, with_error
from equigrad.experiments.runs.methods import LABELS, OTHERS, EstimatorName, other
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.runs.training import run_to_end
from equigrad.fields import Count, CountFrom0, NotNegative, Positive, Threads, require
from equigrad.problems import Params
from equigrad.solvers import Solver
from equigrad.training import (
    Callback,
    pick_device,
    pick_dtype,
)
from equigrad.training.files import save_tensors
from equigrad.training.split import Split
from equigrad.training.strengths import (
    Learned,
    Recipe,
    StrengthLearner,
    with_nudged,
)
from equigrad.training.targets import Classes, Target

if TYPE_CHECKING:
    from equigrad.experiments.runs.model import Model


@dataclass(frozen=True)
class Published:
    """Accuracies in the paper in percent: mean and standard error over seeds."""

    validation: tuple[float, float]
    test: tuple[float, float]

    def numbers(self) -> dict[str, float]:
        """Accuracies by name, as results have them."""
        return {
            f"{part}_accuracy{suffix}": value
            for part in ("validation", "test")
            for suffix, value in zip(("", "_standard_error"), getattr(self, part), strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class StrengthExperiment(Experiment, ABC):
    """Learn a regularisation strength for every weight of a network: settings, data and model."""

    per: ClassVar[str] = "weight"
    """The parameters that have strengths of their own."""

    tuning_seed: ClassVar[int] = 100
    """Seed of the split in a search; tables use seeds 0, 1 …, so none is tested on this split."""

    seed: CountFrom0 = 0
    """Seed of the split and of the network's initialisation."""

    seeds: Count | None = None
    """Run seeds 0, 1 … N-1 instead and print mean ± standard error."""

    estimator: EstimatorName = "contrastive"
    """The estimator whose strengths are saved and drawn."""

    other: Estimator | None = None
    """Settings of the estimator, if it is neither the contrastive rule nor T1–T2."""

    compare: bool = True
    """Also compute the other rows of the table."""

    outer_steps: Count = 100
    """Number of Adam's steps on the strengths."""

    initial_strength: NotNegative | None = 1e-3
    """Initial value of all strengths, clamped at zero later; None for the best single strength."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_or_many(self.seed, self.seeds)
        require(
            self.other is None or type(self.other).__name__ == OTHERS.get(self.estimator),
            f"other={type(self.other).__name__}(…) has the knobs of another estimator than "
            f"{self.estimator!r}, which learns the strengths",
        )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The default settings for `scale`, `setting` and `estimator`."""
        defaults = cls._preset(**chosen)
        if "estimator" not in chosen:
            return defaults
        name = one_of(get_args(EstimatorName), "estimator", chosen["estimator"])
        if name in OTHERS:
            return replace(defaults, estimator=name, other=other(name))
        return defaults

    @classmethod
    @abstractmethod
    def _preset(cls, **chosen: str) -> Self:
        """The default settings for all choices but `estimator`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the data set."""

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The data of this seed, including a test set."""

    @abstractmethod
    def network(self, split: Split) -> Module:
        """The network for these data, initialised by torch's generator."""

    @abstractmethod
    def recipe(self, name: EstimatorName) -> Recipe:
        """The settings with which an estimator learns the strengths."""

    def model(self, split: Split, params: Params) -> "Model | None":
        """The model for `equigrad predict`; None if the experiment saves none."""
        return None

    def trainer(self, seed: int) -> "StrengthTrainer":
        """The trainer for the data of a seed."""
        return StrengthTrainer(self, seed)

    def another(self, name: EstimatorName) -> Estimator:
        """An estimator that is neither the contrastive rule nor T1–T2."""
        return self.other or other(name)

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Size of a mini-batch for training and for validation; None to use all rows at once."""
        return None, None

    def label(self, name: str) -> str:
        """The name of a method in tables and figures."""
        return LABELS[name].replace("per weight", f"per {self.per}")

    def published(self, name: str) -> Published | None:
        """The paper's result for a row of the table."""
        return None


@dataclass(frozen=True, kw_only=True)
class LearningAlike(StrengthExperiment):
    """Settings with which any estimator learns strengths in the same way, for any data."""

    outer_lr: Positive
    """Adam's step size."""

    solver: Solver
    """How the network is trained (the free phase), from the same start each time."""

    contrastive: Contrastive
    """The contrastive rule; its nudged phases use the free phase's solver, but their own length."""

    nudged_steps: Count = 100
    """Number of steps of each nudged phase."""

    threads: Threads = 1

    def recipe(self, name: EstimatorName) -> Recipe:
        """The settings of an estimator, the same for all."""
        if name == "contrastive":
            estimator = with_nudged(self.contrastive, self.solver, self.nudged_steps)
        else:
            estimator = T1T2() if name == "t1t2" else self.another(name)
        return Recipe(estimator, self.solver, self.outer_lr)


@dataclass(frozen=True)
class ScoreAndCost:
    """A row of the table: the scores on validation and test data, and the cost."""

    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


class StrengthTrainer(StrengthLearner):
    """One seed's data, network and losses, shared by all rows of the table."""

    def __init__(self, config: StrengthExperiment, seed: int) -> None:
        self.config = replace(config, seed=seed, seeds=None)
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        split = self.config.load(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.config.network(split).to(device, dtype)
        super().__init__(network, split, seed=seed, batch_sizes=self.config.batch_sizes())

    def row(
        self, metrics: Mapping[str, float], gradient_evaluations: int, seconds: float
    ) -> ScoreAndCost:
        """The row of the table for these metrics."""
        score = self.split.target.score
        return ScoreAndCost(
            metrics[f"validation_{score}"], metrics[f"test_{score}"], gradient_evaluations, seconds
        )

    def one_strength(self, *strengths: float) -> tuple[ScoreAndCost, float]:
        """The best of several single strengths by the validation data."""
        began = time.perf_counter()
        solver = self.config.recipe("contrastive").solver
        best, strength = self.best_single(solver, *([strengths] if strengths else []))
        seconds = time.perf_counter() - began
        return self.row(best.metrics, best.gradient_evaluations, seconds), strength

    def baselines(self) -> dict[str, Any]:
        """The rows for no regularisation and the best single strength, as JSON holds them."""
        unregularised, _ = self.one_strength(0.0)
        single, strength = self.one_strength()
        rows = {"unregularised": vars(unregularised), "single": vars(single)}
        return {"rows": rows, "best_single_strength": strength}

    def learn(
        self, name: EstimatorName, callbacks: Sequence[Callback] = (), *, watched: bool = True
    ) -> tuple[Learned, ScoreAndCost]:
        """Learn a strength for every weight by an estimator, with the experiment's settings."""
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
    ) -> ScoreAndCost:
        """Learn a strength for every weight, and write the run's files into its directory."""
        label = f"seed {self.seed} {name}"
        result = run_to_end(
            directory,
            self.config,
            label,
            lambda callbacks: self.learn_and_save(name, directory.path, callbacks, console),
            resume=resume,
            console=console,
        )
        return self.row(result["metrics"], result["gradient_evaluations"], result["seconds"])

    def learn_and_save(
        self, name: EstimatorName, folder: Path, callbacks: Sequence[Callback], console: Console
    ) -> dict[str, Any]:
        """Learn strengths; save them, the model and a figure; return the results by name."""
        learned, row = self.learn(name, callbacks)
        state, network = learned.state, learned.network
        console.print(f"seed {self.seed} {name}: {state.history[-1]['status']}", highlight=False)
        meta_params = {n: m.detach() for n, m in state.meta_params.items()}
        save_tensors(folder / "learned.pt", {"params": network.params, "meta_params": meta_params})
        if (model := self.config.model(self.split, network.params)) is not None:
            model.save(folder)
        figures.strength_learning(
            folder / "strengths.png",
            history=[*state.history, {"outer_step": self.config.outer_steps, **network.metrics}],
            strengths={
                n: learned.strengths[n].cpu().expand(p.shape)
                for n, p in self.network.named_parameters()
            },
            title=f"{self.config.label(name)}, seed {self.seed}",
            target=self.split.target,
            inputs=self.split.inputs,
        )
        published = self.config.published(name)
        more: dict[str, Any] = {} if learned.single is None else {"single_strength": learned.single}
        if self.split.encoding is not None:
            more["data"] = self.split.note.splitlines()
        return more | {
            "estimator": name,
            "metrics": network.metrics,
            "paper": None if published is None else published.numbers(),
            "outer_steps": state.step,
            "gradient_evaluations": row.gradient_evaluations,
            "seconds": row.seconds,
        }


def learn_strengths(
    config: StrengthExperiment, out: Path, *, resume: bool, console: Console
) -> dict[str, list[ScoreAndCost]]:
    """Run one seed in `out`, or several in `out/seed-N`, and print the table.

    Returns:
        The rows of the table by name, one a seed.
    """
    torch.set_num_threads(config.threads)
    seeds = [config.seed] if config.seeds is None else list(range(config.seeds))
    whole = None if config.seeds is None else RunDirectory(out, config, resume=resume)
    rows: dict[str, list[ScoreAndCost]] = {}
    target: Target = Classes()
    for seed in seeds:
        trainer = config.trainer(seed)
        target = trainer.split.target
        folder = out if whole is None else out / f"seed-{seed}"
        directory = RunDirectory(folder, trainer.config, resume=resume)
        for name, row in run_seed(trainer, directory, resume=resume, console=console).items():
            rows.setdefault(name, []).append(row)
    console.print(scores_table(config, rows, target))
    if whole is not None:
        summary = {name: [vars(row) for row in each] for name, each in rows.items()}
        whole.write_json("summary.json", summary)
    return rows


def run_seed(
    trainer: StrengthTrainer, directory: RunDirectory, *, resume: bool, console: Console
) -> dict[str, ScoreAndCost]:
    """All rows of the table for one seed."""
    config = trainer.config
    if trainer.split.note:
        said = f"seed {config.seed}: {config.outer_steps} outer steps; {trainer.split.note}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if trainer.split.encoding is not None:  # of files that may change under a run
        directory.keep_to_data(trainer.split.digest)
    rows: dict[str, ScoreAndCost] = {}
    if config.compare:
        baselines = directory.read_json("baselines.json")
        if baselines is None:
            with console.status(f"seed {config.seed}: no strength, then single strengths"):
                baselines = trainer.baselines()
            directory.write_json("baselines.json", baselines)
        rows |= {name: ScoreAndCost(**row) for name, row in baselines["rows"].items()}
        strength = baselines["best_single_strength"]
        console.print(f"seed {config.seed} best single strength {strength:.3g}", highlight=False)
        second: EstimatorName = "t1t2" if config.estimator == "contrastive" else "contrastive"
        beside = RunDirectory(
            directory.path / second, replace(config, estimator=second, other=None), resume=resume
        )
        rows[second] = trainer.learned(second, beside, resume=resume, console=console)
    rows[config.estimator] = trainer.learned(
        config.estimator, directory, resume=resume, console=console
    )
    if config.compare:
        directory.write_json("table.json", {name: vars(row) for name, row in rows.items()})
    return {name: rows[name] for name in LABELS if name in rows}


def scores_table(
    config: StrengthExperiment, rows: Mapping[str, Sequence[ScoreAndCost]], target: Target
) -> Table:
    """Mean ± standard error over seeds; one number where there is one seed."""
    last = (config.seeds or 1) - 1
    seeds = f"seeds 0–{last}" if last else f"seed {config.seed}"
    lines = []
    for name, each in rows.items():
        scores = ([row.validation for row in each], [row.test for row in each])
        lines.append(
            [
                config.label(name),
                *(spread(values, target.form) for values in scores),
                format(round(fmean(row.gradient_evaluations for row in each)), ","),
                format(fmean(row.seconds for row in each), ".1f"),
            ]
        )
        if (paper := config.published(name)) is not None:
            published = (with_error(*part, ".2f") for part in (paper.validation, paper.test))
            lines.append(["  in the paper", *published])
    return as_rich(
        f"{config.name}, {seeds}, scale {config.scale}: {target.axis} and cost",
        [f"validation {target.unit}", f"test {target.unit}", "gradients", "seconds"],
        lines,
    )
