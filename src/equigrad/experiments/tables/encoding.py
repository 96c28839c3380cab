"""Encoding of tables: standardised numbers, parts of dates, an input for each category."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.tables.dates import PARTS, date_form, part_of, read_dates
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
from equigrad.training.targets import Classes, Numbers, Target
from equigrad.wording import counted, listed, shortened

MOST_CATEGORIES = 50
"""Of a column; the rarer ones share an input."""

MOST_WHOLE_CLASSES = 10
"""A target of whole numbers with more values is taken for a number."""

Missing = Literal["impute", "drop"]
TaskName = Literal["auto", "classification", "regression"]


@dataclass(frozen=True)
class Numeric:
    """A column of numbers, or a part of a column of dates.

    Attributes:
        column: its name in the table.
        mean: that is subtracted.
        deviation: that divides.
        median: stands for what is missing.
        marked: whether an input says where a value is missing.
        part: of a date, such as `month`; empty for a number.
        form: how the dates are written.
    """

    column: str
    mean: float
    deviation: float
    median: float
    marked: bool
    part: str = ""
    form: str = ""

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        name = f"{self.column} {self.part}".strip()
        return [name, f"{name} is missing"] if self.marked else [name]

    def encode(self, table: Table) -> tuple[Tensor, str]:
        """Rows × inputs, and a note on values that are missing here and were not before."""
        if self.part:
            values = part_of(read_dates(table.frame[self.column], self.form), self.part)
        else:
            values = table.numbers(self.column)
        numbers = torch.from_numpy(values.to_numpy(copy=True))
        gone = numbers.isnan()
        encoded = (filled(numbers, gone, self.median)[:, None] - self.mean) / self.deviation
        if self.marked:
            return torch.cat([encoded, gone[:, None].double()], dim=1), ""
        if not gone.any():
            return encoded, ""
        rows, name = counted(int(gone.sum()), "row"), f"column {self.column!r}"
        return encoded, f"{name}: {rows} without a value, taken as {self.median:g}, the median"


@dataclass(frozen=True)
class Categorical:
    """A column of categories, with an input for each that is not rare.

    Attributes:
        column: its name in the table.
        categories: the frequent ones; the empty one stands for missing.
        rare: whether the others share an input, as those do that were not seen.
    """

    column: str
    categories: tuple[str, ...]
    rare: bool = False

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        names = [
            f"{self.column}={c}" if c else f"{self.column} is missing" for c in self.categories
        ]
        return [*names, f"{self.column} is rare"] if self.rare else names

    def encode(self, table: Table) -> tuple[Tensor, str]:
        """Rows × inputs, and a note on categories that nothing is known of."""
        import pandas as pd

        texts = names_of(table.frame[self.column])
        places = torch.tensor(pd.Index(self.categories, dtype=object).get_indexer(texts))
        other = places < 0
        encoded = torch.zeros(len(places), len(self.inputs), dtype=torch.float64)
        known = (~other).nonzero().squeeze(1)
        encoded[known, places[known]] = 1
        if self.rare:
            encoded[other, -1] = 1
        elif other.any():
            unknown = texts[other.numpy()]
            rows, names = counted(len(unknown), "row"), listed(unknown.unique(), 5)
            return encoded, f"column {self.column!r}: {rows} of unseen category {names}"
        return encoded, ""


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
        """Rows × inputs in float64, and what the user should know.

        Raises:
            DataError: columns are not there.
        """
        names = list(dict.fromkeys(column.column for column in self.columns))
        if absent := [name for name in names if name not in table.frame]:
            raise DataError(
                f"{table.source} lacks the columns {listed(absent)} that the network learned from; "
                f"it has {listed(table.frame.columns)}"
            )
        encoded, notes = zip(*(column.encode(table) for column in self.columns), strict=True)
        odd = (
            odd_values(table, c.column)
            for c in self.columns
            if isinstance(c, Numeric) and not c.part
        )
        return torch.cat(encoded, dim=1), [note for note in (*odd, *notes) if note]


@dataclass
class Findings:
    """What is learned of a table's columns, and what was done about their faults.

    Attributes:
        columns: to learn from.
        notes: in words.
        left_out: columns with the reason.
    """

    columns: list[Column] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, column: str, reason: str) -> None:
        """Note a column that nothing is learned from."""
        self.left_out.setdefault(reason, []).append(column)

    @property
    def said(self) -> list[str]:
        """All in words."""
        return [
            f"left out, {why}: {listed(names)}" for why, names in self.left_out.items()
        ] + self.notes


def fit(
    table: Table, *, target: str, categorical: Sequence[str] = ()
) -> tuple[Encoding, list[str]]:
    """Learn the kinds of the columns, their means, deviations, medians and categories.

    Dates become year, month, weekday and hour. What is no number in a column of numbers counts as
    missing. Categories of few rows share an input. Left out are columns with one value, row
    numbers, columns that equal the target, and columns of text in which no value is frequent.

    Args:
        table: the rows that the learner and its judge see, and no others.
        target: the column that is predicted.
        categorical: columns whose numbers are names of categories.

    Returns:
        The encoding, and what was done.

    Raises:
        DataError: nothing is left to learn from.
    """
    found = Findings()
    goal = table.frame[target]
    for name in (name for name in table.frame.columns if name != target):
        values = table.frame[name]
        if all(some.nunique(dropna=False) == 1 for some in (values.head(9), values)):
            found.leave_out(name, "having one value only")
        elif same(values, goal):
            found.leave_out(name, f"as it equals the target {target!r}")
        elif name not in categorical and is_numeric(table, name):
            fit_numbers(table, name, found)
        elif name not in categorical and (form := date_form(values)):
            fit_dates(table, name, form, found)
        else:
            fit_categories(table, name, found)
    if not found.columns:
        raise DataError(
            f"{table.source} has no column to learn from beside the target {target!r}; "
            f"{'; '.join(found.said)}"
        )
    return Encoding(tuple(found.columns), target, table.decimal), found.said


def same(values: Series, others: Series) -> bool:
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
    few = there.nunique() <= MOST_WHOLE_CLASSES and 2 * there.nunique() <= len(there)
    return share == 1 or (share >= 0.5 and not few)


def odd_values(table: Table, name: str) -> str:
    """A note that names what is no number in a column of numbers; empty for nothing."""
    values = table.frame[name]
    if holds_numbers(values):
        return ""
    odd = values[table.numbers(name).isna() & values.notna()]
    if odd.empty:
        return ""
    values = ", ".join(f"{shortened(str(v))} (row {i + 1})" for i, v in odd.head(5).items())
    more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    return f"column {name!r}: no numbers, taken as missing: {values}{more}"


def fit_numbers(table: Table, name: str, found: Findings) -> None:
    """Mean and deviation, medians having taken the place of what is missing."""
    numbers = table.numbers(name)
    if counts_rows(numbers):
        found.leave_out(name, "as it numbers the rows")
    else:
        found.columns.append(standardising(numbers, name, table.source))
        if gone := int(numbers.isna().sum()):
            found.notes.append(
                f"column {name!r}: {counted(gone, 'missing value')} taken as the median "
                f"{numbers.median():g}, with an input that says where"
            )


def standardising(
    numbers: Series, name: str, source: str, part: str = "", form: str = ""
) -> Numeric:
    """What turns numbers into an input of zero mean and unit variance."""
    values = torch.from_numpy(numbers.to_numpy(copy=True))
    gone, median = values.isnan(), float(numbers.median())
    mean, scale = mean_and_scale(filled(values, gone, median), f"{source}: column {name!r}")
    return Numeric(name, mean.item(), scale.item(), median, bool(gone.any()), part, form)


def filled(numbers: Tensor, gone: Tensor, median: float) -> Tensor:
    """Numbers with the median in the place of those that are gone."""
    return numbers.where(~gone, median) if gone.any() else numbers


def counts_rows(numbers: Series) -> bool:
    """Whether numbers are those of the rows: one more from each row of the file to the next."""
    places = (some.to_numpy() - some.index.to_numpy() for some in (numbers.head(9), numbers))
    return len(numbers) > 20 and all((place == place[0]).all() for place in places)


def fit_dates(table: Table, name: str, form: str, found: Findings) -> None:
    """A number for each part that differs between rows."""
    times = read_dates(table.frame[name], form)
    parts = [part for part in PARTS if part_of(times, part).nunique() > 1]
    for part in parts:
        numbers = part_of(times, part)
        found.columns.append(standardising(numbers, name, table.source, part, form))
    if parts:
        how = "ISO 8601" if form == "ISO8601" else form
        found.notes.append(
            f"column {name!r}: dates ({how}), of which {', '.join(parts)} are inputs"
        )
    else:
        found.leave_out(name, "having one date only")


def fit_categories(table: Table, name: str, found: Findings) -> None:
    """The frequent categories in order, and whether there are others."""
    texts = names_of(table.frame[name])
    fewest = min(10, max(2, len(texts) // 20))
    counts = texts.value_counts()
    frequent = counts[counts >= fewest].head(MOST_CATEGORIES)
    rare = counts.drop(frequent.index)
    if len(frequent) - ("" in frequent.index) < 1:
        found.leave_out(name, "being text of which hardly any two rows have the same")
        return
    if len(rare):
        rows = counted(int(rare.sum()), "row")
        found.notes.append(
            f"column {name!r}: {counted(len(rare), 'rare value')} in {rows} share one input, such "
            f"as {listed(rare.index, 3)}"
        )
    found.columns.append(Categorical(name, tuple(sorted(frequent.index)), rare=len(rare) > 0))


def names_of(values: Series) -> Series:
    """Values as names of categories, empty where missing; a number has one name in any writing."""
    return of_each(values, lambda unique: unique.map(_name).astype(object)).fillna("")


def _name(value: object) -> str:
    try:
        return name_of(float(str(value)))
    except ValueError:
        return str(value)


def read_target(table: Table, name: str, task: TaskName) -> tuple[Target, Table, Tensor, list[str]]:
    """What is predicted: its kind, the rows that have it, a class or number for each, and notes.

    Rows without a target are left out, and so are classes of one or two rows. Numbers come as they
    are written; `Numbers` that standardise them are to be fitted.

    Raises:
        DataError: one class, constant numbers, texts all different.
    """
    there = table.frame[name].dropna()
    numbers = as_numbers(there, table.decimal)
    numeric = is_numeric(table, name) and not there.empty
    how = "as --task says"
    if task == "auto":
        values = numbers.dropna()
        whole = bool((values % 1 == 0).all())
        few = values.nunique() <= MOST_WHOLE_CLASSES and 2 * values.nunique() <= len(values)
        task = "regression" if numeric and not (whole and few) else "classification"
        other = "regression" if task == "classification" else "classification"
        kind = ("whole numbers" if whole else "numbers") if numeric else "text"
        how = f"the target {name!r} being {kind} with {there.nunique()} values"
        how += f"; else --task {other}" if numeric else ""
    kept = numbers.dropna() if task == "regression" else _frequent(names_of(there))
    notes = _rows_left_out(table, name, task, kept.index)
    if kept.nunique() < 2:
        raise DataError(
            f"{table.source}: the target {name!r} has "
            f"{'the value ' + shortened(str(kept.iloc[0])) + ' only' if len(kept) else 'no value'}"
            f", and there is nothing to tell apart{''.join('; ' + note for note in notes)}"
        )
    rows = table if len(kept) == len(table) else table.rows(kept.index)
    if task == "regression":
        return Numbers(), rows, torch.tensor(kept.to_numpy()), [f"regression, {how}", *notes]
    names = sorted(kept.unique(), key=float) if numeric else sorted(kept.unique())
    place = {text: i for i, text in enumerate(names)}
    said = f"classification into {len(names)} classes, {how}"
    return Classes(tuple(names)), rows, torch.tensor(kept.map(place).to_numpy()), [said, *notes]


def _frequent(texts: Series) -> Series:
    """Those of classes with three rows or more."""
    return texts[texts.map(texts.value_counts()) >= 3]


def _rows_left_out(table: Table, name: str, task: str, kept: Sequence[int]) -> list[str]:
    """Rows without a target, with what is no number, or of a class with hardly a row."""
    values = table.frame[name]
    notes = []
    if gone := int(values.isna().sum()):
        notes.append(f"left out: {counted(gone, 'row')} without a target")
    lost = values.drop(kept).dropna()
    if len(lost):
        names = listed(lost.astype(str).unique(), 5)
        what = "is no number" if task == "regression" else "is a class of one or two rows"
        notes.append(f"left out: {counted(len(lost), 'row')} where the target {what}: {names}")
    return notes
