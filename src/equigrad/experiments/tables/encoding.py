"""What a network sees of a table: numbers standardised, categories as one input each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.tables.tables import (
    GROUPED,
    MISSING,
    Decimal,
    Table,
    without_missing,
)
from equigrad.training.names import places
from equigrad.training.scale import mean_and_scale
from equigrad.training.targets import Classes, Numbers, Target
from equigrad.wording import counted, listed, shortened

MOST_CATEGORIES = 50
"""A column of text with more is taken for names or free text, unless it is said to have them."""

FEWEST_TEXTS = 10
"""Among so many texts or more, half at most may be different categories."""

MOST_WHOLE_CLASSES = 10
"""A target of whole numbers with more values is taken for a number."""

MARKS = str.maketrans("", "", "-.,")
OPTIONS = "--categorical {name}, or --ignore {name}"
"""What a run may be told of a column of numbers that holds something else."""

OTHER_MARK: dict[Decimal, Decimal] = {".": ",", ",": "."}
Missing = Literal["error", "impute", "drop"]
TaskName = Literal["auto", "classification", "regression"]


@dataclass(frozen=True)
class Numeric:
    """A column of numbers.

    Attributes:
        name: of the column.
        mean: that is subtracted.
        deviation: that divides.
        median: stands for what is missing.
        marked: whether an input says where a value is missing.
    """

    name: str
    mean: float
    deviation: float
    median: float
    marked: bool

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        return [self.name, f"{self.name} is missing"] if self.marked else [self.name]

    def encode(self, table: Table, otherwise: str) -> tuple[Tensor, str]:
        """Rows × inputs, and a note where values are missing that no input marks."""
        texts, numbers = table.columns[self.name], table.numbers(self.name)
        junk = [i for i, number in enumerate(numbers) if number is None and texts[i] not in MISSING]
        if junk:
            raise not_a_number(table, self.name, junk, otherwise)
        gone = torch.tensor([number is None for number in numbers])
        values = torch.tensor(
            [self.median if number is None else number for number in numbers], dtype=torch.float64
        )
        standardised = (values - self.mean) / self.deviation
        encoded = torch.stack([standardised, gone.double()][: len(self.inputs)], dim=1)
        if self.marked or not gone.any():
            return encoded, ""
        rows, median = counted(int(gone.sum()), "row"), f"{self.median:g}"
        note = f"column {self.name!r}: {rows} without a value, taken as the median {median}"
        return encoded, note


@dataclass(frozen=True)
class Categorical:
    """A column of categories, with an input for each.

    Attributes:
        name: of the column.
        categories: those that were seen; the empty one stands for missing.
    """

    name: str
    categories: tuple[str, ...]

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        return [f"{self.name}={c}" if c else f"{self.name} is missing" for c in self.categories]

    def encode(self, table: Table, otherwise: str) -> tuple[Tensor, str]:
        """Rows × inputs, all zero for a category that was not seen, and a note that names it."""
        texts = without_missing(table.columns[self.name])
        encoded = torch.zeros(len(texts), len(self.categories), dtype=torch.float64)
        unknown: Counter[str] = Counter()
        for i, place in enumerate(places(self.categories, texts, table.numbers(self.name))):
            if place is None:
                unknown[texts[i]] += 1
            else:
                encoded[i, place] = 1
        if not unknown:
            return encoded, ""
        rows, names = counted(unknown.total(), "row"), listed(list(unknown), 5)
        return encoded, f"column {self.name!r}: {rows} of unseen category {names}"


Column = Numeric | Categorical


@dataclass(frozen=True)
class Encoding:
    """Turns rows of a table into inputs of a network, as it was fitted to what the network saw.

    Attributes:
        columns: that the network sees.
        target: name of the column that is predicted.
        missing: what was done about missing values.
        decimal: the decimal mark of the table.
    """

    columns: tuple[Column, ...]
    target: str
    missing: Missing
    decimal: Decimal = "."

    @property
    def inputs(self) -> list[str]:
        """Names of what the network sees."""
        return [name for column in self.columns for name in column.inputs]

    def encode(self, table: Table, otherwise: str = "") -> tuple[Tensor, list[str]]:
        """Rows × inputs in float64, and what the user should know.

        Args:
            table: the rows.
            otherwise: what else can be done about a value that is no number, as `OPTIONS`.

        Raises:
            DataError: a column is not there, has values missing that should not, or holds what is
                not a number.
        """
        names = [column.name for column in self.columns]
        if absent := [name for name in names if name not in table.columns]:
            raise DataError(
                f"{table.source} lacks the columns {listed(absent)} that the network learned from; "
                f"it has {listed(table.columns)}"
            )
        if self.missing != "impute":
            refuse_missing(table, names, "the network learned from rows without any; fill them in")
        columns = (column.encode(table, otherwise) for column in self.columns)
        encoded, notes = zip(*columns, strict=True)
        return torch.cat(encoded, dim=1), [note for note in notes if note]


def refuse_missing(table: Table, names: Sequence[str], remedy: str) -> None:
    """Raise a `DataError` that names the columns with missing values, how many and where."""
    gaps = {}
    for name in names:
        rows = [i for i, text in enumerate(table.columns[name]) if text in MISSING]
        if rows:
            gaps[name] = f"{name!r} ({len(rows)}, the first in line {table.lines[rows[0]]})"
    if gaps:
        more = f" and {len(gaps) - 10} more" if len(gaps) > 10 else ""
        raise DataError(
            f"{table.source} has missing values in {', '.join(list(gaps.values())[:10])}{more}: "
            f"{remedy}"
        )


def not_a_number(table: Table, name: str, junk: Sequence[int], otherwise: str) -> DataError:
    """What to raise where a column of numbers holds something else, and what to say otherwise."""
    decimal, mark = table.decimal, OTHER_MARK[table.decimal]
    marked = [text for text in (table.columns[name][i] for i in junk) if mark in text]
    grouped = bool(marked) and all(GROUPED[decimal].fullmatch(text) for text in marked)
    surely = grouped and any(decimal in text or text.count(mark) > 1 for text in marked)
    remedies = f"{'else mend' if marked else 'mend'} them"
    if marked and not surely:
        remedies = f"if {mark!r} is the decimal mark, say --decimal {mark}; {remedies}"
    if grouped:
        remedies = f"they look like grouped thousands, to be written without {mark!r}; {remedies}"
    if otherwise:
        remedies += f", or say {otherwise.format(name=name)}"
    return DataError(
        f"{table.source}: column {name!r} should hold numbers, and {len(junk)} of its {len(table)} "
        f"values are none: {table.where(name, junk)}; {remedies}"
    )


def fit(
    table: Table,
    *,
    target: str,
    missing: Missing,
    categorical: Sequence[str] = (),
) -> tuple[Encoding, list[str]]:
    """Learn the kinds of the columns, their means, deviations, medians and categories.

    Args:
        table: the rows that the learner and its judge see, and no others.
        target: the column that is predicted.
        missing: `error` and `drop` refuse missing values, `impute` takes the median of numbers and
            gives an input of its own to where they are missing.
        categorical: columns whose numbers are names of categories.

    Returns:
        The encoding, and what the user should know.

    Raises:
        DataError: a column's values are not of one kind, or nothing is left to learn from.
    """
    columns: list[Column] = []
    notes: list[str] = []
    constant: list[str] = []
    for name in (name for name in table.columns if name != target):
        if len(set(table.names(name))) == 1:
            constant.append(name)
            continue
        if name not in categorical and is_numeric(table, name):
            columns.append(fit_numbers(table, name))
            numbers = [float(number) for number in table.numbers(name) if number is not None]
            if counts_rows(numbers):
                notes.append(
                    f"column {name!r} holds whole numbers that are all different: if it only "
                    f"numbers the rows, leave it out with --ignore {name}"
                )
        else:
            columns.append(fit_categories(table, name, forced=name in categorical))
    if constant:
        notes.append(f"left out, having one value only: {listed(constant)}")
    if not columns:
        raise DataError(f"{table.source} has no column to learn from beside the target {target!r}")
    return Encoding(tuple(columns), target, missing, table.decimal), notes


def counts_rows(numbers: Sequence[float]) -> bool:
    """Whether numbers look like numbers of rows: whole, all different, without gaps to speak of."""
    whole = all(number == int(number) for number in numbers)
    spread = max(numbers) - min(numbers) + 1
    return whole and len(set(numbers)) == len(numbers) > 20 and spread <= 3 * len(numbers)


def is_numeric(table: Table, name: str) -> bool:
    """Whether a column holds numbers: half of its values or more; then the others are junk."""
    texts, numbers = table.columns[name], table.numbers(name)
    there = [i for i, text in enumerate(texts) if text not in MISSING]
    junk = [i for i in there if numbers[i] is None]
    if 2 * len(junk) > len(there):
        refuse_other_mark(table, name, OPTIONS)
        return False
    if junk:
        raise not_a_number(table, name, junk, OPTIONS)
    return True


def refuse_other_mark(table: Table, name: str, otherwise: str) -> None:
    """Raise a `DataError` where most of a column looks like numbers with the other decimal mark."""
    texts, numbers = table.columns[name], table.numbers(name)
    mark = OTHER_MARK[table.decimal]
    digits = [
        i
        for i, (text, number) in enumerate(zip(texts, numbers, strict=True))
        if number is None and mark in text and text.translate(MARKS).isdigit() and not is_date(text)
    ]
    if 2 * len(digits) > len(texts):
        raise not_a_number(table, name, digits, otherwise)


def fit_numbers(table: Table, name: str) -> Numeric:
    """Mean and deviation, medians having taken the place of what is missing."""
    numbers = table.numbers(name)
    there = torch.tensor([x for x in numbers if x is not None], dtype=torch.float64)
    median = there.quantile(0.5).item()
    filled = torch.tensor([median if x is None else x for x in numbers], dtype=torch.float64)
    mean, scale = mean_and_scale(filled, f"{table.source}: column {name!r}")
    return Numeric(name, mean.item(), scale.item(), median, len(there) < len(numbers))


def fit_categories(table: Table, name: str, *, forced: bool) -> Categorical:
    """The categories in order; text that looks like names, dates or prose is refused."""
    texts = table.names(name)
    categories = tuple(sorted(set(texts)))
    there = [text for text in texts if text]
    different = len(set(there))
    many = different > MOST_CATEGORIES or 2 * different > len(there) >= FEWEST_TEXTS
    if many and not forced:
        kind = (
            "dates; turn them into numbers, days since the first for example"
            if any(map(is_date, categories))
            else "names, free text or numbers with a unit; write such numbers without their unit"
        )
        raise DataError(
            f"{table.source}: column {name!r} has {different} different texts in {len(there)} of "
            f"the {len(texts)} rows that are learned from, such as {shortened(categories[-1])}. "
            f"They look like {kind}, or leave them out with --ignore {name}, or take them as "
            f"categories all the same with --categorical {name}"
        )
    return Categorical(name, categories)


def is_date(text: str) -> bool:
    """Whether a text is a date as ISO 8601 writes it, or with points or slashes."""
    for form in ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y"):
        try:
            datetime.strptime(text, form)
        except ValueError:
            continue
        return True
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def read_target(table: Table, name: str, task: TaskName) -> tuple[Target, Tensor, str]:
    """What is predicted: its kind, a class or a number for every row, and how the kind was found.

    Numbers come as they are written; `Numbers` that standardise them are to be fitted.

    Raises:
        DataError: one class, constant numbers, numbers that are none, texts all different.
    """
    texts, numbers = table.names(name), table.numbers(name)
    junk = [i for i, number in enumerate(numbers) if number is None]
    there = [number for number in numbers if number is not None]
    values = set(texts)
    if task != "classification":
        refuse_other_mark(table, name, "--task classification")
    how = "as --task says"
    if task == "auto":
        whole = all(number == int(number) for number in there)
        few = len(set(there)) <= MOST_WHOLE_CLASSES and 2 * len(set(there)) <= len(there)
        if junk and 2 * len(junk) <= len(texts) and len(values) > MOST_WHOLE_CLASSES:
            raise not_a_number(table, name, junk, "--task classification")
        task = "classification" if junk or (whole and few) else "regression"
        other = "regression" if task == "classification" else "classification"
        kind = "text" if junk else "whole numbers" if whole else "numbers"
        how = f"the target {name!r} being {kind} with {len(values)} values"
        how += "" if junk else f"; else --task {other}"
    if task == "regression":
        if junk:
            raise not_a_number(table, name, junk, "--task classification")
        if len(set(there)) == 1:
            raise DataError(f"{table.source}: the target {name!r} is {there[0]:g} in every row")
        return Numbers(), torch.tensor(there, dtype=torch.float64), f"regression, {how}"
    if len(values) == 1:
        raise DataError(
            f"{table.source}: the target {name!r} has one class only, {shortened(texts[0])}, and "
            f"there is nothing to tell apart"
        )
    if len(values) > MOST_CATEGORIES and 3 * len(values) > len(texts):
        raise DataError(
            f"{table.source}: the target {name!r} has {len(values)} different values in "
            f"{len(texts)} rows, which are no classes, such as {shortened(texts[0])}"
        )
    names = sorted(values) if junk else sorted(values, key=lambda text: float(text))
    place = {text: i for i, text in enumerate(names)}
    kind = f"classification into {len(names)} classes, {how}"
    return Classes(tuple(names)), torch.tensor([place[text] for text in texts]), kind
