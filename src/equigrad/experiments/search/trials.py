"""Settings and trials of a hyperparameter search."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from equigrad.errors import ConfigurationError
from equigrad.experiments.search.spaces import SPACES, Point, Space, read_space
from equigrad.experiments.strengths.strength_learning import StrengthExperiment
from equigrad.fields import Checked, Count, NotNegative, Rule, require
from equigrad.training.targets import Classes, Target


@dataclass(frozen=True, kw_only=True)
class Search(Checked):
    """Search an experiment's hyperparameters with Ray Tune, by validation accuracy.

    The spaces are those of the paper's Tables S1 to S4. Trials run side by side, and those that lag
    behind at 10, 40 … outer steps are stopped (ASHA). The best one is saved as a configuration that
    `equigrad run NAME --config` takes.
    """

    experiment: Annotated[StrengthExperiment, tyro.conf.arg(name="")]
    """What every trial runs, but for the hyperparameters that are searched."""

    trials: Count | Literal["grid"] | None = None
    """Random points to try, each once, or the whole `grid`; None as the paper's table says."""

    space: Path | None = None
    """A file of what to vary instead: by option, a list or `{"log_uniform": [low, high]}`."""

    grace_period: Count = 10
    """Outer steps that every trial may take before it can be stopped."""

    reduction_factor: Annotated[float, Rule("above 1", lambda factor: factor > 1)] = 4.0
    """One trial in so many goes on after the grace period, and again after each multiple."""

    parallel: Count | None = None
    """Trials at once; None for as many as there are CPUs for their threads."""

    gpus: NotNegative | None = None
    """GPUs of a trial, 0.5 for two on each; None for one where the device is CUDA."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or `auto`; None starts Ray here and ends it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.experiment.seeds is None,
            f"every trial runs one seed, given by seed; got seeds={self.experiment.seeds}",
        )

    def what(self) -> "Search":
        """The search without the options that say where it runs, which may change on resume."""
        return replace(self, parallel=None, gpus=None, address=None)

    def find_space(self) -> Space:
        """The user's space, or the one of the experiment and its estimator."""
        if self.space is not None:
            return read_space(self.space)
        experiment = self.experiment
        what = getattr(experiment, "setting", type(experiment).__name__.lower())
        if (space := SPACES.get((what, experiment.estimator))) is None:
            raise ConfigurationError(
                f"there is no search space for {what} with estimator {experiment.estimator}; "
                f"give one with --space FILE"
            )
        return space

    def points(self, space: Space) -> list[Point]:
        """What to try of a space."""
        trials = space.trials if self.trials is None else self.trials
        return space.points(None if trials == "grid" else trials, self.experiment.seed)


def preset(kind: type[StrengthExperiment], **chosen: str) -> Search:
    """The defaults of a search through the settings of an experiment."""
    return Search(experiment=replace(kind.preset(**chosen), seed=kind.tuning_seed))


@dataclass(kw_only=True)
class Trial:
    """A point of the search space, and the result of its run.

    Attributes:
        number: in the order of the points.
        point: values by dotted path of the option.
        config: the experiment with these values.
        folder: of its run.
        status: `whole` where it took all outer steps, `stopped` where it lagged behind, `failed`
            where it cannot be computed; `lost` where its process or its disk failed, and `waiting`
            until it is known.
        target: what is learned.
        history: outer steps done, and the validation score after them.
        seconds: spent in the outer loop.
        error: why it failed.
    """

    number: int
    point: Point
    config: StrengthExperiment
    folder: Path
    status: Literal["waiting", "whole", "stopped", "failed", "lost"] = "waiting"
    target: Target = field(default_factory=Classes)
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    ENDING: ClassVar = ("status", "history", "seconds", "error")

    @property
    def outer_steps(self) -> int:
        """Outer steps whose worth is known."""
        return self.history[-1][0] if self.history else 0

    @property
    def validation(self) -> float:
        """The last validation score."""
        return self.history[-1][1] if self.history else float("nan")

    @property
    def ended(self) -> bool:
        """Whether it need not be run again."""
        return self.status not in ("waiting", "lost")

    @property
    def summary(self) -> str:
        """Its end in a line."""
        said = f"trial {self.number}: {self.status} after {self.outer_steps} outer steps"
        if self.history:
            said += f", validation {self.target.say(self.validation)}"
        return f"{said}; {self.error}" if self.error else said
