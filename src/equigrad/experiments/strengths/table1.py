"""Table 1: accuracy with learned strengths on MNIST and CIFAR-10, by method and seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar, Literal, get_args

from matplotlib.figure import Figure

from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.figures import COLORS, MARKERS
from equigrad.experiments.runs.formats import spread, with_error
from equigrad.experiments.runs.methods import EstimatorName
from equigrad.experiments.runs.reproduction import ByExperiments, Cell, over_seeds
from equigrad.experiments.strengths.images import SETTINGS, Cifar10, Mnist, OnImages
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.fields import DIFFERENT, Count

StrengthSettingName = Literal["mnist-30000", "mnist-1", "mnist-10", "cifar-50"]
METHOD_LABELS: dict[EstimatorName, str] = {"contrastive": "contrastive", "t1t2": "T1–T2"}


@dataclass(frozen=True)
class Accuracies:
    """What one method reached with one seed, in percent."""

    setting: str
    estimator: str
    seed: int
    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Table1(ByExperiments):
    """Table 1: accuracy after strengths were learned, on MNIST and CIFAR-10 with few images.

    Contrastive rule and T1–T2, each with its own hyperparameters, on the same splits and starts;
    mean ± standard error over seeds beside the paper's numbers, which are over 12.
    """

    name: ClassVar[str] = "table1"
    row: ClassVar[type] = Accuracies

    seeds: Count = 3
    """Seeds 0, 1 … N-1 draw splits and starts."""

    only: Annotated[tuple[StrengthSettingName, ...], DIFFERENT] = get_args(StrengthSettingName)
    """Which lines of the table."""

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a table that was stopped has some of everything."""
        seeds = range(self.seeds)
        return [
            (line, method, seed) for seed in seeds for line in self.only for method in METHOD_LABELS
        ]

    def measure(self, setting: str, estimator: EstimatorName, seed: int) -> Accuracies:
        """Learn strengths, and then with them."""
        _, row = StrengthTrainer(self.experiment(setting), seed).learn(estimator)
        return Accuracies(setting, estimator, seed, **vars(row))

    def experiment(self, setting: str) -> OnImages:
        """The settings of a line."""
        kind = Mnist if setting in Mnist.settings else Cifar10
        return self.placed(kind.preset(setting=setting, scale=self.scale))

    def text(self, rows: Sequence[Accuracies]) -> str:
        """A line a setting and method, the paper's numbers beside."""
        lines = []
        for setting in self.only:
            experiment = self.experiment(setting)
            for method, label in METHOD_LABELS.items():
                each = [r for r in rows if (r.setting, r.estimator) == (setting, method)]
                paper = SETTINGS[setting].published[method]
                lines.append(
                    [
                        setting,
                        label,
                        spread([row.validation for row in each], ".2f"),
                        spread([row.test for row in each], ".2f"),
                        with_error(*paper.validation, ".2f"),
                        with_error(*paper.test, ".2f"),
                        str(experiment.outer_steps),
                        f"{fmean(row.seconds for row in each):.0f}",
                    ]
                )
        heads = (
            *("setting", "strengths by", "validation, %", "test, %"),
            *("paper: validation, %", "test, %", "outer steps", "seconds"),
        )
        return (
            as_table(heads, lines)
            + f"\nScale {self.scale}; {over_seeds(self.seeds)}. The strengths are fitted to "
            f"the validation images, so the test column is the verdict.\n"
        )

    def draw(self, rows: Sequence[Accuracies]) -> Figure:
        """Validation and test accuracy of every seed, and the paper's means."""
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        place: dict[str, int] = {line: i for i, line in enumerate(self.only)}
        methods: tuple[EstimatorName, ...] = ("contrastive", "t1t2")
        for axes, part in zip(figure.subplots(1, 2), ("validation", "test"), strict=True):
            for i, method in enumerate(methods):
                shift, color = 0.3 * i - 0.15, COLORS[i]
                own = [row for row in rows if row.estimator == method]
                places = [place[row.setting] + shift for row in own]
                values = [getattr(row, part) for row in own]
                axes.plot(places, values, MARKERS[i], color=color, label=METHOD_LABELS[method])
                paper = [getattr(SETTINGS[line].published[method], part)[0] for line in self.only]
                axes.plot(
                    [at + shift for at in place.values()],
                    paper,
                    "_",
                    color=color,
                    markersize=16,
                    label=f"{METHOD_LABELS[method]}, paper",
                )
            axes.set(ylabel=f"{part} accuracy (%)", xticks=range(len(self.only)))
            axes.set_xticklabels(self.only)
            axes.grid(alpha=0.3)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
        )
        return figure
