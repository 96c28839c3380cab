"""What watches a run: its checkpoint, its files and its progress."""

from rich.console import Console

from equigrad.experiments.run_directory import RunDirectory
from equigrad.training import Callback, Checkpoint, JsonLines, TensorBoard
from equigrad.training.decay import LinearDecay
from equigrad.training.progress import ProgressBar


def watching(
    directory: RunDirectory,
    label: str,
    *,
    every: int,
    resume: bool,
    console: Console,
    decay: float | None = None,
) -> list[Callback]:
    """The callbacks of every run, in their order.

    Args:
        directory: of the run.
        label: of its progress.
        every: outer steps between two checkpoints.
        resume: go on from the checkpoint that is there.
        console: shows the progress.
        decay: the step size that falls linearly to zero, if one does.
    """
    path, identity = directory.path / "checkpoint.pt", directory.identity
    return [
        Checkpoint(path, every, resume=resume, identity=identity),
        *([] if decay is None else [LinearDecay(decay)]),
        JsonLines(directory.path / "metrics.jsonl"),
        TensorBoard(directory.path),
        ProgressBar(label, console),
    ]
