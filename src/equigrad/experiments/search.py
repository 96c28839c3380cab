"""Hyperparameters of an experiment, searched with Ray Tune."""

import csv
import importlib
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments import figures
from equigrad.experiments.config_file import at_paths, overlay
from equigrad.experiments.experiment import at_least
from equigrad.experiments.run_directory import RunDirectory, describe, versions
from equigrad.experiments.search_spaces import SPACES, Point, Space, read_space
from equigrad.experiments.strength_learning import StrengthLearning
from equigrad.training.files import write_whole

TUNING_SEED = 100
"""Tables report seeds 0, 1 …: what is chosen on a split is not judged on it."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Search an experiment's hyperparameters with Ray Tune, by validation accuracy.

    The spaces are those of the paper's Tables S1 to S4. Trials run side by side, and those that lag
    behind at 10, 40 … outer steps are stopped (ASHA). The best one is saved as a configuration that
    `equigrad run NAME --config` takes.
    """

    experiment: Annotated[StrengthLearning, tyro.conf.arg(name="")]
    """What every trial runs, but for the hyperparameters that are searched."""

    trials: int | Literal["grid"] | None = None
    """Random points to try, each once, or the whole `grid`; None as the paper's table says."""

    space: Path | None = None
    """A file of what to vary instead: by option, a list or `{"log_uniform": [low, high]}`."""

    grace_period: int = 10
    """Outer steps that every trial may take before it can be stopped."""

    reduction_factor: float = 4.0
    """One trial in so many goes on after the grace period, and again after each multiple."""

    parallel: int | None = None
    """Trials at once; None for as many as there are CPUs for their threads."""

    gpus: float | None = None
    """GPUs of a trial, 0.5 for two on each; None for one where the device is CUDA."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or `auto`; None starts Ray here and ends it."""

    def __post_init__(self) -> None:
        if self.trials != "grid" and self.trials is not None:
            at_least(1, "trials", self.trials)
        at_least(1, "grace_period", self.grace_period)
        if self.parallel is not None:
            at_least(1, "parallel", self.parallel)
        if not self.reduction_factor > 1:
            raise ConfigurationError(
                f"reduction_factor must be more than 1, got {self.reduction_factor}"
            )
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ConfigurationError(f"gpus must be at least 0, got {self.gpus}")
        if self.experiment.seeds is not None:
            raise ConfigurationError(
                f"every trial runs one seed, given by seed; got seeds={self.experiment.seeds}"
            )

    def what(self) -> "Search":
        """The search without the options that say where it runs, which may change on resume."""
        return replace(self, parallel=None, gpus=None, address=None)

    def find_space(self) -> Space:
        """The user's space, or the one of the experiment and its estimator."""
        if self.space is not None:
            return read_space(self.space)
        experiment = self.experiment
        what = getattr(experiment, "setting", type(experiment).__name__.lower())
        if (space := SPACES.get((what, experiment.estimator))) is None:
            raise ConfigurationError(
                f"there is no search space for {what} with estimator {experiment.estimator}; "
                f"give one with --space FILE"
            )
        return space

    def points(self, space: Space) -> list[Point]:
        """What to try of a space."""
        trials = space.trials if self.trials is None else self.trials
        return space.points(None if trials == "grid" else trials, self.experiment.seed)


def preset(kind: type[StrengthLearning], **chosen: str) -> Search:
    """The defaults of a search through the settings of an experiment."""
    return Search(experiment=replace(kind.preset(**chosen), seed=TUNING_SEED))


@dataclass(kw_only=True)
class Trial:
    """A point, and what became of it.

    Attributes:
        number: in the order of the points.
        point: values by dotted path of the option.
        config: the experiment with these values.
        folder: of its run.
        status: `whole` where it took all outer steps, `stopped` where it lagged behind, `failed`
            where it cannot be computed; `lost` where its process or its disk failed, and `waiting`
            until it is known.
        history: outer steps done, and the validation accuracy after them in percent.
        seconds: spent in the outer loop.
        error: why it failed.
    """

    number: int
    point: Point
    config: StrengthLearning
    folder: Path
    status: Literal["waiting", "whole", "stopped", "failed", "lost"] = "waiting"
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    ENDING: ClassVar = ("status", "history", "seconds", "error")

    @property
    def outer_steps(self) -> int:
        """Outer steps whose worth is known."""
        return self.history[-1][0] if self.history else 0

    @property
    def validation(self) -> float:
        """The last validation accuracy."""
        return self.history[-1][1] if self.history else float("nan")

    @property
    def ended(self) -> bool:
        """Whether it need not be run again."""
        return self.status not in ("waiting", "lost")

    @property
    def summary(self) -> str:
        """Its end in a line."""
        said = f"trial {self.number}: {self.status} after {self.outer_steps} outer steps"
        if self.history:
            said += f", validation {self.validation:.2f} %"
        return f"{said}; {self.error}" if self.error else said


def search(config: Search, out: Path, *, resume: bool, console: Console) -> list[Trial]:
    """Run the trials that have not ended; write `trials.csv`, `best.json` and `search.png`.

    Returns:
        All trials, in the order of their points.

    Raises:
        ConfigurationError: a point that cannot be, Ray is not installed, or all trials failed.
        RunError: some trials were lost with their processes or their disk.
        DataError: the experiment's data are not there.
    """
    space = config.find_space()
    points = config.points(space)
    configs = [overlay(config.experiment, at_paths(point)) for point in points]
    ray = ray_trials()  # before anything is written
    directory = RunDirectory(out, config.what(), resume=resume)
    experiment = config.experiment
    note = experiment.load(torch.device("cpu"), torch.float32).note  # raises here, and once
    trials = [
        found_trial(i, point, trial_config, out.resolve() / "trials" / f"{i:03}")
        for i, (point, trial_config) in enumerate(zip(points, configs, strict=True))
    ]
    of = "all points" if len(points) == space.size else f"{len(points)} points"
    said = (
        f"{of} of {space.source}: {len(trials)} trials of {experiment.outer_steps} outer steps, "
        f"scale {experiment.scale}, seed {experiment.seed}"
    )
    console.print(f"{note}\n{said}" if note else said, highlight=False, soft_wrap=True)
    if not all(trial.ended for trial in trials):
        with Board(trials, directory, console) as board:
            ray.run_trials(config, trials, out, board.changed)
    return conclude(config, trials, directory, console)


def found_trial(number: int, point: Point, config: StrengthLearning, folder: Path) -> Trial:
    """A trial as its folder knows it."""
    ending = RunDirectory(folder, config, resume=True).read_json("trial.json") or {}
    trial = Trial(number=number, point=point, config=config, folder=folder, **ending)
    trial.history = [(step, accuracy) for step, accuracy in trial.history]
    return trial


def ray_trials() -> ModuleType:
    """The module that runs trials on Ray.

    Raises:
        ConfigurationError: Ray is not installed.
    """
    try:
        return importlib.import_module("equigrad.experiments.ray_trials")
    except ImportError as error:
        raise ConfigurationError(
            f"a search needs the extra packages of equigrad[search] ({error}): "
            f"pip install 'equigrad[search]'"
        ) from error


class Board:
    """What becomes of the trials, on disk as soon as it is known, and in a line on the console."""

    def __init__(self, trials: Sequence[Trial], directory: RunDirectory, console: Console) -> None:
        self.trials, self.directory, self.console = trials, directory, console
        self.progress = Progress(
            TextColumn("trials"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=len(trials), said="")

    def __enter__(self) -> "Board":
        self._tell()
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def changed(self, trial: Trial) -> None:
        """Note a trial."""
        if trial.ended:
            ending = {name: getattr(trial, name) for name in Trial.ENDING}
            write_whole(trial.folder / "trial.json", json.dumps(ending) + "\n")
            write_whole(self.directory.path / "trials.csv", as_csv(self.trials))
        if trial.status != "waiting" and not self.console.is_terminal:
            self.console.print(trial.summary, markup=False, highlight=False, soft_wrap=True)
        self._tell()

    def _tell(self) -> None:
        said, best = counted(self.trials), max(self.trials, key=rank)
        if best.history:
            accuracy = f"{best.validation:.2f} % after {best.outer_steps} steps"
            said += f"{'; ' if said else ''}best: trial {best.number}, {accuracy}"
        done = sum(trial.ended for trial in self.trials)
        self.progress.update(self.task, completed=done, said=said or "starting Ray")


def rank(trial: Trial) -> tuple[bool, int, float]:
    """The further the better, and then by validation accuracy; what failed is last."""
    accuracy = trial.validation if trial.history else -math.inf
    return trial.status != "failed", trial.outer_steps, accuracy


def counted(trials: Sequence[Trial]) -> str:
    """How many ended in which way."""
    counts = Counter(trial.status for trial in trials)
    words = ("whole", "stopped", "failed", "lost")
    return ", ".join(f"{counts[word]} {word}" for word in words if counts[word])


def as_csv(trials: Sequence[Trial]) -> str:
    """A row a trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    results = ("status", "outer_steps", "validation", "best_validation", "seconds", "error")
    writer.writerow(["trial", *trials[0].point, *results])
    for trial in trials:
        row = [trial.number, *trial.point.values(), trial.status, trial.outer_steps]
        row += [trial.validation, max((a for _, a in trial.history), default=math.nan)]
        writer.writerow([*row, trial.seconds, trial.error])
    return text.getvalue()


def conclude(
    config: Search, trials: list[Trial], directory: RunDirectory, console: Console
) -> list[Trial]:
    """Say which is best, and leave it as a configuration."""
    lost = [trial for trial in trials if not trial.ended]
    if lost:
        raise RunError(
            f"{len(lost)} of {len(trials)} trials were lost, trial {lost[0].number} for one: "
            f"{lost[0].error or 'Ray ended before it'}. All else is kept: add --resume"
        )
    best = max(trials, key=rank)
    if best.status == "failed":
        raise ConfigurationError(
            f"all {len(trials)} trials failed, trial {best.number} for one: {best.error}. See "
            f"{directory.path / 'trials.csv'}, and search elsewhere with --space"
        )
    name = type(config.experiment).__name__.lower()
    directory.write_json(
        "best.json",
        {
            "experiment": name,
            "config": describe(replace(best.config, seed=0)),  # reported seeds begin there
            "trial": best.number,
            "point": best.point,
            "validation_accuracy": best.validation,
            "seed": best.config.seed,
            "versions": versions(),
        },
    )
    figures.save(draw(trials), directory.path / "search.png")
    ordered = sorted(trials, key=rank, reverse=True)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("trial", *short(list(best.point)), "outer steps", "validation %"):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in ordered[:5]:
        if trial.status != "failed":
            values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.point.values())
            numbers = str(trial.outer_steps), f"{trial.validation:.2f}"
            table.add_row(str(trial.number), *values, *numbers)
    console.print(f"{len(trials)} trials: {counted(trials)}; the best are", highlight=False)
    console.print(table)
    file = shlex.quote(str(directory.path / "best.json"))
    console.print(
        f"run the best on splits that it was not chosen on:\n"
        f"  equigrad run {name} --config {file} --seeds 3",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return trials


def short(paths: Sequence[str]) -> list[str]:
    """Dotted paths by as many of their last words as tell them apart.

    Example:
        >>> short(["t1t2.solver.lr", "t1t2.outer_lr", "contrastive.outer_lr"])
        ['lr', 't1t2.outer_lr', 'contrastive.outer_lr']
        >>> short(["solver.lr", "other.solver.lr"])
        ['solver.lr', 'other.solver.lr']
    """
    endings = [[path.split(".", at)[-1] for at in range(path.count("."), -1, -1)] for path in paths]
    seen = Counter(ending for each in endings for ending in each)
    return [next((e for e in each if seen[e] == 1), each[-1]) for each in endings]


def draw(trials: Sequence[Trial]) -> Figure:
    """Validation accuracy against each hyperparameter that takes several values."""
    paths = [p for p in trials[0].point if len({str(t.point[p]) for t in trials}) > 1]
    paths = paths or list(trials[0].point)
    figure = Figure(figsize=(max(4.5, 3 * len(paths)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
    known = [trial.validation for trial in trials if trial.status != "failed"]
    beneath = min(known) - 0.05 * (max(known) - min(known))
    looks = {
        "whole": ("o", "tab:blue", "all outer steps"),
        "stopped": (".", "tab:gray", "stopped early"),
        "failed": ("x", "tab:red", "failed"),
    }
    for axes, path, label in zip(panels, paths, short(paths), strict=True):
        values = [trial.point[path] for trial in trials]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numbers and min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        for status, (marker, color, said) in looks.items():
            own = [trial for trial in trials if trial.status == status]
            axes.plot(
                [t.point[path] if numbers else str(t.point[path]) for t in own],
                [beneath if status == "failed" else t.validation for t in own],
                marker,
                color=color,
                alpha=0.7,
                label=said,
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
