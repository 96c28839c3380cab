"""Saves scores or learned weights of training examples as a table, a figure and a summary."""

import inspect
import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments.runs.figures import save
from equigrad.training.files import write_whole
from equigrad.training.learned_weights import LearnedWeights, learn_weights
from equigrad.training.ranked import Ranked
from equigrad.training.scores import ExampleScores, example_scores

SHOWN = 5
"""Number of the most harmful examples to print."""


def score(
    described: Mapping[str, Any],
    folder: Path,
    *,
    resume: bool,
    console: Console,
    learn: int | None = None,
) -> Ranked:
    """Compute the scores that a user describes, or learn weights, and save them.

    Args:
        described: arguments of `example_scores`, or of `learn_weights`.
        folder: folder for `scores.csv` or `weights.csv`, the same as `.parquet` (if pandas and
            pyarrow are installed) and `.png`, `result.json` and the finished runs.
        resume: whether to continue with the runs in the folder.
        console: console for progress and the verdict.
        learn: outer steps of learned weights; None for scores.

    Raises:
        ConfigurationError: unknown or missing arguments.
        RunError: the folder is not empty, and `resume` is False.
    """
    function: Any = example_scores if learn is None else learn_weights
    _check_described(described, function)
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise RunError(
            f"{folder} is not empty, and nothing is overwritten. Add --resume to resume the runs "
            f"in it, or give another --out"
        )

    def progress(said: str) -> None:
        console.print(said, highlight=False)

    further = {} if learn is None else {"outer_steps": learn}
    found = function(**described, **further, folder=folder, progress=progress)
    kind = f"{found.column}s"
    found.save(folder / f"{kind}.csv")
    if find_spec("pandas") and find_spec("pyarrow"):
        found.save(folder / f"{kind}.parquet")
    draw(found, folder / f"{kind}.png")
    write_whole(folder / "result.json", json.dumps(_summary(found), indent=2))
    console.print(found.status, markup=False, highlight=False, soft_wrap=True)
    worst = ", ".join(found.names[i] for i in found.ranking()[:SHOWN])
    console.print(f"most harmful: {worst}", markup=False, highlight=False, soft_wrap=True)
    return found


def _check_described(described: Mapping[str, Any], function: Any) -> None:
    taken = inspect.signature(function).parameters
    known = set(taken) - {"folder", "progress", "outer_steps"}
    name = function.__name__
    if unknown := sorted(set(described) - known):
        raise ConfigurationError(
            f"{name} has no arguments {unknown}; its arguments are {sorted(known)}"
        )
    needed = {name for name in known if taken[name].default is inspect.Parameter.empty}
    if missing := sorted(needed - set(described)):
        raise ConfigurationError(f"the description lacks {missing}")


def _summary(found: ExampleScores | LearnedWeights) -> dict[str, Any]:
    summary = {"status": found.status, "gradient_evaluations": found.gradient_evaluations}
    if isinstance(found, LearnedWeights):
        return summary | {"validation_losses": list(found.validation_losses)}
    signs = {name: getattr(found, name) for name in ("agreement", "steadiness", "linearity")}
    known = {name: None if math.isnan(value) else value for name, value in signs.items()}
    return summary | known | {"trusted": found.trusted, "validation_loss": found.validation_loss}


def draw(found: ExampleScores | LearnedWeights, path: Path) -> None:
    """Draw the sorted scores or weights, and how far they can be trusted."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    values = found.table()[found.column]
    axes.fill_between(range(1, len(values) + 1), values, step="mid", alpha=0.6)
    axes.set_xlabel("rank, the most harmful first")
    if isinstance(found, LearnedWeights):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("learned weight")
        axes.set_title(found.status, fontsize="medium", wrap=True)
    else:
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("lowers the validation loss by, per weight")
        trust = "" if found.trusted else "not to be trusted: "
        signs = {"runs": found.agreement, "halves": found.steadiness, "two β": found.linearity}
        known = [f"{name} {value:.2f}" for name, value in signs.items() if not math.isnan(value)]
        said = f"{trust}agreement of {', '.join(known)}" if known else "one run alone"
        axes.set_title(said, fontsize="medium", wrap=True)
    save(figure, path)
