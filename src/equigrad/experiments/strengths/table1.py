"""Table 1: accuracy with learned strengths on MNIST and CIFAR-10, by method and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.figures import COLORS, MARKERS
from equigrad.experiments.runs.formats import average, spread, with_error
from equigrad.experiments.runs.methods import EstimatorName
from equigrad.experiments.runs.reproduction import ByRuns, Cell, cell_folder
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.runs.run_folders import RunFolder
from equigrad.experiments.strengths.images import SETTINGS, Cifar10, Mnist, OnImages
from equigrad.experiments.strengths.strength_learning import Published, StrengthTrainer
from equigrad.fields import DIFFERENT, Count

StrengthSettingName = Literal["mnist-30000", "mnist-1", "mnist-10", "cifar-50"]
StrengthMethodName = Literal["contrastive", "contrastive-force", "t1t2"]


@dataclass(frozen=True)
class StrengthMethod:
    """A column of the table.

    Attributes:
        label: its name in words.
        estimator: of the hypergradient.
        color: of its points and curves.
        force: whether nudged phases feel the constant force of the validation loss instead of the
            loss itself: one gradient of the validation images an outer step, and another β.
    """

    label: str
    estimator: EstimatorName
    color: str
    force: bool = False


METHODS: dict[StrengthMethodName, StrengthMethod] = {
    "contrastive": StrengthMethod("contrastive", "contrastive", COLORS[0]),
    "contrastive-force": StrengthMethod("contrastive, force", "contrastive", COLORS[2], force=True),
    "t1t2": StrengthMethod("T1–T2", "t1t2", COLORS[1]),
}


@dataclass(frozen=True)
class Accuracies:
    """The accuracies of a method with one seed, in percent."""

    setting: str
    method: str
    seed: int
    validation: float
    test: float
    outer_steps: int
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Table1(ByRuns):
    """Table 1: accuracy after strengths were learned, on MNIST and CIFAR-10 with few images.

    The contrastive rule as published, the same by force, and T1–T2, each with its own
    hyperparameters, on the same splits and starts; mean ± standard error over seeds beside the
    paper's numbers, which are over 12. The force takes one gradient of the validation images an
    outer step, where the published rule takes one a nudged step, and needs a smaller β. A cell that
    is stopped goes on where it was.
    """

    name: ClassVar[str] = "table1"
    row: ClassVar[type] = Accuracies
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {},
        "paper": {"methods": get_args(StrengthMethodName), "seeds": 12, "seeds_of_many": 5},
    }

    seeds: Count = 3
    """Number of seeds; seeds 0 to N-1 draw splits and starts."""

    seeds_of_many: Count = 3
    """Number of seeds of mnist-30000, whose runs take longest."""

    only: Annotated[tuple[StrengthSettingName, ...], DIFFERENT] = get_args(StrengthSettingName)
    """The rows of the table."""

    methods: Annotated[tuple[StrengthMethodName, ...], DIFFERENT] = ("contrastive", "t1t2")
    """The columns of the table; contrastive-force nudges by a constant force."""

    def cells(self) -> list[Cell]:
        """The cells, seed by seed, so that an interrupted table has some results of each kind."""
        return [
            (line, method, seed)
            for seed in range(max(map(self.seeds_in, self.only)))
            for line in self.only
            for method in self.methods
            if seed < self.seeds_in(line)
        ]

    def seeds_in(self, setting: str) -> int:
        """The number of seeds of a row."""
        return self.seeds_of_many if setting == "mnist-30000" else self.seeds

    def alone(self, setting: StrengthSettingName, method: StrengthMethodName) -> Self:
        """A table of one row and one method."""
        return replace(self, only=(setting,), methods=(method,))

    def label(self, setting: str, method: StrengthMethodName) -> str:
        """The row and the method, in words."""
        return f"{setting}, {METHODS[method].label}"

    def paper(self, setting: str, method: StrengthMethodName) -> tuple[float, float]:
        """The paper's test accuracy and its standard error."""
        return self._published(setting, method).test

    def _published(self, setting: str, method: StrengthMethodName) -> Published:
        return SETTINGS[setting].published[METHODS[method].estimator]

    def experiment(self, setting: str, method: StrengthMethodName, seed: int) -> OnImages:
        """The settings of a cell."""
        kind, how = Mnist if setting in Mnist.settings else Cifar10, METHODS[method]
        preset = kind.preset(setting=setting, scale=self.scale)
        if how.force:
            beta = SETTINGS[setting].force_beta
            rule = replace(preset.contrastive.rule, nudge="force", beta=beta)
            preset = replace(preset, contrastive=replace(preset.contrastive, rule=rule))
        return self.placed(preset, seed=seed, estimator=how.estimator, compare=False)

    def run(self, config: OnImages, directory: RunDirectory, console: Console) -> None:
        """Learn strengths, then train with them."""
        trainer = StrengthTrainer(config, config.seed)
        trainer.learned(config.estimator, directory, resume=True, console=console)

    def read(self, result: dict[str, Any], setting: str, method: str, seed: int) -> Accuracies:
        """The accuracies and the cost of a run."""
        metrics = result["metrics"]
        return Accuracies(
            setting,
            method,
            seed,
            metrics["validation_accuracy"],
            metrics["test_accuracy"],
            result["outer_steps"],
            result["gradient_evaluations"],
            result["seconds"],
        )

    def text(self, rows: Sequence[Accuracies]) -> str:
        """A row for each setting and method, beside the paper's numbers."""
        lines = []
        for setting, method in self.places():
            own, paper = self.of(rows, setting, method), self._published(setting, method)
            lines.append(
                [
                    setting,
                    METHODS[method].label,
                    spread([row.validation for row in own], ".2f"),
                    spread([row.test for row in own], ".2f"),
                    with_error(*paper.validation, ".2f"),
                    with_error(*paper.test, ".2f"),
                    self.counted(rows, setting, method),
                    average([row.outer_steps for row in own], ".0f"),
                    average([row.seconds for row in own], ".0f"),
                ]
            )
        heads = (
            *("setting", "strengths by", "validation, %", "test, %"),
            *("paper: validation, %", "test, %", "seeds", "outer steps", "seconds"),
        )
        return (
            as_table(heads, lines)
            + f"\nScale {self.scale}; mean ± standard error over seeds; the paper's, over 12, are "
            f"of the contrastive rule as published and of T1–T2. The strengths are fitted to the "
            f"validation images, so the test column is the verdict.\n"
        )

    def draw(self, rows: Sequence[Accuracies]) -> Figure:
        """Validation and test accuracy of every seed, and the paper's means."""
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        place: dict[str, int] = {line: i for i, line in enumerate(self.only)}
        for axes, part in zip(figure.subplots(1, 2), ("validation", "test"), strict=True):
            for i, method in enumerate(self.methods):
                how, shift = METHODS[method], 0.2 * (i - (len(self.methods) - 1) / 2)
                own = [row for row in rows if row.method == method]
                axes.plot(
                    [place[row.setting] + shift for row in own],
                    [getattr(row, part) for row in own],
                    MARKERS[i],
                    color=how.color,
                    label=how.label,
                )
                axes.plot(
                    [i + shift for i in place.values()],
                    [getattr(self._published(line, method), part)[0] for line in self.only],
                    "_",
                    color=how.color,
                    markersize=16,
                    label=f"{how.label}, paper",
                )
            axes.set(ylabel=f"{part} accuracy (%)", xticks=range(len(self.only)))
            axes.set_xticklabels(self.only)
            axes.grid(alpha=0.3)
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(self.methods))
        return figure

    def figures(self, rows: Sequence[Accuracies], folder: Path) -> dict[str, Figure]:
        """Accuracies, and how they were reached."""
        return {**super().figures(rows, folder), "table1-curves": self.draw_curves(folder)}

    def draw_curves(self, folder: Path) -> Figure:
        """Accuracy against outer steps: a thin curve for each seed, a thick one for their mean."""
        figure = Figure(figsize=(3 * len(self.only) + 0.5, 5), layout="constrained")
        parts = ("validation", "test")
        panels = figure.subplots(2, len(self.only), squeeze=False, sharey="row")
        for part, row in zip(parts, panels, strict=True):
            for setting, axes in zip(self.only, row, strict=True):
                for method in self.methods:
                    how = METHODS[method]
                    curves = self._curves(folder, setting, method, f"{part}_accuracy")
                    for curve in curves:
                        axes.plot(curve, color=how.color, alpha=0.25, linewidth=0.8)
                    shortest = min(map(len, curves), default=0)
                    mean = np.mean([curve[:shortest] for curve in curves], 0) if curves else []
                    axes.plot(mean, color=how.color, label=how.label)
                axes.set(title=setting if part == "validation" else None)
                axes.grid(alpha=0.3)
            row[0].set_ylabel(f"{part} accuracy (%)")
        for axes in panels[1]:
            axes.set_xlabel("outer step")
        handles = panels[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(self.methods))
        return figure

    def _curves(
        self, folder: Path, setting: str, method: StrengthMethodName, metric: str
    ) -> list[list[float]]:
        """A curve for each seed, of all cells that have begun."""
        cells = [cell for cell in self.cells() if cell[:2] == (setting, method)]
        runs = [RunFolder(cell_folder(folder, *cell)) for cell in cells]
        return [[row[metric] for row in run.history] for run in runs if run.history]
