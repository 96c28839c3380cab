"""Settings shared by the experiments on users' data, CSV files and folders of images."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from torch.nn import Module

from equigrad.experiments.runs.model import Architecture, Model
from equigrad.experiments.strengths.strength_learning import LearningAlike
from equigrad.fields import NotNegative, Share
from equigrad.problems import Params
from equigrad.training.split import Split


@dataclass(frozen=True, kw_only=True)
class OwnData(LearningAlike):
    """Settings for the user's data and their division into sets."""

    tuning_seed: ClassVar[int] = 0
    """Seed of the split in a search, since a run with the same seed has the same test rows."""

    scale: Literal["smoke", "small"] = "small"
    """`smoke` presets a few short steps, for a quick check that everything works."""

    test_share: Share = 0.2
    """Share of the rows in the test set, which is used for the test column alone."""

    initial_strength: NotNegative | None = None
    """Initial value of all strengths; None for the best single strength."""

    @classmethod
    def _preset(cls, **chosen: str) -> Self:
        """The default settings of a scale; options without a default come from the command line."""
        import tyro  # the command line's

        missing: dict[str, Any] = dict.fromkeys(cls._asked_for(), tyro.MISSING)
        defaults = cls(**missing)
        if chosen.get("scale") != "smoke":
            return defaults
        return replace(
            defaults,
            scale="smoke",
            outer_steps=3,
            solver=replace(defaults.solver, max_steps=20),
            nudged_steps=5,
        )

    @classmethod
    @abstractmethod
    def _asked_for(cls) -> tuple[str, ...]:
        """The options without a default, which callers in Python must give."""

    def _awaited(self, value: object) -> bool:
        import tyro  # the command line's

        return value is tyro.MISSING

    @abstractmethod
    def architecture(self, split: Split) -> Architecture:
        """The architecture of the network for these data."""

    def network(self, split: Split) -> Module:
        """The network."""
        return self.architecture(split).build()

    def model(self, split: Split, params: Params) -> Model:
        """The model for `equigrad predict`."""
        return Model(self.architecture(split), dict(params), split.target, split.encoding)
