"""The commands of `equigrad`; their modules are imported only when they run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

SEARCHED = "search.trials:Search"
"""The settings class of a search."""


@dataclass(frozen=True)
class Command:
    """A command `equigrad VERB NAME`: its settings class and the function that runs it.

    Attributes:
        verb: `run`, `search` or `reproduce`.
        name: name of the experiment or reproduction.
        place: its class, as `MODULE:CLASS` in this package.
        worker: the function that runs it, as `MODULE:FUNCTION`.
    """

    verb: str
    name: str
    place: str
    worker: str

    @property
    def summary(self) -> str:
        """The first line of the class's docstring, read from the file, since imports are slow."""
        module, _, name = (SEARCHED if self.verb == "search" else self.place).partition(":")
        source = (Path(__file__).parent / f"{module.replace('.', '/')}.py").read_text("utf-8")
        said = re.search(rf'^class {name}\b.*?"""(.*?)("""|\n)', source, re.M | re.S)
        return said[1] if said else ""

    @property
    def kind(self) -> type[Any]:
        """The class of the experiment or reproduction."""
        return found(self.place)

    @property
    def work(self) -> Callable[..., object]:
        """The function that runs the command, called with a config and a folder."""
        return found(self.worker)

    def defaults(self, **chosen: str) -> Any:
        """The default config for some choices."""
        if self.verb == "search":
            return found("search.trials:preset")(self.kind, **chosen)
        return self.kind.preset(**chosen)


def found(place: str) -> Any:
    """An object of a module of this package, by `MODULE:NAME`."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def paper_tables() -> list[type[Any]]:
    """The reproductions that are tables by seed, which a page of results has."""
    base = found("runs.reproduction:ByExperiments")
    kinds = (command.kind for command in COMMANDS if command.verb == "reproduce")
    return [kind for kind in kinds if issubclass(kind, base)]


def reproduced(name: str, place: str) -> Command:
    """The command of a figure or table."""
    return Command("reproduce", name, place, "runs.reproduction:reproduce")


LEARN_STRENGTHS = "strengths.strength_learning:learn_strengths"
SEARCH = "search.search:search"

COMMANDS = (
    Command("run", "digits", "strengths.digits:Digits", LEARN_STRENGTHS),
    Command("run", "mnist", "strengths.images:Mnist", LEARN_STRENGTHS),
    Command("run", "cifar10", "strengths.images:Cifar10", LEARN_STRENGTHS),
    Command("run", "tabular", "strengths.tabular:Tabular", LEARN_STRENGTHS),
    Command("run", "folder", "strengths.folder:Folder", LEARN_STRENGTHS),
    Command("run", "sinusoid", "few_shot.sinusoid:Sinusoid", "few_shot.sinusoid:compare_learners"),
    Command("run", "omniglot", "few_shot.omniglot:Omniglot", "few_shot.meta_training:meta_train"),
    Command(
        *("run", "equilibrium", "settling.equilibrium:Equilibrium"),
        worker="settling.equilibrium:train_on_images",
    ),
    Command(
        *("run", "representation", "settling.representation:Representation"),
        worker="settling.representation:learn_picture",
    ),
    Command("search", "digits", "strengths.digits:Digits", SEARCH),
    Command("search", "mnist", "strengths.images:Mnist", SEARCH),
    Command("search", "tabular", "strengths.tabular:Tabular", SEARCH),
    Command("search", "cifar10", "strengths.images:Cifar10", SEARCH),
    reproduced("matched-phases", "theory.matched_phases:MatchedPhases"),
    reproduced("fig1", "theory.bound:Fig1"),
    reproduced("fig2", "theory.boston:Fig2"),
    reproduced("figS1", "theory.bound:FigS1"),
    reproduced("figS2", "theory.bound:FigS2"),
    reproduced("figS3", "theory.quadratic:FigS3"),
    reproduced("figS4", "theory.quadratic:FigS4"),
    reproduced("figS5", "theory.quadratic:FigS5"),
    reproduced("figS6", "theory.quadratic:FigS6"),
    reproduced("accuracy", "theory.accuracy:Accuracy"),
    reproduced("table1", "strengths.table1:Table1"),
    reproduced("table2", "few_shot.table2:Table2"),
    reproduced("fig3", "strengths.first_phase:Fig3"),
    reproduced("equilibrium", "settling.equilibrium_table:EquilibriumTable"),
)
"""All commands, in the order of `equigrad list`."""
