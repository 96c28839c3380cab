"""Networks that settle, each trained by every method that serves it, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Self

from matplotlib.figure import Figure

from equigrad.errors import ConfigurationError
from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.experiment import at_least
from equigrad.experiments.runs.formats import mean_and_error, with_error
from equigrad.experiments.runs.reproduction import ByRuns, Cell, differ
from equigrad.experiments.settling.equilibrium import (
    SETTINGS,
    Equilibrium,
    Job,
    MethodName,
    SettingName,
)


@dataclass(frozen=True)
class Reached:
    """What one network reached by one method with one seed, in percent."""

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

    Each network is trained by every method that serves it, from the same start, on the same images
    in the same order. The least-control paper reports all of these, but its numbers are not at
    hand, so that none stand beside. A cell that is stopped goes on where it was.
    """

    name: ClassVar[str] = "equilibrium"
    row: ClassVar[type] = Reached

    only: tuple[SettingName, ...] = tuple(SETTINGS)
    """Which networks."""

    methods: tuple[MethodName, ...] = ()
    """Which methods, where a network knows them; none means all."""

    seeds: int = 1
    """Seeds 0, 1 … N-1 draw starts, images held out, and orders."""

    epochs: float | None = None
    """Passes over the training images; by default those of the scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "seeds", self.seeds)
        differ("only", self.only)
        known = {method for setting in SETTINGS.values() for method in setting.methods}
        if unknown := set(self.methods) - known:
            raise ConfigurationError(
                f"methods must be of {', '.join(sorted(known))}, got {sorted(unknown)[0]!r}"
            )
        if not self.cells():
            raise ConfigurationError(
                f"none of the methods {', '.join(self.methods)} serves {', '.join(self.only)}"
            )
        self.experiment(*self.cells()[0])

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults of a scale."""
        scale = chosen.get("scale", "small")
        if scale == "paper":
            return cls(scale="paper", seeds=5)
        return cls(scale="smoke") if scale == "smoke" else cls()

    def cells(self) -> list[Cell]:
        """Seed by seed, so that a table that was stopped has some of everything."""
        seeds = range(self.seeds)
        return [(line, method, seed) for seed in seeds for line, method in self._places()]

    def _places(self) -> list[tuple[SettingName, MethodName]]:
        return [
            (line, method)
            for line in self.only
            for method in SETTINGS[line].methods
            if not self.methods or method in self.methods
        ]

    def experiment(self, setting: SettingName, method: MethodName, seed: int) -> Equilibrium:
        """The settings of a cell."""
        preset = Equilibrium.preset(scale=self.scale, setting=setting, method=method)
        changes = {} if self.epochs is None else {"epochs": self.epochs}
        return self.placed(preset, seed=seed, **changes)

    def job(self, config: Equilibrium) -> Job:
        """A network and its images."""
        return Job(config)

    def read(self, result: dict[str, Any], setting: str, method: str, seed: int) -> Reached:
        """What it reached, and what it took."""
        metrics = result["metrics"]
        return Reached(
            setting,
            method,
            seed,
            metrics["validation_accuracy"],
            metrics["test_accuracy"],
            result["epochs"],
            result["gradient_evaluations"],
            result["seconds"],
        )

    def text(self, rows: Sequence[Reached]) -> str:
        """A line a network and method."""
        lines = []
        for setting, method in self._places():
            own = [row for row in rows if (row.setting, row.method) == (setting, method)]
            lines.append(
                [
                    SETTINGS[setting].label,
                    SETTINGS[setting].source.name,
                    SETTINGS[setting].methods[method].label,
                    with_error(*mean_and_error([row.validation for row in own]), ".2f"),
                    with_error(*mean_and_error([row.test for row in own]), ".2f"),
                    f"{fmean(row.epochs for row in own):.3g}",
                    f"{fmean(row.gradient_evaluations for row in own):,.0f}",
                    f"{fmean(row.seconds for row in own) / 60:.1f}",
                ]
            )
        heads = (
            *("network", "images", "gradient by", "validation, %", "test, %"),
            *("epochs", "gradients of batches", "minutes"),
        )
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        seeds = "Seed 0" if self.seeds == 1 else f"Mean ± standard error over {self.seeds} seeds"
        return (
            as_table(heads, lines) + f"\n{seeds}, scale {self.scale}, {threads}. "
            f"Validation images are held out of the training ones; nothing was chosen by the test. "
            f"The papers' own numbers are not at hand.\n"
        )

    def draw(self, rows: Sequence[Reached]) -> Figure:
        """Test accuracy of every seed, a panel a data set."""
        places = self._places()
        sources = list(dict.fromkeys(SETTINGS[setting].source.name for setting, _ in places))
        panels = [[p for p in places if SETTINGS[p[0]].source.name == name] for name in sources]
        figure = Figure(figsize=(8, 0.9 * len(panels) + 0.38 * len(places)), layout="constrained")
        sizes = [len(panel) for panel in panels]
        every = figure.subplots(len(panels), squeeze=False, height_ratios=sizes)[:, 0]
        for axes, name, panel in zip(every, sources, panels, strict=True):
            reached: list[float] = []
            for at, (setting, method) in enumerate(panel):
                own = [row.test for row in rows if (row.setting, row.method) == (setting, method)]
                axes.plot(own, [at] * len(own), "o", color=f"C{self.only.index(setting)}")
                reached += own
            names = [f"{SETTINGS[s].label}: {SETTINGS[s].methods[m].label}" for s, m in panel]
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set(xlim=(min(reached) - 0.5, max(reached) + 0.5), ylim=(len(names) - 0.5, -0.5))
            axes.set_xlabel(f"test accuracy on {name} (%)")
            axes.grid(alpha=0.3, axis="x")
            axes.spines[["top", "right"]].set_visible(False)
        return figure
