"""One run from its start, or from where it was stopped, to its result: `run_to_end`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from equigrad.experiments.runs.experiment import Experiment
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.training import Callback, Checkpoint, JsonLines, TensorBoard
from equigrad.training.decay import LinearDecay
from equigrad.training.progress import ProgressBar


def run_to_end(
    directory: RunDirectory,
    config: Experiment,
    label: str,
    train_and_test: Callable[[Sequence[Callback]], Mapping[str, Any]],
    *,
    digest: str | None = None,
    resume: bool,
    console: Console,
) -> dict[str, Any]:
    """Train and test in a run's directory, unless it has a result already.

    Args:
        directory: of the run.
        config: of the run.
        label: of its progress.
        train_and_test: called with the callbacks of the outer loop, which keep checkpoints, log and
            show progress; returns what `result.json` is to say, `metrics` among it.
        digest: a checksum of data that may change between a run and its resumption.
        resume: go on from the checkpoint that is there.
        console: shows the progress.

    Returns:
        What `result.json` says.

    Raises:
        RunError: the data, or the files of the run, are not those that it began with.
    """
    if digest is not None:
        directory.keep_to_data(digest)
    if (ended := directory.result) is not None:
        return ended
    falls = config.decays_from
    callbacks = [
        Checkpoint(
            directory.path / "checkpoint.pt",
            config.checkpoint_every,
            resume=resume,
            identity=directory.identity,
        ),
        *([] if falls is None else [LinearDecay(falls)]),
        JsonLines(directory.path / "metrics.jsonl"),
        TensorBoard(directory.path),
        ProgressBar(label, console),
    ]
    return directory.end(config, **train_and_test(callbacks))
