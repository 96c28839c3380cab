"""The user's own table: a regularisation strength for every weight of a network that reads it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.runs.model import Architecture
from equigrad.experiments.strengths.own_data import OwnData
from equigrad.experiments.tables import tables
from equigrad.experiments.tables.encoding import (
    OPTIONS,
    Missing,
    TaskName,
    fit,
    read_target,
    refuse_missing,
)
from equigrad.experiments.tables.tables import Decimal, Table
from equigrad.training.scale import mean_and_scale
from equigrad.training.split import Split, divide
from equigrad.training.targets import Classes, Numbers, Target
from equigrad.wording import counted, listed


@dataclass(frozen=True, kw_only=True)
class Tabular(OwnData):
    """Learn a regularisation strength for every weight of a network that reads your own CSV file.

    Part of the rows is learned from, part judges what was learned, and every weight's strength
    follows the judges' gradient; the rest has the last word. Beside it: no regularisation, the best
    of 13 single strengths, and the other estimator, all on the same rows and start. The run leaves
    a model for `equigrad predict`.
    """

    csv: Path
    """The table: a header with the names of the columns, and rows."""

    target: str
    """The column that is predicted."""

    task: TaskName = "auto"
    """Whether the target is a class or a number; `auto` decides by its values, and says so."""

    ignore: tuple[str, ...] = ()
    """Columns to leave out."""

    categorical: tuple[str, ...] = ()
    """Columns whose values are names, also where they look like numbers."""

    missing: Missing = "error"
    """`error` names columns with missing values, `impute` fills them in, `drop` drops the rows."""

    delimiter: str | None = None
    """What is between columns; by default whichever of , ; tab | divides the header."""

    encoding: str = "utf-8"
    """Of the file's text."""

    decimal: Decimal = "."
    """The decimal mark."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden tanh layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.hidden):
            raise ConfigurationError(f"hidden widths must be at least 1, got {self.hidden}")

    @classmethod
    def _asked_for(cls) -> dict[str, Any]:
        import tyro  # the command line's; whoever calls from Python says which table

        return {"csv": tyro.MISSING, "target": tyro.MISSING}

    @property
    def name(self) -> str:
        """The table and its target."""
        return f"{self.target} of {Path(self.csv).name}"

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Rows drawn by the seed, encoded as those for training and validation have it."""
        table, notes = self._table()
        target, values, how = read_target(table, self.target, self.task)
        classes = isinstance(target, Classes)
        rows = divide(
            values if classes else torch.zeros(len(table), dtype=torch.long),
            test_share=self.test_share,
            training_share=self.training_share,
            samples=self.samples,
            seed=self.seed,
            names=target.names if classes else (),
        )
        fitted, more = fit(
            table.rows(rows.seen.tolist()),
            target=self.target,
            missing=self.missing,
            categorical=self.categorical,
        )
        inputs, unseen = fitted.encode(table, OPTIONS)
        if not classes:
            target, values = standardised(
                values, rows.seen, f"{table.source}: the target {self.target!r}"
            )
            for name, chosen in vars(rows).items():
                if values[chosen].unique().numel() < 2:
                    remedy = "take another seed" if len(chosen) > 1 else "give it a larger share"
                    raise DataError(
                        f"{table.source}: there is one target only in the "
                        f"{counted(len(chosen), f'{name} row')} of seed {self.seed}, and R² needs "
                        f"two that differ; {remedy}, or add rows"
                    )
            values = values.to(dtype)

        def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return inputs[chosen].to(device, dtype), values[chosen].to(device)

        counts = [len(chosen) for chosen in vars(rows).values()]
        about = (
            f"{how}; {counts[0]:,} training, {counts[1]:,} validation and {counts[2]:,} test rows "
            f"of {table.source}; {counted(inputs.shape[1], 'input')}"
        )
        return Split(
            part(rows.train),
            part(rows.validation),
            part(rows.test),
            target=target,
            encoding=fitted,
            inputs=fitted.inputs,
            note="\n".join([about, *notes, *more, *unseen]),
        )

    def _table(self) -> tuple[Table, list[str]]:
        """The table without the columns and the rows that are to be left out."""
        path = Path(self.csv)
        table = tables.read(
            path, delimiter=self.delimiter, encoding=self.encoding, decimal=self.decimal
        )
        table.column(self.target, "--target")
        for name in self.ignore:
            table.column(name, "--ignore")
        for name in self.categorical:
            table.column(name, "--categorical")
        if self.target in self.ignore:
            raise ConfigurationError(f"the target {self.target!r} cannot be left out with --ignore")
        if self.target in self.categorical:
            raise ConfigurationError(
                f"--categorical is for columns to learn from, and {self.target!r} is the target; "
                f"say --task classification"
            )
        if both := [name for name in self.categorical if name in self.ignore]:
            raise ConfigurationError(
                f"{listed(both)} cannot be left out with --ignore and taken with --categorical"
            )
        kept = {n: column for n, column in table.columns.items() if n not in self.ignore}
        if "" in kept:
            raise DataError(
                f"column {list(kept).index('') + 1} of {path} has no name in the header; give it "
                f"one, or leave it out with --ignore ''"
            )
        table = replace(table, columns=kept)
        if self.missing == "error":
            refuse_missing(
                table,
                list(kept),
                "fill them in, or say --missing impute, --missing drop, or --ignore a column",
            )
            return table, []
        needed = [self.target] if self.missing == "impute" else list(kept)
        whole = [
            i
            for i, values in enumerate(zip(*(kept[name] for name in needed), strict=True))
            if not any(value in tables.MISSING for value in values)
        ]
        if not whole:
            empty = [name for name in needed if tables.MISSING.issuperset(kept[name])]
            remedy = f"none of its {counted(len(table), 'row')} is left; fill them in"
            choice = "" if self.missing == "impute" else ", or --ignore a column"
            refuse_missing(table, empty or needed, remedy + choice)
        gone = len(table) - len(whole)
        what = "without a target" if self.missing == "impute" else "with missing values"
        return table.rows(whole), [f"left out: {counted(gone, 'row')} {what}"] if gone else []

    def architecture(self, split: Split) -> Architecture:
        """Tanh layers."""
        widths = {
            "inputs": split.train[0].shape[1],
            "hidden": list(self.hidden),
            "outputs": split.target.outputs,
        }
        return Architecture("tanh_network", widths)


def standardised(values: Tensor, seen: Tensor, what: str) -> tuple[Target, Tensor]:
    """Numbers with zero mean and unit variance over the rows that were seen."""
    mean, scale = mean_and_scale(values[seen], what)
    return Numbers(mean.item(), scale.item()), (values - mean) / scale
