"""Figures of single runs: learned strengths, learning curves, and curves of the report."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from equigrad.experiments.runs.formats import words
from equigrad.training.files import write_whole
from equigrad.training.targets import Target

MOST_POINTS = 400
"""The most points of a curve to draw."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that colour-blind readers can tell apart (Okabe, Ito 2008)."""

MARKERS = "o^sDvP*"
"""A marker for each colour."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; letters that the font lacks appear as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


def strength_learning(
    path: Path,
    *,
    history: Sequence[Mapping[str, Any]],
    strengths: Mapping[str, Tensor],
    title: str,
    target: Target,
    inputs: Sequence[str] = (),
) -> None:
    """Draw the score against outer steps, and the learned strengths by layer and by input.

    Args:
        path: the PNG file.
        history: rows with `outer_step` and the target's score on validation and test data.
        strengths: λ by name of the weight, in the order of the layers. The first acts on the inputs
            (hidden × inputs), which are the pixels of a square image unless they have names, or on
            the pixels under a kernel (maps × channels × height × width).
        title: title of the figure.
        target: the kind of target.
        inputs: names of the inputs.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(title)

    steps = [row["outer_step"] for row in history]
    for i, (name, dashes) in enumerate((("validation", "-"), ("test", "--"))):
        scores = [row[f"{name}_{target.score}"] for row in history]
        label = f"{name}, {target.say(scores[-1])} at the end"
        left.plot(steps, scores, dashes, color=color(i), label=label)
    left.set(xlabel="outer step", ylabel=target.axis)
    left.legend(loc="lower right")
    left.grid(alpha=0.3)

    weights = {name: s for name, s in strengths.items() if s.ndim > 1}
    largest = max(float(s.max()) for s in weights.values())
    for i, s in enumerate(weights.values()):
        middle.hist(
            s.flatten().numpy(),
            bins=40,
            range=(0, largest),
            histtype="step",
            linewidth=1.5,
            color=color(i),
            linestyle=("-", "--", "-.", ":")[i % 4],
            density=True,
            label=f"layer {i + 1} ({s.shape[1]}→{s.shape[0]})",
        )
    middle.set(xlabel="learned strength λ", ylabel="density", yscale="log")
    middle.legend()
    middle.grid(alpha=0.3)

    first = next(iter(weights.values()))
    if inputs:
        draw_inputs(right, dict(zip(inputs, first.mean(0).tolist(), strict=True)))
    else:
        kernel = first.ndim > 2
        side = math.isqrt(first[0, 0].numel() if kernel else first.shape[1])
        image = right.imshow(first.reshape(-1, side, side).mean(0).numpy(), cmap="viridis")
        seen = "pixel under the first kernels" if kernel else "input pixel"
        right.set(title=f"mean λ of each {seen}", xticks=[], yticks=[])
        figure.colorbar(image, ax=right, shrink=0.9)
    save(figure, path)


def curves(
    lines: Sequence[tuple[int, Sequence[tuple[float, float]]]], *, log: bool = False
) -> bytes:
    """Several lines against the outer step, as SVG.

    Args:
        lines: the number of each line's colour (`color`), and its points.
        log: whether to use a logarithmic axis if the values span a decade.
    """
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for i, points in lines:
        every = -(-len(points) // MOST_POINTS)
        kept = [*points[:-1:every], points[-1]]
        marker = "o" if len(kept) < 20 else None
        x, y = zip(*kept, strict=True)
        axes.plot(x, y, color=color(i), linewidth=1.4, alpha=0.85, marker=marker, markersize=3)
    positive = [value for _, points in lines for _, value in points if value > 0]
    if log and positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    axes.set_xlabel("outer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "equigrad"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def color(i: int) -> str:
    """The i-th line colour, as `#rrggbb`; colours repeat after seven."""
    return COLORS[i % len(COLORS)]


def draw_inputs(axes: Axes, means: Mapping[str, float], most: int = 16) -> None:
    """Bars of the inputs with the smallest strengths, which the network uses most."""
    least = sorted(means, key=lambda name: means[name])[:most]
    shown = [name if len(name) <= 24 else f"{name[:23]}…" for name in least]
    axes.barh(range(len(least)), [means[name] for name in least], color=COLORS[0])
    axes.set_yticks(range(len(least)), shown, fontsize=7, parse_math=False)
    which = (
        f"the {most} least regularised of {len(means)} inputs" if len(means) > most else "inputs"
    )
    axes.set(xlabel="mean λ", title=f"mean λ of {which}")
    axes.invert_yaxis()


def learning_curves(history: Sequence[Mapping[str, Any]], score: str) -> Figure:
    """Draw the validation score and the outer loss against outer steps and seconds.

    Args:
        history: rows of an outer loop, one for each outer step; some have `validation_SCORE`.
        score: name of the metric.
    """
    watched = [row for row in history if f"validation_{score}" in row]
    names = {"outer_loss": history} | ({f"validation_{score}": watched} if watched else {})
    figure = Figure(figsize=(9, 2.7 * len(names) + 0.3), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False, sharex="col", sharey="row")
    for row, (name, rows) in zip(panels, reversed(list(names.items())), strict=True):
        values = [float(entry[name]) for entry in rows]
        for axes, clock in zip(row, ("outer_step", "seconds"), strict=True):
            at = [entry[clock] for entry in rows]
            if name == "outer_loss":
                axes.plot(at, values, color=COLORS[0], linewidth=0.6, alpha=0.4)
                axes.plot(at, _smoothed(values), color=COLORS[0], linewidth=1.6)
            else:
                marker = "o" if len(at) < 40 else None
                axes.plot(at, values, color=COLORS[1], marker=marker, markersize=3)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(words(name))
    panels[-1][0].set_xlabel("outer step")
    panels[-1][1].set_xlabel("seconds")
    return figure


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running means over a twentieth of all values."""
    width = max(1, len(values) // 20)
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
