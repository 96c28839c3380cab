"""Training of a network in a run's directory, from its start or its checkpoint to its result."""

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
    """Train and test, unless the run has a result, and return what `result.json` says.

    Args:
        directory: of the run.
        config: of the run.
        label: of its progress.
        train_and_test: called with the callbacks of the outer loop; returns the results, `metrics`
            among them.
        digest: a checksum of data that may change before the run is resumed.
        resume: go on from the checkpoint that is there.
        console: shows the progress.
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
    """Trains by mini-batches, and tests.

    Attributes:
        config: the settings.
        digest: a checksum of the data; None where a formula draws them.
        score: the metric of the learning curves.
    """

    config: Config
    digest: str | None
    score: str

    @abstractmethod
    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Train."""

    @abstractmethod
    def finish(self, state: OuterState, folder: Path, console: Console) -> dict[str, Any]:
        """Save what was learned, test and draw it; return the results, `metrics` among them."""

    def learned(
        self, directory: RunDirectory, *, resume: bool, console: Console
    ) -> dict[str, float]:
        """Train and test, leave the run in its directory, and return the metrics by name."""
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
