"""Figures of few-shot learning: episodes of images, sine curves, learning curves."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.experiments.runs.figures import COLORS, MARKERS, color
from equigrad.tasks import TaskBatch, curves

RIGHT, WRONG, PLAIN = "#2e9f5b", "#d1344b", "#c9ccd1"
"""Colours of the frames around images."""

GAP = 0.55
"""Space between support and query images, in widths of an image."""


def task_sheet(
    batch: TaskBatch,
    predictions: Tensor | None = None,
    *,
    tasks: int = 4,
    shots: int = 5,
    queries: int = 6,
    inverted: bool = True,
) -> Figure:
    """The first tasks of a batch: a row for each class, with its support and query images.

    Args:
        batch: tasks of images with 1 or 3 channels, labelled from 0.
        predictions: tasks × queries, the class that each query is taken for. A right one has a
            green frame, a wrong one a red frame and the class it is taken for in its corner.
        tasks: at most so many are drawn.
        shots: likewise, images of a class to learn from.
        queries: likewise, images of a class that are asked.
        inverted: whether 1 is black in grey images, as with Omniglot, where ink is what counts.

    Raises:
        ConfigurationError: the batch is not of images, or predictions are not one for each query.
    """
    if batch.support[0].ndim != 5 or batch.support[0].shape[2] not in (1, 3):
        raise ConfigurationError(
            f"a sheet shows images, tasks × n × (1 or 3) channels × height × width, got inputs of "
            f"shape {tuple(batch.support[0].shape)}"
        )
    if predictions is not None and predictions.shape != batch.query[1].shape:
        raise ConfigurationError(
            f"predictions must be one for each query, {tuple(batch.query[1].shape)}, got "
            f"{tuple(predictions.shape)}"
        )
    shown = min(tasks, len(batch))
    ways = int(batch.support[1][:shown].max()) + 1
    shots = min(shots, batch.support[0].shape[1] // ways)
    queries = min(queries, batch.query[0].shape[1] // ways)
    across = shots + GAP + queries
    columns = min(2, shown)
    rows = -(-shown // columns)
    figure = Figure(
        figsize=(columns * (0.62 * across + 0.5), rows * (0.62 * ways + 0.75)), layout="constrained"
    )
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08}).flatten()
    for panel in panels[shown:]:
        panel.set_axis_off()
    for task, panel in enumerate(panels[:shown]):
        pixels = [_displayed(t[task], inverted) for t in (batch.support[0], batch.query[0])]
        labels = batch.support[1][task].tolist(), batch.query[1][task].tolist()
        said = None if predictions is None else predictions[task].tolist()
        for label in range(ways):
            learned = [i for i, own in enumerate(labels[0]) if own == label][:shots]
            for column, i in enumerate(learned):
                _tile(panel, pixels[0][i], column, label, PLAIN)
            asked = [i for i, own in enumerate(labels[1]) if own == label][:queries]
            for column, i in enumerate(asked):
                x = shots + GAP + column
                wrong = said is not None and said[i] != label
                color = PLAIN if said is None else WRONG if wrong else RIGHT
                _tile(panel, pixels[1][i], x, label, color)
                if said is not None and wrong:
                    _mark(panel, x, label, str(said[i] + 1))
        panel.set(xlim=(-0.1, across + 0.1), ylim=(ways + 0.05, -0.05), aspect="equal")
        panel.set_yticks([label + 0.5 for label in range(ways)], [str(k + 1) for k in range(ways)])
        panel.set_xticks([shots / 2, shots + GAP + queries / 2], ["support", "queries"])
        panel.tick_params(length=0, labelcolor="#555555")
        panel.spines[:].set_visible(False)
        score = ""
        if said is not None:
            hits = sum(guess == own for guess, own in zip(said, labels[1], strict=True))
            score = f": {hits} of {len(said)} right"
        panel.set_title(f"task {task + 1}{score}", fontsize=10)
    return figure


def sinusoid_fits(
    batch: TaskBatch, before: Tensor, after: Tensor, grid: Tensor, *, tasks: int = 4
) -> Figure:
    """The first tasks of a batch: each curve, its known points, and the predictions.

    Args:
        batch: tasks of sinusoids.
        before: predictions before adaptation, tasks × points, or tasks × points × 1.
        after: likewise, after it.
        grid: points at which predictions were made.
        tasks: at most so many are drawn.

    Raises:
        ConfigurationError: predictions are not one for each point of the grid and task.
    """
    grid = grid.detach().flatten().cpu()
    for name, predictions in (("before", before), ("after", after)):
        if predictions.numel() != len(batch) * len(grid) or len(predictions) != len(batch):
            raise ConfigurationError(
                f"{name} must be a prediction for each of {len(batch)} tasks and {len(grid)} "
                f"points, got {tuple(predictions.shape)}"
            )
    batch = batch[:tasks].to("cpu")
    true = curves(batch, grid)
    columns = min(2, len(batch))
    rows = -(-len(batch) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.5 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for panel in panels[len(batch) :]:
        panel.set_axis_off()
    lines: list[Any] = []
    for task, panel in enumerate(panels[: len(batch)]):
        x, y = (t[task].flatten().numpy() for t in batch.support)
        guesses = [p[task].detach().flatten().cpu().double() for p in (before, after)]
        errors = [float((guess - true[task]).square().mean()) for guess in guesses]
        lines = [
            panel.plot(grid, true[task], color="#222222", linewidth=1.2)[0],
            panel.plot(grid, guesses[0], color="gray", linewidth=1.4, linestyle=":")[0],
            panel.plot(grid, guesses[1], color=COLORS[0], linewidth=2, alpha=0.85)[0],
            panel.plot(x, y, "o", color=COLORS[1], markersize=6, markeredgecolor="white")[0],
        ]
        panel.set_title(f"mean squared error {errors[0]:.2g} → {errors[1]:.2g}", fontsize=10)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    names = [
        "true curve",
        "before adaptation",
        "after adaptation",
        f"{batch.support[0].shape[1]} points known",
    ]
    figure.legend(lines, names, loc="outside lower center", ncols=2 * columns, frameon=False)
    return figure


def adaptation_curves(
    learning: Mapping[str, Sequence[tuple[int, float]]],
    adaptation: Mapping[str, Sequence[tuple[int, float]]],
) -> Figure:
    """Errors of several methods: during meta-training, and during adaptation to a new task.

    Args:
        learning: by label of the method, outer steps and the error on tasks of validation then.
        adaptation: likewise, steps of adaptation and the error on tasks of the test after them.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: list[Any] = []
    for i, (label, points) in enumerate(adaptation.items()):
        marker = MARKERS[i % len(MARKERS)]
        style: dict[str, Any] = {"color": color(i), "marker": marker, "markersize": 4}
        if learning.get(label):
            left.plot(*zip(*learning[label], strict=True), linewidth=1.6, **style)
        lines += right.plot(*zip(*points, strict=True), label=label, **style)
    left.set(xlabel="outer step", ylabel="mean squared error, validation", yscale="log")
    right.set(xlabel="steps of adaptation", ylabel="mean squared error, test", yscale="log")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(left=-0.1)
    ticks = sorted({steps for points in adaptation.values() for steps, _ in points})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def _displayed(images: Tensor, inverted: bool) -> list[Any]:
    """An image for `imshow`: height × width × 3, with all values from 0 (black) to 1 (white)."""
    images = images.detach().cpu().double()
    low, high = images.amin(), images.amax()
    scaled = (images - low) / (high - low).clamp(min=1e-12)
    if inverted and scaled.shape[1] == 1:
        scaled = 1 - scaled
    return list(scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def _tile(axes: Axes, pixels: Any, x: float, y: float, color: str) -> None:
    """An image of one unit's size in its frame, whose upper left corner is at (x, y)."""
    edge = 0.06
    extent = (x + edge, x + 1 - edge, y + 1 - edge, y + edge)
    axes.imshow(pixels, extent=extent, interpolation="nearest")
    side = 1 - 2 * edge
    width = 0.8 if color == PLAIN else 1.8
    axes.add_patch(
        Rectangle((x + edge, y + edge), side, side, fill=False, edgecolor=color, linewidth=width)
    )


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    """Mark the corner of an image with the predicted class."""
    axes.text(
        *(x + 0.925, y + 0.925, text),
        ha="right",
        va="bottom",
        color="white",
        fontsize=7,
        fontweight="bold",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": WRONG, "edgecolor": "none"},
    )
