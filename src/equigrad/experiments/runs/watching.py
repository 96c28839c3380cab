"""What watches a run: its checkpoint, its files and its progress."""

from rich.console import Console

from equigrad.experiments.runs.experiment import Experiment
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.training import Callback, Checkpoint, JsonLines, TensorBoard
from equigrad.training.decay import LinearDecay
from equigrad.training.progress import ProgressBar


def watching(
    directory: RunDirectory, config: Experiment, label: str, *, resume: bool, console: Console
) -> list[Callback]:
    """The callbacks of every run, in their order.

    Args:
        directory: of the run.
        config: of the run.
        label: of its progress.
        resume: go on from the checkpoint that is there.
        console: shows the progress.
    """
    path, identity = directory.path / "checkpoint.pt", directory.identity
    falls = config.decays_from
    return [
        Checkpoint(path, config.checkpoint_every, resume=resume, identity=identity),
        *([] if falls is None else [LinearDecay(falls)]),
        JsonLines(directory.path / "metrics.jsonl"),
        TensorBoard(directory.path),
        ProgressBar(label, console),
    ]
