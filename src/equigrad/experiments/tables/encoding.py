"""Encoding of tables: standardised numbers, parts of dates, an input for each category."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.tables.dates import date_form, parts_of
from equigrad.experiments.tables.reading import (
    Decimal,
    Series,
    Table,
    as_numbers,
    holds_numbers,
    of_each,
)
from equigrad.training.names import name_of
from equigrad.training.scale import mean_and_scale
from equigrad.wording import counted, listed, shortened

MOST_CATEGORIES = 50
"""Of a column; the rarer ones share an input."""

FEW_VALUES = 10
"""A column of text that has more values, half of them numbers, is one of numbers."""

Missing = Literal["impute", "drop"]


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, or a part of a column of dates.

    Attributes:
        column: its name in the table.
        median: replaces missing values.
        mean: subtracted.
        deviation: divides.
        marked: whether a second input says where a value is missing.
        part: of a date, such as `month`; empty for a number.
        form: how the dates are written.
    """

    column: str
    median: float
    mean: float
    deviation: float
    marked: bool
    part: str = ""
    form: str = ""

    @classmethod
    def fit(
        cls, values: Series, column: str, source: str, part: str = "", form: str = ""
    ) -> "Numeric":
        """Mean and deviation, with missing values replaced by the median."""
        median = float(values.median())
        filled = torch.from_numpy(np.array(values.fillna(median)))
        mean, scale = mean_and_scale(filled, f"{source}: column {column!r}")
        return cls(column, median, mean.item(), scale.item(), values.hasnans, part, form)

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        name = f"{self.column} {self.part}".strip()
        return [name, f"{name} is missing"][: 1 + self.marked]

    def encode(self, table: Table) -> tuple[np.ndarray, str]:
        """Rows × inputs, and a note on values that are missing here and were not before."""
        if self.part:
            values = parts_of(table.frame[self.column], self.form, self.part)[self.part]
        else:
            values = table.numbers(self.column)
        encoded, gone = (values.fillna(self.median) - self.mean) / self.deviation, values.isna()
        if self.marked:
            return np.column_stack([encoded, gone]), ""
        rows, name = counted(int(gone.sum()), "row"), f"column {self.column!r}"
        note = f"{name}: {rows} without a value, taken as {self.median:g}, the median"
        return encoded.to_numpy()[:, None], note if gone.any() else ""


@dataclass(frozen=True)
class Categorical:
    """A column of categories, with an input for each that is not rare.

    Attributes:
        column: its name in the table.
        categories: the frequent ones; the empty one stands for missing.
        rare: whether the others share an input, including those first seen later.
    """

    column: str
    categories: tuple[str, ...]
    rare: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        values = [f"={c}" if c else " is missing" for c in self.categories]
        return [f"{self.column}{value}" for value in [*values, " is rare"][: len(self._places)]]

    @property
    def _places(self) -> list[int]:
        return [*range(len(self.categories)), *([-1] if self.rare else [])]

    def encode(self, table: Table) -> tuple[np.ndarray, str]:
        """Rows × inputs, and a note on categories that nothing is known of."""
        known, values = pd.Index(self.categories, dtype=object), table.frame[self.column]
        places = of_each(values, lambda unique: pd.Series(known.get_indexer(names_of(unique))))
        places = places.fillna(known.get_indexer([""])[0]).to_numpy()
        unknown, note = places < 0, ""
        if unknown.any() and not self.rare:
            rows = counted(int(unknown.sum()), "row")
            names = listed(names_of(values[unknown]).unique(), 5)
            note = f"column {self.column!r}: {rows} of unseen category {names}"
        return places[:, None] == self._places, note


Column = Numeric | Categorical


@dataclass(frozen=True)
class Encoding:
    """Turns rows of a table into inputs of a network, by plain numbers that a model is saved with.

    Attributes:
        columns: that the network sees.
        target: name of the column that is predicted.
        decimal: the decimal mark of the table.
    """

    columns: tuple[Column, ...]
    target: str
    decimal: Decimal = "."

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        return [name for column in self.columns for name in column.inputs]

    def encode(self, table: Table) -> tuple[Tensor, list[str]]:
        """Rows × inputs in float64, and notes for the user.

        Raises:
            DataError: columns are not there.
        """
        names = dict.fromkeys(column.column for column in self.columns)
        if absent := [name for name in names if name not in table.frame]:
            raise DataError(
                f"{table.source} lacks the columns {listed(absent)} that the network learned from; "
                f"it has {listed(table.frame.columns)}"
            )
        numbers = [c for c in self.columns if isinstance(c, Numeric) and not c.part]
        odd = [odd_values(table, number.column) for number in numbers]
        encoded, notes = zip(*(column.encode(table) for column in self.columns), strict=True)
        inputs = torch.from_numpy(np.concatenate(encoded, axis=1, dtype=np.float64))
        return inputs, [note for note in (*odd, *notes) if note]


def fit(
    table: Table, *, target: str, categorical: Sequence[str] = ()
) -> tuple[Encoding, list[str]]:
    """Find the kinds of the columns, their means, deviations, medians and categories.

    Dates become year, month, weekday and hour. In a column of numbers, anything else counts as
    missing. Rare categories share an input. Left out are columns with one value, row numbers,
    columns that equal the target, and columns of text in which no value is frequent.

    Args:
        table: the rows for training and validation, and no others.
        target: the column that is predicted.
        categorical: columns whose numbers are names of categories.

    Returns:
        The encoding, and what was done.

    Raises:
        DataError: no column is left to learn from.
    """
    found: list[Column] = []
    notes: list[str] = []
    left_out: dict[str, list[str]] = {}
    for name in table.frame.columns.drop(target):
        columns, said = _inputs_of(table, name, target, named=name in categorical)
        found += columns
        if not columns:
            left_out.setdefault(said, []).append(name)
        elif said:
            notes.append(f"column {name!r}: {said}")
    notes = [f"left out, {why}: {listed(names)}" for why, names in left_out.items()] + notes
    if not found:
        raise DataError(
            f"{table.source} has no column to learn from beside the target {target!r}; "
            f"{'; '.join(notes)}"
        )
    return Encoding(tuple(found), target, table.decimal), notes


def _inputs_of(table: Table, name: str, target: str, *, named: bool) -> tuple[list[Column], str]:
    """What the network sees of a column, and what was done; or why nothing."""
    values = table.frame[name]
    if all(some.nunique(dropna=False) == 1 for some in (values.head(9), values)):
        return [], "having one value only"
    if _same(values, table.frame[target]):
        return [], f"as it equals the target {target!r}"
    if not named and is_numeric(table, name):
        return _numbers(table, name)
    if not named and (form := date_form(values)):
        return _dates(table, name, form)
    return _categories(values, name)


def _numbers(table: Table, name: str) -> tuple[list[Column], str]:
    numbers = table.numbers(name)
    if counts_rows(numbers):
        return [], "as it numbers the rows"
    column = Numeric.fit(numbers, name, table.source)
    gone = counted(int(numbers.isna().sum()), "missing value")
    said = f"{gone} taken as the median {column.median:g}, with an input that says where"
    return [column], said if column.marked else ""


def _dates(table: Table, name: str, form: str) -> tuple[list[Column], str]:
    """A number for each part that differs between rows."""
    parts = parts_of(table.frame[name], form)
    varied = [part for part, numbers in parts.items() if numbers.nunique() > 1]
    how = "ISO 8601" if form == "ISO8601" else form
    said = f"dates ({how}), of which {', '.join(varied)} are inputs"
    columns: list[Column] = [
        Numeric.fit(parts[part], name, table.source, part, form) for part in varied
    ]
    return columns, said if varied else "having one date only"


def _categories(values: Series, name: str) -> tuple[list[Column], str]:
    """The frequent categories in order, and whether there are others."""
    counts = values.value_counts(dropna=False)
    counts = counts[counts > 0]  # pandas counts categories of other rows, too
    counts = counts.groupby(names_of(counts.index.to_series()).to_numpy()).sum()
    counts = counts.sort_values(ascending=False, kind="stable")
    frequent = counts[counts >= min(10, max(2, len(values) // 20))].head(MOST_CATEGORIES)
    rare = counts.drop(frequent.index)
    if frequent.index.drop("", errors="ignore").empty:
        return [], "being text of which hardly any two rows have the same"
    rows = counted(int(rare.sum()), "row")
    said = f"{counted(len(rare), 'rare value')} in {rows} share one input, such as "
    column = Categorical(name, tuple(sorted(frequent.index)), rare=len(rare) > 0)
    return [column], said + listed(rare.index, 3) if column.rare else ""


def _same(values: Series, others: Series) -> bool:
    """Whether two columns have the same values; the first rows tell most apart."""
    first = zip(values.head(9), others.head(9), strict=True)
    return all(_name(a) == _name(b) for a, b in first) and names_of(values).equals(names_of(others))


def is_numeric(table: Table, name: str) -> bool:
    """Whether a column holds numbers: half of its values or more, and not a few names besides."""
    values = table.frame[name]
    if holds_numbers(values):
        return True
    there = values.dropna()
    share = as_numbers(there, table.decimal).notna().mean()
    few = there.nunique() <= FEW_VALUES and 2 * there.nunique() <= len(there)
    return share == 1 or (share >= 0.5 and not few)


def odd_values(table: Table, name: str) -> str:
    """A note that names what is no number in a column of numbers; empty for nothing."""
    values = table.frame[name]
    if holds_numbers(values):
        return ""
    odd = values[table.numbers(name).isna() & values.notna()]
    said = ", ".join(f"{shortened(str(v))} (row {i + 1})" for i, v in odd.head(5).items())
    more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    return f"column {name!r}: no numbers, taken as missing: {said}{more}" if len(odd) else ""


def counts_rows(numbers: Series) -> bool:
    """Whether numbers are those of the rows: one more from each row of the file to the next."""
    places = (some.to_numpy() - some.index.to_numpy() for some in (numbers.head(9), numbers))
    return len(numbers) > 20 and all((place == place[0]).all() for place in places)


def names_of(values: Series) -> Series:
    """Values as names of categories, empty where missing; a number has one name in any writing."""
    return of_each(values, lambda unique: unique.map(_name).astype(object)).fillna("")


def _name(value: object) -> str:
    try:
        return name_of(float(str(value)))
    except ValueError:
        return str(value)
