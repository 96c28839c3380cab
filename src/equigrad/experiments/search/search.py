"""Hyperparameter search of an experiment with Ray Tune, and its results."""

import csv
import importlib
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.config_file import at_paths, overlay
from equigrad.experiments.runs.run_directory import RunDirectory, describe, versions
from equigrad.experiments.search.spaces import Point
from equigrad.experiments.search.trials import Search, Trial
from equigrad.experiments.strengths.strength_learning import StrengthExperiment
from equigrad.training.files import write_whole
from equigrad.training.targets import Target


def search(config: Search, out: Path, *, resume: bool, console: Console) -> list[Trial]:
    """Run the trials that have not ended; write `trials.csv`, `best.json` and `search.png`.

    Returns:
        All trials, in the order of their points.

    Raises:
        ConfigurationError: an invalid point, Ray is not installed, or all trials failed.
        RunError: some trials were lost with their processes or their disk.
        DataError: the experiment's data are missing.
    """
    space = config.find_space()
    points = config.points(space)
    configs = [overlay(config.experiment, at_paths(point)) for point in points]
    ray = ray_trials()  # raises before anything is written
    directory = RunDirectory(out, config.what(), resume=resume)
    experiment = config.experiment
    split = experiment.load(torch.device("cpu"), torch.float32)  # raises here, not in every trial
    note, target = split.note, split.target
    trials = [
        found_trial(i, point, trial_config, out.resolve() / "trials" / f"{i:03}", target)
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


def found_trial(
    number: int, point: Point, config: StrengthExperiment, folder: Path, target: Target
) -> Trial:
    """A trial with the state that its folder records."""
    ending = RunDirectory(folder, config, resume=True).read_json("trial.json") or {}
    found = {"number": number, "point": point, "config": config, "folder": folder}
    trial = Trial(**found, target=target, **ending)
    trial.history = [(step, score) for step, score in trial.history]
    return trial


def ray_trials() -> ModuleType:
    """The module that runs trials on Ray.

    Raises:
        ConfigurationError: Ray is not installed.
    """
    try:
        return importlib.import_module("equigrad.experiments.search.ray_trials")
    except ImportError as error:
        raise ConfigurationError(
            f"a search needs the extra packages of equigrad[search] ({error}): "
            f"pip install 'equigrad[search]'"
        ) from error


class Board:
    """Records the progress of the trials, on disk at once and in a line on the console."""

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
        """Record a change of a trial."""
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
            score = f"{best.target.say(best.validation)} after {best.outer_steps} steps"
            said += f"{'; ' if said else ''}best: trial {best.number}, {score}"
        done = sum(trial.ended for trial in self.trials)
        self.progress.update(self.task, completed=done, said=said or "starting Ray")


def rank(trial: Trial) -> tuple[bool, int, float]:
    """The sort key of a trial: more steps first, then a higher score; failed trials are last."""
    score = trial.validation if trial.history else -math.inf
    return trial.status != "failed", trial.outer_steps, score


def counted(trials: Sequence[Trial]) -> str:
    """The numbers of trials that ended in each way."""
    counts = Counter(trial.status for trial in trials)
    words = ("whole", "stopped", "failed", "lost")
    return ", ".join(f"{counts[word]} {word}" for word in words if counts[word])


def as_csv(trials: Sequence[Trial]) -> str:
    """One row for each trial."""
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
    """Print the best trial, and save it as a configuration."""
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
            "config": describe(replace(best.config, seed=0)),  # reported seeds start at 0
            "trial": best.number,
            "point": best.point,
            f"validation_{best.target.score}": best.validation,
            "seed": best.config.seed,
            "versions": versions(),
        },
    )
    figures.save(draw(trials), directory.path / "search.png")
    ordered = sorted(trials, key=rank, reverse=True)
    table = Table(box=SIMPLE_HEAD)
    for heading in (
        "trial",
        *short(list(best.point)),
        "outer steps",
        f"validation {best.target.unit}",
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in ordered[:5]:
        if trial.status != "failed":
            values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.point.values())
            numbers = str(trial.outer_steps), format(trial.validation, trial.target.form)
            table.add_row(str(trial.number), *values, *numbers)
    console.print(f"{len(trials)} trials: {counted(trials)}; the best are", highlight=False)
    console.print(table)
    file = shlex.quote(str(directory.path / "best.json"))
    where = "on splits that it was not chosen on" if best.config.tuning_seed else "with test rows"
    seeds = " --seeds 3" if best.config.tuning_seed else ""
    console.print(
        f"run the best {where}:\n  equigrad run {name} --config {file}{seeds}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return trials


def short(paths: Sequence[str]) -> list[str]:
    """Dotted paths, shortened to as many last words as distinguish them.

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
    """Validation score against each hyperparameter that takes several values."""
    paths = [p for p in trials[0].point if len({str(t.point[p]) for t in trials}) > 1]
    paths = paths or list(trials[0].point)
    figure = Figure(figsize=(max(4.5, 3 * len(paths)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(paths), sharey=True, squeeze=False)[0]
    known = [trial.validation for trial in trials if trial.status != "failed"]
    beneath = min(known) - 0.05 * (max(known) - min(known))
    looks = {
        "whole": ("o", figures.COLORS[0], "all outer steps"),
        "stopped": (".", "gray", "stopped early"),
        "failed": ("x", figures.COLORS[1], "failed"),
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
    panels[0].set_ylabel(f"validation {trials[0].target.axis}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
