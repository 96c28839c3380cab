"""Table 2: few-shot accuracy on Omniglot, by method, way, shot and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Annotated, Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from equigrad.experiments.few_shot.meta_training import MetaTrainer
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.experiments.few_shot.omniglot import PUBLISHED, EpisodeSettingName, Omniglot
from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.figures import COLORS
from equigrad.experiments.runs.reproduction import ByRuns, Cell, over_seeds
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.fields import DIFFERENT, Count, Positive

Spread = tuple[float, float]

QUOTED: dict[str, tuple[Spread, Spread, Spread, Spread]] = {
    "MAML [10]": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "First-order MAML [10]": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "Reptile [28]": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "iMAML (GD) [26]": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "iMAML (Hessian-free) [26]": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}
"""What the paper's Table 2 quotes from other papers, measured elsewhere on other terms."""

COLUMNS: tuple[EpisodeSettingName, ...] = ("5way1shot", "5way5shot", "20way1shot", "20way5shot")


@dataclass(frozen=True)
class FewShotResult:
    """What one method reached with one seed, in percent."""

    setting: str
    method: str
    seed: int
    test: float
    interval: float
    support_statistics: float
    outer_steps: int
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Table2(ByRuns):
    """Table 2: accuracy on characters never seen, after few-shot learning by several methods.

    The same network, characters, tasks of the test and solver of a task for all methods; Reptile,
    which makes no use of queries, meta-trains on more images of a class. Mean ± standard deviation
    over seeds, beside the paper's own numbers; those that it quotes from other papers stand in a
    table of their own. A cell that is stopped goes on where it was.
    """

    name: ClassVar[str] = "table2"
    row: ClassVar[type] = FewShotResult
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"seeds": 1},
        "paper": {
            "only": COLUMNS,
            "methods": ("contrastive-synaptic", "contrastive-modulation"),
            "seeds": 5,
        },
    }

    only: Annotated[tuple[EpisodeSettingName, ...], DIFFERENT] = ("5way1shot",)
    """Which columns of the table."""

    methods: Annotated[tuple[FewShotMethodName, ...], DIFFERENT] = (
        "contrastive-modulation",
        "contrastive-synaptic",
        "first-order-maml",
        "reptile",
    )
    """Which learners."""

    seeds: Count = 3
    """Seeds 0, 1 … N-1 draw starts and tasks."""

    minutes: Positive | None = None
    """Minutes of meta-training of each cell, the same for all methods; by default their steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.experiment(self.only[0], self.methods[0], 0)

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a table that was stopped has some of everything."""
        seeds = range(self.seeds)
        return [
            (line, method, seed) for seed in seeds for line in self.only for method in self.methods
        ]

    def experiment(self, setting: str, method: str, seed: int) -> Omniglot:
        """The settings of a cell."""
        preset = Omniglot.preset(scale=self.scale, setting=setting, method=method)
        return self.placed(preset, seed=seed, minutes=self.minutes)

    def run(self, config: Omniglot, directory: RunDirectory, console: Console) -> None:
        """Meta-train and test."""
        MetaTrainer(config).learned(directory, resume=True, console=console)

    def read(self, result: dict[str, Any], setting: str, method: str, seed: int) -> FewShotResult:
        """What it reached in the test, and what it took."""
        metrics = result["metrics"]
        return FewShotResult(
            setting,
            method,
            seed,
            metrics["test_accuracy"],
            metrics["test_accuracy_interval"],
            metrics["test_support_statistics_accuracy"],
            result["outer_steps"],
            result["gradient_evaluations"],
            result["seconds"],
        )

    def text(self, rows: Sequence[FewShotResult]) -> str:
        """Ours, a line a column and method; then what is quoted."""
        lines = []
        for setting, method in self._places():
            own = [row for row in rows if (row.setting, row.method) == (setting, method)]
            paper = PUBLISHED.get(method, {}).get(setting)
            lines.append(
                [
                    setting,
                    FEW_SHOT_METHODS[method].label,
                    _with_deviation([row.test for row in own]),
                    _with_deviation([row.support_statistics for row in own]),
                    "" if paper is None else f"{paper[0]:.2f} ± {paper[1]:.2f}",
                    f"{fmean(row.outer_steps for row in own):,.0f}",
                    f"{fmean(row.seconds for row in own) / 60:.1f}",
                ]
            )
        heads = (
            *("tasks", "learner", "test, %", "with support statistics, %"),
            *("the paper's own, %", "meta-steps", "minutes"),
        )
        config = self.experiment(self.only[0], self.methods[0], 0)
        seeds = over_seeds(self.seeds, "standard deviation")
        widest = max(row.interval for row in rows)
        quoted = [
            [name, *(f"{mean:g} ± {spread:g}" for mean, spread in numbers)]
            for name, numbers in QUOTED.items()
        ]
        return (
            as_table(heads, lines)
            + f"\n{seeds[0].upper()}{seeds[1:]}; {config.test_tasks} tasks of the test each, 95 % "
            f"intervals ± {widest:.2g} at most. The first column of numbers is transductive, "
            f"statistics of the queries, as in the paper.\n"
            + "".join(f"\n{note}\n" for note in self._notes())
            + "\nQuoted by the paper from other papers, on terms of their own, not measured here "
            "(mean ± what they report):\n\n" + as_table(["learner", *COLUMNS], quoted)
        )

    def _notes(self) -> list[str]:
        """In what each cell differs from the paper, where it does."""
        return [
            f"{setting}, {FEW_SHOT_METHODS[method].label}: {note}"
            for setting, method in self._places()
            for note in self.experiment(setting, method, 0).notes()
        ]

    def _places(self) -> list[tuple[EpisodeSettingName, FewShotMethodName]]:
        return [(setting, method) for setting in self.only for method in self.methods]

    def draw(self, rows: Sequence[FewShotResult]) -> Figure:
        """Every seed, with the interval of its tasks; the paper's own means."""
        figure = Figure(figsize=(1.5 + 2.2 * len(self._places()) ** 0.9, 3.8), layout="constrained")
        axes = figure.subplots()
        for place, (setting, method) in enumerate(self._places()):
            own = [row for row in rows if (row.setting, row.method) == (setting, method)]
            at = [place + 0.12 * (i - (len(own) - 1) / 2) for i in range(len(own))]
            axes.errorbar(
                at,
                [row.test for row in own],
                [row.interval for row in own],
                fmt="o",
                color=COLORS[0],
                capsize=2,
                label="a seed, with its 95 % interval",
            )
            if (paper := PUBLISHED.get(method, {}).get(setting)) is not None:
                axes.hlines(
                    paper[0], place - 0.3, place + 0.3, color=COLORS[1], label="the paper's mean"
                )
        names = [
            f"{FEW_SHOT_METHODS[method].label}\n{setting}" for setting, method in self._places()
        ]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set(ylabel="test accuracy (%)", xlim=(-0.6, len(names) - 0.4))
        axes.grid(alpha=0.3, axis="y")
        figure.legend(*_once(axes), loc="outside lower center", ncols=2, frameon=False)
        return figure


def _once(axes: Axes) -> tuple[list[Any], list[str]]:
    """The handles and labels of a legend, none twice."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(found.values()), list(found)


def _with_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as the paper has it; one number where there is one seed."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"
