"""What can be run, searched and reproduced, by name: a module is imported when it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """`equigrad VERB NAME`: a config with defaults that some words choose, and its work.

    Attributes:
        verb: `run`, `search` or `reproduce`.
        name: of what is run.
        place: of the experiment's or reproduction's class, `MODULE:CLASS` in this package.
        worker: of the function that does the work, `MODULE:FUNCTION`.
        summary: the first line of the config's documentation.
    """

    verb: str
    name: str
    place: str
    worker: str
    summary: str

    @property
    def kind(self) -> type[Any]:
        """The class of the experiment or reproduction."""
        return found(self.place)

    @property
    def work(self) -> Callable[..., object]:
        """What does the work, of a config and a folder."""
        return found(self.worker)

    def defaults(self, **chosen: str) -> Any:
        """The config that some words choose."""
        if self.verb == "search":
            return found("search.trials:preset")(self.kind, **chosen)
        return self.kind.preset(**chosen)


def found(place: str) -> Any:
    """What a module of this package defines, by `MODULE:NAME`."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def reproduced(name: str, place: str, summary: str) -> Command:
    """The command of a figure or table."""
    return Command("reproduce", name, place, "runs.reproduction:reproduce", summary)


def searched(name: str, place: str) -> Command:
    """The command that searches an experiment's hyperparameters."""
    summary = "Search an experiment's hyperparameters with Ray Tune, by validation accuracy."
    return Command("search", name, place, "search.search:search", summary)


COMMANDS = (
    Command(
        "run",
        "digits",
        "strengths.digits:Digits",
        "strengths.strength_learning:run",
        "Learn a regularisation strength for every weight of a network that sees ten images.",
    ),
    Command(
        "run",
        "mnist",
        "strengths.images:Mnist",
        "strengths.strength_learning:run",
        "Learn a strength for every weight of a tanh network that sees 1, 10 or 30,000 "
        "MNIST digits.",
    ),
    Command(
        "run",
        "cifar10",
        "strengths.images:Cifar10",
        "strengths.strength_learning:run",
        "Learn a strength for every weight of a LeNet-5 that sees 50 photographs of CIFAR-10.",
    ),
    Command(
        "run",
        "tabular",
        "strengths.tabular:Tabular",
        "strengths.strength_learning:run",
        "Learn a regularisation strength for every weight of a network that reads your "
        "own CSV file.",
    ),
    Command(
        "run",
        "folder",
        "strengths.folder:Folder",
        "strengths.strength_learning:run",
        "Learn a regularisation strength for every weight of a LeNet-5 that sees your own images.",
    ),
    Command(
        "run",
        "sinusoid",
        "few_shot.sinusoid:Sinusoid",
        "few_shot.sinusoid:run",
        "Learn from many sinusoids how to learn the next one from ten of its points.",
    ),
    Command(
        "run",
        "omniglot",
        "few_shot.omniglot:Omniglot",
        "few_shot.harness:run",
        "Learn to tell new characters apart, from one or a few drawings of each.",
    ),
    Command(
        "run",
        "equilibrium",
        "settling.equilibrium:Equilibrium",
        "settling.equilibrium:run",
        "Train a network whose neurons settle to tell images apart.",
    ),
    Command(
        "run",
        "representation",
        "settling.representation:Representation",
        "settling.representation:run",
        "Learn a picture, from place to colour, by a recurrent network at rest.",
    ),
    searched("digits", "strengths.digits:Digits"),
    searched("mnist", "strengths.images:Mnist"),
    searched("cifar10", "strengths.images:Cifar10"),
    reproduced(
        "matched-phases",
        "theory.matched_phases:MatchedPhases",
        "Error of the contrastive rule on the quadratic of Appendix E against the length "
        "of phases.",
    ),
    reproduced(
        "fig1",
        "theory.bound:Fig1",
        "Fig. 1: the bound of Theorem 2 against β, and against the distance to equilibrium.",
    ),
    reproduced(
        "fig2",
        "theory.boston:Fig2",
        "Fig. 2: error on Boston housing against β, steps, and how they are divided.",
    ),
    reproduced(
        "figS1",
        "theory.bound:FigS1",
        "Fig. S1: the bound of Theorem 2 against β, the nudged phase's precision fixed.",
    ),
    reproduced(
        "figS2",
        "theory.bound:FigS2",
        "Fig. S2: the least bound and its β, as Corollary 1 has them, against the distance δ = δ'.",
    ),
    reproduced(
        "figS3",
        "theory.quadratic:FigS3",
        "Fig. S3: error on the quadratic against β, for p = 2, 3, 4, and at exact equilibrium.",
    ),
    reproduced(
        "figS4",
        "theory.quadratic:FigS4",
        "Fig. S4: error on the quadratic against the number of steps, for several β.",
    ),
    reproduced(
        "figS5",
        "theory.quadratic:FigS5",
        "Fig. S5: least error on the quadratic over β, and that β, against the number of steps.",
    ),
    reproduced(
        "figS6",
        "theory.quadratic:FigS6",
        "Fig. S6: error on the quadratic against the free phase's part of a fixed number of steps.",
    ),
    reproduced(
        "accuracy",
        "theory.accuracy:Accuracy",
        "The error that was asked for, the estimated and the true one, and what others cost.",
    ),
    reproduced(
        "table1",
        "strengths.table1:Table1",
        "Table 1: accuracy after strengths were learned, on MNIST and CIFAR-10 with few images.",
    ),
    reproduced(
        "table2",
        "few_shot.table2:Table2",
        "Table 2: accuracy on characters never seen, after few-shot learning by several methods.",
    ),
    reproduced(
        "fig3",
        "strengths.first_phase:Fig3",
        "Fig. 3: validation accuracy against the steps of the first phase, and against β.",
    ),
    reproduced(
        "equilibrium",
        "settling.equilibrium_table:EquilibriumTable",
        "Test accuracy of networks that settle, by equilibrium propagation, least "
        "control and exactly.",
    ),
)
"""All that there are, in the order of `equigrad list`."""
