"""Table 2: few-shot accuracy on Omniglot, by division, way, shot, method and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from equigrad.estimators import Contrastive
from equigrad.experiments.few_shot.meta_training import MetaTrainer
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.experiments.few_shot.omniglot import PUBLISHED, EpisodeSettingName, Omniglot
from equigrad.experiments.few_shot.omniglot_classes import SplitName
from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.figures import COLORS
from equigrad.experiments.runs.formats import NOT_RUN, average
from equigrad.experiments.runs.reproduction import ByRuns, Cell
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.fields import DIFFERENT, Count, Positive
from equigrad.training.precision import Precision

Spread = tuple[float, float]

QUOTED: dict[str, tuple[Spread, Spread, Spread, Spread]] = {
    "MAML [10]": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "First-order MAML [10]": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "Reptile [28]": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "iMAML (GD) [26]": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "iMAML (Hessian-free) [26]": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}
"""Results of other papers that the paper's Table 2 quotes, measured on other terms."""

QUOTED_OF: dict[str, str] = {
    "maml": "MAML [10]",
    "first-order-maml": "First-order MAML [10]",
    "reptile": "Reptile [28]",
    "imaml": "iMAML (GD) [26]",
}
"""Those of them that are for our methods; their authors divided all characters at random."""

COLUMNS: tuple[EpisodeSettingName, ...] = ("5way1shot", "5way5shot", "20way1shot", "20way5shot")


@dataclass(frozen=True)
class FewShotResult:
    """The results of a method with one seed, in percent."""

    split: str
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
    table of their own. A cell that is stopped goes on where it was, and ends after its own minutes:
    at scale `small`, those of a column are 72 minutes of meta-training, and the tests.
    """

    name: ClassVar[str] = "table2"
    row: ClassVar[type] = FewShotResult
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"minutes": None},
        "paper": {
            "splits": get_args(SplitName),
            "only": COLUMNS,
            "seeds": 3,
            "minutes": None,
            "nudge": "force",
        },
    }

    splits: Annotated[tuple[SplitName, ...], DIFFERENT] = ("background-evaluation",)
    """How characters are divided: as in the paper, and as the other papers' authors did."""

    only: Annotated[tuple[EpisodeSettingName, ...], DIFFERENT] = ("5way1shot",)
    """The columns of the table."""

    methods: Annotated[tuple[FewShotMethodName, ...], DIFFERENT] = (
        "contrastive-modulation",
        "contrastive-synaptic",
        "maml",
        "first-order-maml",
        "reptile",
        "imaml",
    )
    """The methods."""

    seeds: Count = 1
    """Number of seeds; seeds 0 to N-1 draw initialisations and tasks."""

    minutes: Positive | None = 12.0
    """Minutes of meta-training of each cell, the same for all methods; None to use their steps."""

    precision: Precision = "float32"
    """Of products and convolutions, in the runs of all cells."""

    nudge: Literal["loss", "force"] | None = None
    """The nudge of the contrastive rule; None for that of the scale. The paper's is `loss`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.experiment(*self.cells()[0])

    def cells(self) -> list[Cell]:
        """The cells, seed by seed, so that an interrupted table has some results of each kind."""
        return [
            (split, column, method, seed)
            for seed in range(self.seeds)
            for split in self.splits
            for column in self.only
            for method in self.methods
        ]

    def alone(
        self, split: SplitName, setting: EpisodeSettingName, method: FewShotMethodName
    ) -> Self:
        """A table of one column, one division and one method."""
        return replace(self, splits=(split,), only=(setting,), methods=(method,))

    def label(
        self, split: SplitName, setting: EpisodeSettingName, method: FewShotMethodName
    ) -> str:
        """The division, the column and the method, in words."""
        return f"{split}, {setting}, {FEW_SHOT_METHODS[method].label}"

    def paper(
        self, split: SplitName, setting: EpisodeSettingName, method: FewShotMethodName
    ) -> Spread | None:
        """The paper's results, own or quoted, beside the division that they were measured on."""
        if split == "background-evaluation":
            return self._own(split, setting, method)
        quoted = QUOTED.get(QUOTED_OF.get(method, ""))
        return None if quoted is None else quoted[COLUMNS.index(setting)]

    def experiment(self, split: SplitName, setting: str, method: str, seed: int) -> Omniglot:
        """The settings of a cell."""
        preset = Omniglot.preset(scale=self.scale, setting=setting, method=method)
        rule = preset.estimator
        if self.nudge is not None and isinstance(rule, Contrastive):
            preset = replace(preset, estimator=replace(rule, nudge=self.nudge))
        changes: dict[str, Any] = {"minutes": self.minutes, "precision": self.precision}
        return self.placed(preset, seed=seed, split=split, **changes)

    def run(self, config: Omniglot, directory: RunDirectory, console: Console) -> None:
        """Meta-train and test."""
        MetaTrainer(config).learned(directory, resume=True, console=console)

    def read(
        self, result: dict[str, Any], split: str, setting: str, method: str, seed: int
    ) -> FewShotResult:
        """The test results and the cost of a run."""
        metrics = result["metrics"]
        return FewShotResult(
            split,
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
        """A row for each division, column and method; then the results that the paper quotes."""
        lines = []
        for split, setting, method in self.places():
            own = self.of(rows, split, setting, method)
            paper = self._own(split, setting, method)
            lines.append(
                [
                    split,
                    setting,
                    FEW_SHOT_METHODS[method].label,
                    _with_deviation([row.test for row in own]),
                    _with_deviation([row.support_statistics for row in own]),
                    "" if paper is None else f"{paper[0]:.2f} ± {paper[1]:.2f}",
                    self.counted(rows, split, setting, method),
                    average([row.outer_steps for row in own], ",.0f"),
                    average([row.seconds / 60 for row in own], ".1f"),
                ]
            )
        heads = (
            *("characters", "tasks", "learner", "test, %", "with support statistics, %"),
            *("the paper's own, %", "seeds", "meta-steps", "minutes"),
        )
        config = self.experiment(*self.cells()[0])
        ends = "" if self.minutes is None else f", {self.minutes:g} minutes of meta-training each"
        widest = max(row.interval for row in rows)
        quoted = [
            [name, *(f"{mean:g} ± {spread:g}" for mean, spread in numbers)]
            for name, numbers in QUOTED.items()
        ]
        return (
            as_table(heads, lines)
            + f"\nScale {self.scale}{ends}; mean ± standard deviation over seeds; "
            f"{config.test_tasks} tasks of the test each, 95 % intervals ± {widest:.2g} at most. "
            f"The first column of numbers is transductive, statistics of the queries, as in the "
            f"paper.\n"
            + "".join(f"\n{note}\n" for note in self._notes())
            + "\nQuoted by the paper from other papers, on terms of their own, not measured here "
            "(mean ± what they report):\n\n" + as_table(["learner", *COLUMNS], quoted)
        )

    def _notes(self) -> list[str]:
        """How each cell differs from the paper, if it does."""
        return [
            f"{self.label(*place)}: {note}"
            for place in self.places()
            for note in self.experiment(*place, seed=0).notes()
        ]

    @staticmethod
    def _own(split: str, setting: EpisodeSettingName, method: FewShotMethodName) -> Spread | None:
        """The paper's own results, on the background and evaluation alphabets."""
        return PUBLISHED.get(method, {}).get(setting) if split == "background-evaluation" else None

    def draw(self, rows: Sequence[FewShotResult]) -> Figure:
        """Draw the result of every seed with its interval, and the means of the paper."""
        places = self.places()
        figure = Figure(figsize=(1.5 + 2.2 * len(places) ** 0.9, 3.8), layout="constrained")
        axes = figure.subplots()
        for place, (split, setting, method) in enumerate(places):
            own = self.of(rows, split, setting, method)
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
            if (paper := self._own(split, setting, method)) is not None:
                axes.hlines(
                    paper[0], place - 0.3, place + 0.3, color=COLORS[1], label="the paper's mean"
                )
        names = [
            f"{FEW_SHOT_METHODS[method].label}\n{setting}\n{split}"
            for split, setting, method in places
        ]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set(ylabel="test accuracy (%)", xlim=(-0.6, len(names) - 0.4))
        axes.grid(alpha=0.3, axis="y")
        figure.legend(*_once(axes), loc="outside lower center", ncols=2, frameon=False)
        return figure


def _once(axes: Axes) -> tuple[list[Any], list[str]]:
    """The handles and labels of a legend, without repetitions."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(found.values()), list(found)


def _with_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as in the paper; a single number for a single seed."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else NOT_RUN
    return f"{fmean(values):.2f} ± {stdev(values):.2f}"
