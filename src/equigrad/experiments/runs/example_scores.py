"""Saves the scores of training examples as a table, a figure and a summary."""

import inspect
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments.runs.figures import save
from equigrad.training.files import write_whole
from equigrad.training.scores import ExampleScores, example_scores

SHOWN = 5
"""Number of the most harmful examples to print."""


def score(
    described: Mapping[str, Any], folder: Path, *, resume: bool, console: Console
) -> ExampleScores:
    """Compute the scores that a user describes, and save them.

    Args:
        described: arguments of `example_scores`.
        folder: folder for `scores.csv`, `scores.parquet` (if pandas and pyarrow are installed),
            `scores.png`, `result.json` and the finished runs.
        resume: whether to continue with the runs in the folder.
        console: console for progress and the verdict.

    Raises:
        ConfigurationError: unknown or missing arguments.
        RunError: the folder is not empty, and `resume` is False.
    """
    taken = inspect.signature(example_scores).parameters
    known = set(taken) - {"folder", "progress"}
    if unknown := sorted(set(described) - known):
        raise ConfigurationError(f"example_scores takes no {unknown}; it takes {sorted(known)}")
    needed = {name for name in known if taken[name].default is inspect.Parameter.empty}
    if missing := sorted(needed - set(described)):
        raise ConfigurationError(f"the description lacks {missing}")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise RunError(
            f"{folder} is not empty, and nothing is written over. Add --resume to go on with the "
            f"runs that are there, or give another --out"
        )

    def progress(said: str) -> None:
        console.print(said, highlight=False)

    found = example_scores(**described, folder=folder, progress=progress)
    found.save(folder / "scores.csv")
    if find_spec("pandas") and find_spec("pyarrow"):
        found.save(folder / "scores.parquet")
    draw(found, folder / "scores.png")
    summary = {
        "agreement": found.agreement,
        "steadiness": found.steadiness,
        "trusted": found.trusted,
        "validation_loss": found.validation_loss,
        "gradient_evaluations": found.gradient_evaluations,
        "status": found.status,
    }
    write_whole(folder / "result.json", json.dumps(summary, indent=2))
    console.print(found.status, markup=False, highlight=False, soft_wrap=True)
    worst = ", ".join(found.names[i] for i in found.ranking()[:SHOWN])
    console.print(f"most harmful: {worst}", markup=False, highlight=False, soft_wrap=True)
    return found


def draw(found: ExampleScores, path: Path) -> None:
    """Draw the sorted scores, and how far they can be trusted."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    scores = found.table()["score"]
    axes.fill_between(range(1, len(scores) + 1), scores, step="mid", alpha=0.6)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("rank, the most harmful first")
    axes.set_ylabel("lowers the validation loss by, per weight")
    trust = "" if found.trusted else "not to be trusted: "
    axes.set_title(
        f"{trust}agreement of runs {found.agreement:.2f}, of halves {found.steadiness:.2f}"
    )
    save(figure, path)
