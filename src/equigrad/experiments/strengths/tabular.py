"""The tabular experiment: a strength for every input of networks trained on a CSV file."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from equigrad.errors import DataError
from equigrad.estimators import Contrastive
from equigrad.experiments.runs.model import Architecture, Model
from equigrad.experiments.strengths.own_data import OwnData
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.experiments.tables.encoding import Missing, fit
from equigrad.experiments.tables.reading import Decimal, Header, Table, read
from equigrad.experiments.tables.target import TaskName, read_target
from equigrad.fields import Count, CountFrom2, Positive
from equigrad.nn.committee import named_by_member
from equigrad.nn.networks import tanh_network
from equigrad.problems import Params
from equigrad.solvers import LBFGS
from equigrad.training.folded import RULE, SOLVER, FoldedLearner
from equigrad.training.folds import Folds
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import Split, held_back
from equigrad.training.targets import Classes, Numbers
from equigrad.wording import counted, listed, meant


@dataclass(frozen=True, kw_only=True)
class Tabular(OwnData):
    """Learn a regularisation strength for every input of networks that read your own CSV file.

    Networks learn side by side, one a fold, each without the rows that judge it. The strengths, one
    an input and one a later layer, follow the hypergradient of those rows' loss. Beside it: no
    regularisation, the best single strength, and the other estimator, all on the same rows and
    starts. The run leaves a model for `equigrad predict`.
    """

    per: ClassVar[str] = "input"

    csv: Path
    """CSV file of the table: a header with the names of the columns, and rows."""

    target: str
    """Name of the target column."""

    task: TaskName = "auto"
    """Whether the target is a class or a number; `auto` decides by its values, and reports it."""

    ignore: tuple[str, ...] = ()
    """Columns to leave out."""

    categorical: tuple[str, ...] = ()
    """Columns whose values are categories, even if they look like numbers."""

    missing: Missing = "impute"
    """`impute` fills in missing values and reports where; `drop` leaves out rows that have any."""

    header: Header = "auto"
    """Whether the first row has the columns' names; `auto` asks if it is mostly numbers."""

    delimiter: str | None = None
    """The character between columns; by default whichever of , ; tab | divides the header."""

    encoding: str | None = None
    """Encoding of the file; by default UTF-8, UTF-16 with a byte-order mark, else Latin-1."""

    decimal: Decimal | None = None
    """The decimal mark; by default detected from the numbers."""

    hidden: tuple[Count, ...] = (64, 64)
    """Widths of the hidden tanh layers."""

    folds: CountFrom2 = 2
    """Number of networks trained side by side, each validated on rows that it does not see."""

    outer_steps: Count = 15
    """Largest number of steps on the logarithms of the strengths; held-out rows stop earlier."""

    outer_lr: Positive = 0.5
    """Root mean square of such a step; no strength changes by more than a factor of e."""

    solver: LBFGS = SOLVER
    """How the networks are trained; Adam is used instead if there are more than 30,000 rows."""

    contrastive: Contrastive = RULE
    """The contrastive rule; its nudged phases use the free phase's solver, but their own length."""

    nudged_steps: Count = 5
    """Number of steps of each nudged phase."""

    @classmethod
    def _asked_for(cls) -> tuple[str, ...]:
        return "csv", "target"

    @property
    def name(self) -> str:
        """The table and its target."""
        return f"{self.target} of {Path(self.csv).name}"

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Rows drawn by the seed; the encoding is fitted to those for training and validation."""
        target, table, values, notes = read_target(self._table(), self.target.strip(), self.task)
        groups = (
            values if isinstance(target, Classes) else torch.zeros(len(table), dtype=torch.long)
        )
        test, seen = held_back(groups, self.test_share, self.seed)
        fitted, found = fit(
            table.rows(seen.numpy()), target=self.target.strip(), categorical=self.categorical
        )
        inputs, unseen = fitted.encode(table)
        if isinstance(target, Numbers):
            what = f"{table.source}: the target {self.target!r}"
            mean, scale = mean_and_scale(values[seen], what)
            target, values = Numbers(mean.item(), scale.item()), ((values - mean) / scale).to(dtype)

        def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return inputs[chosen].to(device, dtype), values[chosen].to(device)

        about = (
            f"{len(seen):,} rows to learn from in {self.folds} folds and {len(test):,} test rows "
            f"of {table.source}; {counted(inputs.shape[1], 'input')}"
        )
        weights = torch.ones(len(seen), device=device, dtype=dtype)
        learned_from = part(seen)
        return Split(
            learned_from,
            learned_from,
            part(test),
            target=target,
            encoding=fitted,
            inputs=fitted.inputs,
            note="\n".join([notes[0], about, *notes[1:], *table.notes, *found, *unseen]),
            folds=Folds.draw(groups[seen], weights, self.folds, self.seed),
        )

    def _table(self) -> Table:
        """The table without columns and rows that are to be left out.

        Raises:
            DataError: all that the user has to decide, with a command that does.
        """
        options = {name: getattr(self, name) for name in ("delimiter", "encoding", "decimal")}
        table = read(Path(self.csv), header=self.header, **options)
        if asked := questions(self, table):
            raise DataError("\n".join(asked))
        frame, notes = table.frame.drop(columns=list(self.ignore)), [*table.notes]
        if self.missing == "drop":
            whole = frame.dropna()
            if gone := len(frame) - len(whole):
                notes.append(f"left out: {counted(gone, 'row')} with missing values")
            frame = whole.reset_index(drop=True)
        if self.ignore:
            notes.append(f"left out, as --ignore says: {listed(self.ignore)}")
        return replace(table, frame=frame, notes=tuple(notes))

    def trainer(self, seed: int) -> StrengthTrainer:
        """The trainer by folds."""
        return FoldedTrainer(self, seed)

    def network(self, split: Split) -> Module:
        """The network that every fold has a copy of."""
        widths = split.train[0].shape[1], self.hidden, split.target.outputs
        return tanh_network(*widths)

    def architecture(self, split: Split) -> Architecture:
        """Tanh networks, two for each fold, whose outputs are averaged."""
        widths = {
            "inputs": split.train[0].shape[1],
            "hidden": list(self.hidden),
            "outputs": split.target.outputs,
            "members": 2 * self.folds,
        }
        return Architecture("tanh_committee", widths)

    def model(self, split: Split, params: Params) -> Model:
        """The model for `equigrad predict`."""
        return super().model(split, named_by_member(params))


class FoldedTrainer(StrengthTrainer, FoldedLearner):
    """The trainer by folds, with the experiment's settings."""


def questions(config: Tabular, table: Table) -> list[str]:
    """Choices that the user has to make, and a command that makes them; empty if there are none."""
    columns, target = list(table.frame.columns), config.target.strip()
    asked: list[str] = []
    answers: dict[str, object] = {}
    if table.question:
        asked.append(table.question)
        place = columns.index(target) if target in columns else len(columns) - 1
        answers |= {"header": "no", "target": f"column_{place + 1}"}
    elif target not in columns:
        asked.append(f"--target {target!r} {_no_column(target, columns)}")
        near = meant(target, columns)
        answers["target"] = near.split("'")[1] if near else "COLUMN"
    for option in ("ignore", "categorical"):
        given: tuple[str, ...] = getattr(config, option)
        wrong: dict[str, str] = {}
        for name in given:
            if name == target:
                wrong[name] = "is the target" + "; say --task classification" * (
                    option == "categorical"
                )
            elif option == "categorical" and name in config.ignore:
                wrong[name] = "is left out by --ignore"
            elif name not in columns and not table.question:
                wrong[name] = _no_column(name, columns)
        if wrong:
            asked += [f"--{option} {name!r} {why}" for name, why in wrong.items()]
            answers[option] = tuple(name for name in given if name not in wrong)
    if asked:
        command = _command(replace(config, **answers))
        asked.append(f"a command that answers, to be changed as you like:\n  {command}")
    return asked


def _no_column(name: str, columns: list[str]) -> str:
    return f"is no column of the table, which has {listed(columns)}.{meant(name, columns)}"


READING = (
    *("csv", "target", "task", "header", "ignore", "categorical"),
    *("missing", "delimiter", "encoding", "decimal"),
)
"""Settings of how a table is read, in the order of a command."""


def _command(config: Tabular) -> str:
    """The command that reads a table with these settings."""
    plain = Tabular(csv=Path(), target="")
    words = ["equigrad", "run", "tabular"]
    for name in READING:
        value = getattr(config, name)
        if value != getattr(plain, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
