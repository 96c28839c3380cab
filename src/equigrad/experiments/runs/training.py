"""Training of a network in a run's directory, started or resumed, to its result."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import Experiment, Training
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.training import Callback, Checkpoint, JsonLines, OuterState, TensorBoard
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
    """Train and test, unless the run has a result, and return the content of `result.json`.

    Args:
        directory: directory of the run.
        config: settings of the run.
        label: label of the progress bar.
        train_and_test: called with the callbacks of the outer loop; returns the results, including
            `metrics`.
        digest: a checksum of data that may change before the run is resumed.
        resume: whether to continue from the checkpoint.
        console: console for the progress.
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


Config = TypeVar("Config", bound=Training)


class Trainer(ABC, Generic[Config]):
    """Trains on mini-batches, and tests.

    Attributes:
        config: the settings.
        digest: a checksum of the data; None for generated data.
        score: metric of the learning curves.
    """

    config: Config
    digest: str | None
    score: str

    @abstractmethod
    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Train."""

    @abstractmethod
    def finish(self, state: OuterState, folder: Path, console: Console) -> dict[str, Any]:
        """Save, test and draw the result; return the results, including `metrics`."""

    def learned(
        self, directory: RunDirectory, *, resume: bool, console: Console
    ) -> dict[str, float]:
        """Train and test in the run's directory, and return the metrics by name."""
        config, folder = self.config, directory.path

        def train_and_test(callbacks: Sequence[Callback]) -> dict[str, Any]:
            state = self.learn(callbacks)
            found = self.finish(state, folder, console)
            if state.history:
                curves = figures.learning_curves(state.history, self.score)
                figures.save(curves, folder / "learning.png")
            return {
                "estimator": type(config.estimator).__name__,
                "method": config.method,
                "paper": None,
                "outer_steps": state.step,
                "gradient_evaluations": state.gradient_evaluations,
                "seconds": state.seconds,
                **found,
            }

        return run_to_end(
            *(directory, config, config.label, train_and_test),
            digest=self.digest,
            resume=resume,
            console=console,
        )["metrics"]
