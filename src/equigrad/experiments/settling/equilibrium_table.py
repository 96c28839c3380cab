"""Table of networks that settle: test accuracy by network, estimator and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from matplotlib.figure import Figure
from rich.console import Console

from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.figures import color
from equigrad.experiments.runs.formats import average, spread
from equigrad.experiments.runs.reproduction import ByRuns, Cell, over_seeds
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.settling.equilibrium import (
    Equilibrium,
    ImageTrainer,
)
from equigrad.experiments.settling.image_networks import (
    IMAGE_NETWORKS,
    NetworkMethodName,
    NetworkSettingName,
)
from equigrad.fields import DIFFERENT, Count, Positive, require


@dataclass(frozen=True)
class NetworkResult:
    """The result of one network, method and seed, in percent."""

    setting: str
    method: str
    seed: int
    validation: float
    test: float
    epochs: float
    gradient_evaluations: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EquilibriumTable(ByRuns):
    """Test accuracy of networks that settle, by equilibrium propagation, least control and exactly.

    Each network is trained by every method that works for it, from the same initial weights, on the
    same images in the same order. The least-control paper reports all of these, but its numbers are
    not available here, so the table has none. A cell that was stopped is resumed.
    """

    name: ClassVar[str] = "equilibrium"
    row: ClassVar[type] = NetworkResult
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"smoke": {}, "paper": {"seeds": 3}}

    only: Annotated[tuple[NetworkSettingName, ...], DIFFERENT] = tuple(IMAGE_NETWORKS)
    """Networks to train."""

    methods: tuple[NetworkMethodName, ...] = ()
    """Methods to use, for networks that have them; none means all."""

    seeds: Count = 1
    """Number N of seeds 0, 1 … N-1 of initial weights, held-out images and orders."""

    epochs: Positive | None = None
    """Passes over the training images; by default those of the scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.cells()),
            f"none of the methods {', '.join(self.methods)} serves {', '.join(self.only)}",
        )
        self.experiment(*self.cells()[0])

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a table that was stopped has some results of every network."""
        seeds = range(self.seeds)
        return [(line, method, seed) for seed in seeds for line, method in self._places()]

    def alone(self, setting: NetworkSettingName, method: NetworkMethodName) -> Self:
        """One network by one method."""
        return replace(self, only=(setting,), methods=(method,))

    def label(self, setting: NetworkSettingName, method: NetworkMethodName) -> str:
        """The network, its images and the method in words."""
        network = IMAGE_NETWORKS[setting]
        return f"{network.label}, {network.source.name}, {network.methods[method].label}"

    def _places(self) -> list[tuple[NetworkSettingName, NetworkMethodName]]:
        return [
            (line, method)
            for line in self.only
            for method in IMAGE_NETWORKS[line].methods
            if not self.methods or method in self.methods
        ]

    def experiment(
        self, setting: NetworkSettingName, method: NetworkMethodName, seed: int
    ) -> Equilibrium:
        """The settings of a cell."""
        preset = Equilibrium.preset(scale=self.scale, setting=setting, method=method)
        changes = {} if self.epochs is None else {"epochs": self.epochs}
        return self.placed(preset, seed=seed, **changes)

    def run(self, config: Equilibrium, directory: RunDirectory, console: Console) -> None:
        """Train and test."""
        ImageTrainer(config).learned(directory, resume=True, console=console)

    def read(self, result: dict[str, Any], setting: str, method: str, seed: int) -> NetworkResult:
        """The accuracies and costs of a run."""
        metrics = result["metrics"]
        return NetworkResult(
            setting,
            method,
            seed,
            metrics["validation_accuracy"],
            metrics["test_accuracy"],
            result["epochs"],
            result["gradient_evaluations"],
            result["seconds"],
        )

    def text(self, rows: Sequence[NetworkResult]) -> str:
        """A line for each network and method."""
        lines = []
        for setting, method in self._places():
            own = self.of(rows, setting, method)
            lines.append(
                [
                    IMAGE_NETWORKS[setting].label,
                    IMAGE_NETWORKS[setting].source.name,
                    IMAGE_NETWORKS[setting].methods[method].label,
                    spread([row.validation for row in own], ".2f"),
                    spread([row.test for row in own], ".2f"),
                    self.counted(rows, setting, method),
                    average([row.epochs for row in own], ".3g"),
                    average([row.gradient_evaluations for row in own], ",.0f"),
                    average([row.seconds / 60 for row in own], ".1f"),
                ]
            )
        heads = (
            *("network", "images", "gradient by", "validation, %", "test, %"),
            *("seeds", "epochs", "gradients of batches", "minutes"),
        )
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        seeds = over_seeds(self.seeds).capitalize()
        return (
            as_table(heads, lines) + f"\n{seeds}, scale {self.scale}, {threads}. "
            f"Validation images are held out of the training ones; nothing was chosen by the test. "
            f"The papers' own numbers are not at hand.\n"
        )

    def draw(self, rows: Sequence[NetworkResult]) -> Figure:
        """Test accuracy of every seed, with a panel for each data set."""
        places = self._places()
        sources = list(dict.fromkeys(IMAGE_NETWORKS[setting].source.name for setting, _ in places))
        panels = [
            [p for p in places if IMAGE_NETWORKS[p[0]].source.name == name] for name in sources
        ]
        figure = Figure(figsize=(8, 0.9 * len(panels) + 0.38 * len(places)), layout="constrained")
        sizes = [len(panel) for panel in panels]
        every = figure.subplots(len(panels), squeeze=False, height_ratios=sizes)[:, 0]
        for axes, name, panel in zip(every, sources, panels, strict=True):
            reached: list[float] = []
            for at, (setting, method) in enumerate(panel):
                own = [row.test for row in self.of(rows, setting, method)]
                axes.plot(own, [at] * len(own), "o", color=color(self.only.index(setting)))
                reached += own
            names = [
                f"{IMAGE_NETWORKS[s].label}: {IMAGE_NETWORKS[s].methods[m].label}" for s, m in panel
            ]
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set(xlim=(min(reached) - 0.5, max(reached) + 0.5), ylim=(len(names) - 0.5, -0.5))
            axes.set_xlabel(f"test accuracy on {name} (%)")
            axes.grid(alpha=0.3, axis="x")
            axes.spines[["top", "right"]].set_visible(False)
        return figure
