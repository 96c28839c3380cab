"""The tabular experiment: a strength for every input of networks trained on a CSV file."""

import shlex
from dataclasses import dataclass, field, replace
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
        target, table, values, notes = read_target(*self._table())
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

    def _table(self) -> tuple[Table, str, TaskName]:
        """The table without columns and rows that are to be left out, its target and task.

        Raises:
            DataError: all that the user has to decide, with a command that does.
        """
        table = read(
            Path(self.csv),
            delimiter=self.delimiter,
            encoding=self.encoding,
            decimal=self.decimal,
            header=self.header,
        )
        target = self.target.strip()
        if questions := Questions.about(self, table):
            raise DataError("\n".join(questions))
        frame = table.frame.drop(columns=list(self.ignore))
        notes = [*table.notes]
        if self.missing == "drop":
            whole = frame.dropna()
            if gone := len(frame) - len(whole):
                notes.append(f"left out: {counted(gone, 'row')} with missing values")
            frame = whole.reset_index(drop=True)
        if self.ignore:
            notes.append(f"left out, as --ignore says: {listed(self.ignore)}")
        return replace(table, frame=frame, notes=tuple(notes)), target, self.task

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


@dataclass
class Questions:
    """A choice that the user has to make before a table can be used, and one of the answers.

    Attributes:
        asked: in words.
        answers: settings that differ from those given, by name.
    """

    asked: list[str] = field(default_factory=list)
    answers: dict[str, object] = field(default_factory=dict)

    @classmethod
    def about(cls, config: Tabular, table: Table) -> list[str]:
        """All questions, with a command that answers them; empty if there are none."""
        self, columns = cls(), list(table.frame.columns)
        target = config.target.strip()
        if table.question:
            self.asked.append(table.question)
            place = columns.index(target) if target in columns else len(columns) - 1
            self.answers |= {"header": "no", "target": f"column_{place + 1}"}
        elif target not in columns:
            self.asked.append(_no_column("--target", target, columns))
            near = meant(target, columns)
            self.answers["target"] = near.split("'")[1] if near else "COLUMN"
        for name in ("ignore", "categorical"):
            given: tuple[str, ...] = getattr(config, name)
            absent = [] if table.question else [one for one in given if one not in columns]
            self.asked += [_no_column(f"--{name}", one, columns) for one in absent]
            if target in given:
                self.asked.append(
                    f"{target!r} is the target, and cannot be left out with --ignore"
                    if name == "ignore"
                    else f"--categorical is for columns to learn from, and {target!r} is the "
                    f"target; say --task classification"
                )
            if absent or target in given:
                kept = tuple(one for one in given if one in columns and one != target)
                self.answers[name] = kept
        if both := [one for one in config.categorical if one in config.ignore]:
            self.asked.append(
                f"{listed(both)} cannot be left out with --ignore and taken with --categorical"
            )
            self.answers["categorical"] = tuple(c for c in config.categorical if c not in both)
        if not self.asked:
            return []
        command = _command(replace(config, **self.answers))
        return [*self.asked, f"a command that decides, to be changed as you like:\n  {command}"]


def _no_column(option: str, name: str, columns: list[str]) -> str:
    near = meant(name, columns)
    return f"{option} {name!r} is no column of the table, which has {listed(columns)}.{near}"


READING = ("csv", "target", "task", "header", "ignore", "categorical", "missing", "delimiter")
"""Settings of how a table is read, in the order of a command."""


def _command(config: Tabular) -> str:
    """The command that reads a table with these settings."""
    plain = Tabular(csv=Path(), target="")
    words = ["equigrad", "run", "tabular"]
    for name in (*READING, "encoding", "decimal"):
        value = getattr(config, name)
        if value != getattr(plain, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
