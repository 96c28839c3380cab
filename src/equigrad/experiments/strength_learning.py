"""What the experiments share that learn a regularisation strength for every weight."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy

from equigrad.data.images import Split
from equigrad.errors import ConfigurationError
from equigrad.estimators import (
    GMRES,
    ConjugateGradient,
    Contrastive,
    Estimator,
    EvolutionStrategies,
    ExactSolve,
    FiniteDifferenceT1T2,
    ForwardMode,
    NeumannSeries,
    Nystrom,
    Unrolled,
)
from equigrad.evaluation import Evaluation
from equigrad.experiments import figures
from equigrad.experiments.run_directory import RunDirectory, versions
from equigrad.nn import ComplexSynapse
from equigrad.problem import Bilevel, Params
from equigrad.solvers import GradientDescent, Solver
from equigrad.training import (
    Callback,
    Checkpoint,
    JsonLines,
    OuterState,
    TensorBoard,
    learn,
    pick_device,
    pick_dtype,
)
from equigrad.training.device import DeviceName, DtypeName
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.progress import ProgressBar

EstimatorName = Literal[
    "contrastive",
    "t1t2",
    "finite-difference-t1t2",
    "neumann-series",
    "conjugate-gradient",
    "gmres",
    "nystrom",
    "exact-solve",
    "unrolled",
    "forward-mode",
    "evolution-strategies",
]
OTHERS: dict[EstimatorName, type[Estimator]] = {
    "finite-difference-t1t2": FiniteDifferenceT1T2,
    "neumann-series": NeumannSeries,
    "conjugate-gradient": ConjugateGradient,
    "gmres": GMRES,
    "nystrom": Nystrom,
    "exact-solve": ExactSolve,
    "unrolled": Unrolled,
    "forward-mode": ForwardMode,
    "evolution-strategies": EvolutionStrategies,
}
"""Estimators beside the two that the paper compares."""

ScaleName = Literal["smoke", "small", "paper"]
LABELS = {
    "unregularised": "unregularised",
    "single": "best single strength",
    **{name: f"per weight, {other.__name__}" for name, other in OTHERS.items()},
    "t1t2": "per weight, T1–T2",
    "contrastive": "per weight, contrastive",
}
SINGLE_STRENGTHS = [10 ** (k / 2) for k in range(-10, 3)]


@dataclass(frozen=True)
class Recipe:
    """How an estimator learns the strengths.

    Attributes:
        estimator: of the meta-gradient.
        solver: how the network learns: the free phase, from the same start each time.
        outer_lr: Adam's step size on the strengths.
    """

    estimator: Estimator
    solver: GradientDescent
    outer_lr: float


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
class StrengthLearning(ABC):
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

    scale: ScaleName = "small"
    """`smoke` presets a few short steps, to see that all works, `paper` what the paper did."""

    outer_steps: int = 100
    """Steps of Adam on the strengths."""

    initial_strength: float = 1e-3
    """Where every strength starts; strengths are clamped at zero."""

    checkpoint_every: int = 5
    """Outer steps between two checkpoints."""

    device: DeviceName = "auto"
    """Where to compute; `auto` takes CUDA where there is any."""

    dtype: DtypeName = "float32"
    """Floating-point type."""

    threads: int = 1
    """CPU threads."""

    def __post_init__(self) -> None:
        for name, least in (
            ("outer_steps", 1),
            ("checkpoint_every", 1),
            ("seed", 0),
            ("threads", 1),
        ):
            at_least(least, name, getattr(self, name))
        if self.seeds is not None and self.seeds < 1:
            raise ConfigurationError(f"seeds must be at least 1, got {self.seeds}")
        if self.seeds is not None and self.seed != 0:
            raise ConfigurationError(
                f"give seed={self.seed} for one run, or seeds={self.seeds} for seeds 0 to "
                f"{self.seeds - 1}, not both"
            )
        if self.other is not None and type(self.other) is not OTHERS.get(self.estimator):
            raise ConfigurationError(
                f"other={type(self.other).__name__}(…) has the knobs of another estimator than "
                f"{self.estimator!r}, which learns the strengths"
            )
        if not self.initial_strength >= 0:
            raise ConfigurationError(
                f"initial_strength must be at least 0, got {self.initial_strength}"
            )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `scale`, `setting` and `estimator`."""
        defaults = cls._preset(**chosen)
        for name, kind in OTHERS.items():
            if name == chosen.get("estimator"):
                return replace(defaults, estimator=name, other=kind())
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
        """The images of this seed."""

    @abstractmethod
    def network(self) -> Module:
        """The network, before anything is drawn from the seed but its start."""

    @abstractmethod
    def recipe(self, name: EstimatorName) -> Recipe:
        """How an estimator learns the strengths."""

    def another(self, name: EstimatorName) -> Estimator:
        """An estimator that is neither the contrastive rule nor T1–T2."""
        return self.other or OTHERS[name]()

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Images of a mini-batch for training and for validation; None for all at once."""
        return None, None

    def published(self, name: str) -> Published | None:
        """What the paper reports of a row of the table."""
        return None


def at_least(least: int, name: str, value: int) -> None:
    """Raise a `ConfigurationError` where a number is too small."""
    if value < least:
        raise ConfigurationError(f"{name} must be at least {least}, got {value}")


def positive(name: str, value: float) -> None:
    """Raise a `ConfigurationError` unless a number is positive and finite."""
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"{name} must be positive, got {value}")


def with_nudged(rule: Contrastive, solver: GradientDescent, steps: int) -> Contrastive:
    """The rule, with nudged phases of so many steps of a solver unless it says how they settle."""
    if rule.nudged_solver is not None or rule.rtol is not None:
        return rule
    return replace(rule, nudged_solver=replace(solver, max_steps=steps))


@dataclass(frozen=True)
class Row:
    """A line of the table: accuracies in percent."""

    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True)
class Learned:
    """What was learned, and what it is worth when the network learns with it once more."""

    row: Row
    state: OuterState
    params: dict[str, Tensor]
    strengths: dict[str, Tensor]


class Job:
    """One seed's data, network and losses, shared by all rows of the table."""

    def __init__(self, config: StrengthLearning, seed: int) -> None:
        self.config, self.seed = replace(config, seed=seed, seeds=None), seed
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.split = self.config.load(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = self.config.network().to(device, dtype)

    def problem(self, synapse: ComplexSynapse) -> Bilevel:
        """Training loss plus the strengths' penalty inside, validation loss outside."""

        def loss(params: Params, meta_params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return cross_entropy(synapse(params, x), y)

        inner, outer = self.config.batch_sizes()
        return Bilevel(
            inner_loss=loss,
            outer_loss=loss,
            regularizer=synapse,
            inner_batches=batches(*self.split.train, inner),
            outer_batches=batches(*self.split.validation, outer),
        )

    def accuracy(self, synapse: ComplexSynapse, params: Params) -> dict[str, float]:
        """Validation and test accuracy in percent."""
        found = {}
        with torch.no_grad():
            for name in ("validation", "test"):
                x, y = getattr(self.split, name)
                right = synapse(params, x).argmax(1) == y
                found[f"{name}_accuracy"] = 100 * right.double().mean().item()
        return found

    def settle(
        self, solver: Solver, *, strength: float = 0.0, meta_params: Params | None = None
    ) -> tuple[dict[str, float], dict[str, Tensor], int]:
        """Learn at fixed strengths: accuracies, weights, evaluations."""
        synapse = ComplexSynapse(self.network, strength=strength)
        meta_params = meta_params or synapse.meta_params()
        with Evaluation(self.problem(synapse), synapse.params(), meta_params) as evaluation:
            settled = evaluation.settle(solver)
        evaluations = evaluation.gradient_evaluations
        return self.accuracy(synapse, settled.params), settled.params, evaluations

    def single(self, strengths: Sequence[float]) -> tuple[Row, float]:
        """The best of some single strengths, chosen by validation accuracy."""
        began, tried, evaluations = time.perf_counter(), [], 0
        solver = self.config.recipe("contrastive").solver
        for strength in strengths:
            accuracy, _, count = self.settle(solver, strength=strength)
            tried.append((accuracy["validation_accuracy"], accuracy["test_accuracy"], strength))
            evaluations += count
        best = max(tried, key=lambda entry: entry[0])
        return Row(best[0], best[1], evaluations, time.perf_counter() - began), best[2]

    def baselines(self) -> dict[str, Any]:
        """No regularisation, and the best single strength: rows as JSON has them."""
        unregularised, _ = self.single([0.0])
        single, strength = self.single(SINGLE_STRENGTHS)
        rows = {"unregularised": vars(unregularised), "single": vars(single)}
        return {"rows": rows, "best_single_strength": strength}

    def learn(
        self, name: EstimatorName, callbacks: Sequence[Callback] = (), *, watched: bool = True
    ) -> Learned:
        """Learn a strength for every weight; watched, with the accuracy of every outer step."""
        recipe = self.config.recipe(name)
        synapse = ComplexSynapse(self.network, strength=self.config.initial_strength)
        meta_params = synapse.meta_params()
        torch.manual_seed(self.seed)
        state = learn(
            self.problem(synapse),
            synapse.params(),
            meta_params,
            solver=recipe.solver,
            estimator=recipe.estimator,
            optimizer=torch.optim.Adam(meta_params.values(), lr=recipe.outer_lr),
            steps=self.config.outer_steps,
            project=synapse.project_,
            evaluate=(lambda params: self.accuracy(synapse, params)) if watched else None,
            callbacks=callbacks,
        )
        # what the last step of the strengths is worth: learn once more
        accuracy, params, evaluations = self.settle(recipe.solver, meta_params=meta_params)
        row = Row(
            accuracy["validation_accuracy"],
            accuracy["test_accuracy"],
            state.gradient_evaluations + evaluations,
            state.seconds,
        )
        strengths = {n: s.detach() for n, s in synapse.strengths(meta_params).items()}
        return Learned(row, state, params, strengths)

    def learned(
        self, name: EstimatorName, directory: RunDirectory, *, resume: bool, console: Console
    ) -> Row:
        """Learn a strength for every weight, and leave the run in its directory."""
        if (ended := directory.result) is not None:
            return Row(
                ended["metrics"]["validation_accuracy"],
                ended["metrics"]["test_accuracy"],
                ended["gradient_evaluations"],
                ended["seconds"],
            )
        learned = self.learn(
            name,
            [
                Checkpoint(
                    directory.path / "checkpoint.pt",
                    self.config.checkpoint_every,
                    resume=resume,
                    identity=directory.identity,
                ),
                JsonLines(directory.path / "metrics.jsonl"),
                TensorBoard(directory.path),
                ProgressBar(f"seed {self.seed} {name}", console),
            ],
        )
        state, row = learned.state, learned.row
        console.print(f"seed {self.seed} {name}: {state.history[-1]['status']}", highlight=False)
        accuracy = {"validation_accuracy": row.validation, "test_accuracy": row.test}
        meta_params = {n: m.detach() for n, m in state.meta_params.items()}
        write_whole(
            directory.path / "learned.pt",
            as_bytes({"params": learned.params, "meta_params": meta_params}),
        )
        figures.strength_learning(
            directory.path / "strengths.png",
            history=[*state.history, {"outer_step": self.config.outer_steps, **accuracy}],
            strengths={n: s.cpu() for n, s in learned.strengths.items()},
            title=f"{LABELS[name]}, seed {self.seed}",
        )
        published = self.config.published(name)
        directory.write_json(
            "result.json",
            {
                "experiment": type(self.config).__name__.lower(),
                "estimator": name,
                "seed": self.seed,
                "scale": self.config.scale,
                "metrics": accuracy,
                "paper": None if published is None else published.numbers(),
                "outer_steps": state.step,
                "gradient_evaluations": row.gradient_evaluations,
                "seconds": row.seconds,
                "device": str(pick_device(self.config.device)),
                "versions": versions(),
            },
        )
        return row


def batches(x: Tensor, y: Tensor, size: int | None) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches of at most `size` images that differ in length by one at most.

    Example:
        >>> [len(y) for _, y in batches(torch.zeros(7, 2), torch.arange(7), 3)]
        [3, 2, 2]
    """
    count = 1 if size is None else -(-len(y) // size)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


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
    for seed in seeds:
        one = replace(config, seed=seed, seeds=None)
        folder = out if whole is None else out / f"seed-{seed}"
        directory = RunDirectory(folder, one, resume=resume)
        for name, row in run_seed(one, directory, resume=resume, console=console).items():
            rows.setdefault(name, []).append(row)
    console.print(make_table(config, rows))
    if whole is not None:
        summary = {name: [vars(row) for row in each] for name, each in rows.items()}
        whole.write_json("summary.json", summary)
    return rows


def run_seed(
    config: StrengthLearning, directory: RunDirectory, *, resume: bool, console: Console
) -> dict[str, Row]:
    """All rows of the table for one seed."""
    job = Job(config, config.seed)
    if job.split.note:
        said = f"seed {config.seed}: {job.split.note}; {config.outer_steps} outer steps"
        console.print(said, highlight=False, soft_wrap=True)
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


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard error where there are several values.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None
    return mean, float(np.std(values, ddof=1) / np.sqrt(len(values)))


def with_error(mean: float, error: float | None, form: str = ".2f") -> str:
    """`mean ± error`, or the mean alone."""
    return format(mean, form) if error is None else f"{mean:{form}} ± {error:.2f}"


def make_table(config: StrengthLearning, rows: dict[str, list[Row]]) -> Table:
    """Mean ± standard error over seeds; one number where there is one seed."""
    last = (config.seeds or 1) - 1
    seeds = f"seeds 0–{last}" if last else f"seed {config.seed}"
    table = Table(title=f"{config.name}, {seeds}, scale {config.scale}: accuracy and cost")
    table.add_column("")
    for name in ("validation %", "test %", "gradients", "seconds"):
        table.add_column(name, justify="right")
    for name, each in rows.items():

        def column(read: Callable[[Row], float], each: list[Row] = each) -> str:
            return with_error(*mean_and_error([read(row) for row in each]))

        table.add_row(
            LABELS[name],
            column(lambda row: row.validation),
            column(lambda row: row.test),
            format(round(np.mean([row.gradient_evaluations for row in each])), ","),
            format(np.mean([row.seconds for row in each]), ".1f"),
        )
        if (paper := config.published(name)) is not None:
            table.add_row("  in the paper", with_error(*paper.validation), with_error(*paper.test))
    return table
