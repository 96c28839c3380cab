"""The sinusoid experiment: few-shot regression of sine curves (Finn et al. 2017)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn import Module
from torch.nn.functional import mse_loss

from equigrad.estimators import Contrastive, Estimator
from equigrad.experiments.few_shot.harness import (
    TEST,
    VALIDATION,
    FewShot,
    Tasks,
)
from equigrad.experiments.few_shot.meta_training import MetaTrainer, meta_train
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.experiments.few_shot.task_figures import adaptation_curves, sinusoid_fits
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import one_or_many
from equigrad.experiments.runs.formats import as_rich, mean_and_error, spread, with_error
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.fields import Count, CountFrom0, CountFrom2, NotNegative, Positive, require
from equigrad.nn import tanh_network
from equigrad.nn.side_by_side import Batching
from equigrad.problems import Params
from equigrad.solvers import GradientDescent
from equigrad.tasks import Sinusoids, TaskBatch
from equigrad.training.few_shot import judge, mean_squared_error
from equigrad.training.files import write_whole

CURVE_RULE = Contrastive(beta=0.1, scheme="symmetric", nudge="force", error=False)

CURVE_SOLVER = GradientDescent(lr=0.02, max_steps=10)

OWN: dict[FewShotMethodName, dict[str, Any]] = {
    "contrastive-synaptic": {},
    "imaml": {"strength": 1.0},
    "maml": {"solver": replace(CURVE_SOLVER, max_steps=5)},
    "first-order-maml": {"solver": replace(CURVE_SOLVER, max_steps=5)},
    "reptile": {},
    "scratch": {},
}
"""Settings of methods that differ from the defaults; docs/sinusoid.md says how they were chosen."""

LOOKS = (0, 1, 2, 5, 10, 20, 50)
"""Numbers of adaptation steps at which the figure shows the test error."""


@dataclass(frozen=True, kw_only=True)
class Sinusoid(FewShot):
    """Learn from many sinusoids how to learn a new one from ten of its points.

    Every task is a curve A sin(x - p), of which a tanh network knows a few points. The contrastive
    rule meta-learns the weights that a task's own are pulled to. Beside it: MAML, first-order MAML,
    implicit MAML, Reptile and a random start, each with the same network, tasks and number of
    them, and with settings of its own.
    """

    score: ClassVar[str] = "mean_squared_error"
    best: ClassVar[Literal["highest", "lowest"]] = "lowest"
    metric = staticmethod(mean_squared_error)
    loss = staticmethod(mse_loss)

    # other defaults than those of FewShot, which says what they mean
    method: FewShotMethodName = "contrastive-synaptic"
    solver: GradientDescent = CURVE_SOLVER
    outer_steps: Count = 1000
    outer_lr: Positive = 0.01
    tasks: Count = 25
    test_steps: Count | None = 50
    average_from: CountFrom0 | None = 600
    validation_tasks: CountFrom2 = 200
    batching: Batching = "grouped"
    threads: Count = 1

    scale: Literal["smoke", "small"] = "small"
    """`smoke` presets a few short steps, for a quick check that everything works."""

    seeds: Count | None = None
    """Run seeds 0, 1 … N-1 instead and print mean ± standard error."""

    compare: bool = True
    """Also run the other methods."""

    hidden: tuple[Count, ...] = (40, 40)
    """Widths of the hidden layers."""

    estimator: Estimator = CURVE_RULE
    """Estimator of the meta-gradient; its class is preset by the method."""

    nudged_steps: Count = 20
    """Number of steps of each nudged phase of the contrastive rule."""

    strength: NotNegative = 0.01
    """λ, which pulls weights to their meta-learned centre (in contrastive-synaptic and imaml)."""

    shot: Count = 10
    """Number of support points of a task."""

    queries: Count = 10
    """Number of query points of a task in meta-training."""

    test_queries: Count = 50
    """Number of query points of a task in validation and test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.method in OWN,
            f"the network of sinusoids has no normalisation layer to modulate, so method must "
            f"be one of {', '.join(OWN)}, got {self.method!r}",
        )
        one_or_many(self.seed, self.seeds)

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The default settings for `method` and `scale`."""
        return super().preset(**{"method": cls.method, **chosen})

    @classmethod
    def _preset(cls, method: FewShotMethodName, **chosen: str) -> Self:
        """The default settings of a method and a scale."""
        small = cls(**OWN.get(method, {}))
        if chosen.get("scale") != "smoke":
            return small
        return replace(
            small,
            scale="smoke",
            solver=replace(small.solver, max_steps=2),
            nudged_steps=2,
            outer_steps=4,
            average_from=2,
            tasks=3,
            test_steps=3,
            validate_every=2,
            validation_tasks=4,
            test_tasks=6,
        )

    def of(self, method: FewShotMethodName, seed: int) -> Self:
        """The run of a method: the same tasks and network, with the method's own settings."""
        own = self
        if method != self.method:
            own = type(self).preset(method=method, scale=self.scale)
        return replace(
            self,
            method=method,
            seed=seed,
            seeds=None,
            compare=False,
            solver=own.solver,
            estimator=own.estimator,
            nudged_steps=own.nudged_steps,
            strength=own.strength,
            outer_lr=own.outer_lr,
        )

    @property
    def name(self) -> str:
        """The name of the tasks and their number of points."""
        return f"sinusoids from {self.shot} points"

    def network(self) -> Module:
        """One input, tanh layers, one output."""
        return tanh_network(1, self.hidden, 1)

    def sources(self, device: torch.device, dtype: torch.dtype) -> Tasks:
        """Curves of the seed, and those for validation and test, the same for all seeds."""

        def curves(seed: int, queries: int) -> Sinusoids:
            return Sinusoids(shots=self.shot, queries=queries, seed=seed)

        low, high = Sinusoids().amplitude
        return Tasks(
            train=curves(self.seed, self.queries),
            validation=curves(VALIDATION, self.test_queries),
            test=curves(TEST, self.test_queries),
            note=(
                f"curves A sin(x - p), A from {low:g} to {high:g}, p from 0 to π, x from -5 to 5; "
                f"{self.shot} points known of each"
            ),
        )

    def draw(self, trainer: MetaTrainer, meta_params: Params, folder: Path) -> None:
        """Draw four test curves before and after adaptation, and the error at each step."""
        like = next(iter(meta_params.values()))
        batch = trainer.tasks.test.sample(4, 0).to(like.device, like.dtype)
        grid = torch.linspace(-5, 5, 201).to(batch.support[0])
        points = grid.reshape(1, -1, 1).expand(len(batch), -1, -1)
        asked = TaskBatch(batch.support, (points, points))
        before, after = (
            trainer.tested.predict(
                trainer.tested.settle(meta_params, asked, steps=steps), meta_params, asked
            )
            for steps in (0, None)
        )
        figures.save(sinusoid_fits(batch, before, after, grid), folder / "fits.png")
        looks = {
            steps: judge(
                trainer.learner,
                meta_params,
                trainer.tasks.test,
                self.metric,
                tasks=self.test_tasks,
                steps=steps,
            )
            for steps in LOOKS
        }
        rows = [{"steps": n, "error": s.mean, "interval": s.interval} for n, s in looks.items()]
        write_whole(folder / "adaptation.json", json.dumps(rows, indent=2) + "\n")


@dataclass(frozen=True)
class SinusoidResult:
    """A row of the table.

    Attributes:
        validation: the error on validation tasks, by which the parameters were chosen.
        test: the error on test tasks.
        interval: half the width of its 95 % interval.
        gradient_evaluations: number of gradient evaluations in meta-training.
        seconds: duration of meta-training.
        adaptation: the error on test tasks after some numbers of adaptation steps.
    """

    validation: float | None
    test: float
    interval: float
    gradient_evaluations: int
    seconds: float
    adaptation: list[tuple[int, float]]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The row of a run that has ended."""
        result = json.loads((folder / "result.json").read_text())
        metrics = result["metrics"]
        adaptation = json.loads((folder / "adaptation.json").read_text())
        return cls(
            metrics.get("validation_mean_squared_error"),
            metrics["test_mean_squared_error"],
            metrics["test_mean_squared_error_interval"],
            result["gradient_evaluations"],
            result["seconds"],
            [(row["steps"], row["error"]) for row in adaptation],
        )


def compare_learners(
    config: Sinusoid, out: Path, *, resume: bool, console: Console
) -> dict[FewShotMethodName, list[SinusoidResult]]:
    """Run one method in `out`, or all methods and seeds in folders below it, and print the table.

    Returns:
        The rows of the table by method, one a seed.
    """
    if not config.compare and config.seeds is None:
        meta_train(config, out, resume=resume, console=console)
        return {config.method: [SinusoidResult.of(out)]}
    torch.set_num_threads(config.threads)
    whole = RunDirectory(out, config, resume=resume)
    rows: dict[FewShotMethodName, list[SinusoidResult]] = {}
    runs: dict[str, Path] = {}
    for seed in [config.seed] if config.seeds is None else range(config.seeds):
        for method in OWN if config.compare else (config.method,):
            folder = (out if config.seeds is None else out / f"seed-{seed}") / method
            trainer = MetaTrainer(config.of(method, seed))
            directory = RunDirectory(folder, trainer.config, resume=resume)
            trainer.learned(directory, resume=resume, console=console)
            rows.setdefault(method, []).append(SinusoidResult.of(folder))
            runs.setdefault(FEW_SHOT_METHODS[method].label, folder)
    console.print(errors_table(config, rows))
    console.print(adaptation_table(rows))
    whole.write_json(
        "table.json", {name: [vars(row) for row in each] for name, each in rows.items()}
    )
    figures.save(compared(runs), out / "comparison.png")
    return rows


def errors_table(
    config: Sinusoid, rows: Mapping[FewShotMethodName, Sequence[SinusoidResult]]
) -> Table:
    """Mean ± standard error over seeds; for a single seed, the 95 % interval of the test."""
    last = (config.seeds or 1) - 1
    seeds = f"seeds 0–{last}" if last else f"seed {config.seed}"
    lines = []
    for method, each in rows.items():
        test, error = mean_and_error([row.test for row in each])
        watched = [row.validation for row in each if row.validation is not None]
        lines.append(
            [
                FEW_SHOT_METHODS[method].label,
                spread(watched, ".4f") if watched else "",
                with_error(test, each[0].interval if error is None else error, ".4f"),
                format(round(fmean(row.gradient_evaluations for row in each)), ","),
                format(fmean(row.seconds for row in each), ".1f"),
            ]
        )
    title = (
        f"{config.name}, {seeds}, scale {config.scale}: mean squared error after "
        f"{config.test_steps or config.solver.max_steps} steps, {config.test_tasks} test tasks"
    )
    return as_rich(title, ["validation", "test", "gradients", "seconds"], lines)


def adaptation_table(rows: Mapping[FewShotMethodName, Sequence[SinusoidResult]]) -> Table:
    """The mean error over seeds on test tasks during adaptation."""
    lines = []
    for method, each in rows.items():
        means = [fmean(row.adaptation[i][1] for row in each) for i in range(len(LOOKS))]
        lines.append([FEW_SHOT_METHODS[method].label, *(f"{mean:.3g}" for mean in means)])
    title = "test: mean squared error after so many steps of adaptation"
    return as_rich(title, [str(steps) for steps in LOOKS], lines)


def compared(runs: Mapping[str, Path]) -> Figure:
    """The errors in meta-training and adaptation of several methods, by label."""
    learning, adaptation = {}, {}
    for label, folder in runs.items():
        adaptation[label] = SinusoidResult.of(folder).adaptation
        log = folder / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        learning[label] = [
            (row["outer_step"] + 1, row["validation_mean_squared_error"])
            for row in map(json.loads, lines)
            if "validation_mean_squared_error" in row
        ]
    return adaptation_curves(learning, adaptation)
