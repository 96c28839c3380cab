"""CSV files of users, read by pandas: what was found, and what was done about it."""

import codecs
import csv
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from equigrad.errors import DataError
from equigrad.wording import listed

DataFrame = Any
Series = Any
"""Of pandas, whose own annotations are unions of most of its classes."""

DELIMITERS = ",;\t|"
HEAD = 2**20
"""Bytes among which the header is looked for."""

MISSING = ("", "?", "-", ".", "#N/A", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None")
"""What stands for a value that is not there, beside pandas' own words."""

WIDE = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
NOT_TEXT = {
    b"PK\x03\x04": "it is a spreadsheet or a zip archive: save the table as CSV",
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
}

Decimal = Literal[".", ","]
Header = Literal["auto", "yes", "no"]

GROUPED: dict[Decimal, str] = {
    ".": r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?",
    ",": r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+(?:,\d*)?",
}
"""A number in which the other mark groups thousands, by the decimal mark."""

COMMA = r"[+-]?(?:\d*|\d{1,3}(?:\.\d{3})+),\d+"
"""A number with a decimal comma."""


@dataclass(frozen=True)
class Table:
    """A table as pandas has read it.

    Attributes:
        source: the file.
        frame: its columns by name, in the order of the file; text without white space around it.
        decimal: the decimal mark of numbers.
        notes: what was done about the file's faults.
        question: what the user must decide before the table can be used; empty for nothing.
    """

    source: str
    frame: DataFrame
    decimal: Decimal = "."
    notes: tuple[str, ...] = ()
    question: str = ""

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self, chosen: Any) -> "Table":
        """Some of the rows, by an array of their positions."""
        return replace(self, frame=self.frame.take(chosen))

    def numbers(self, name: str) -> Series:
        """A column's values as finite numbers, NaN where they are none."""
        return as_numbers(self.frame[name], self.decimal)


def as_numbers(values: Series, decimal: Decimal = ".") -> Series:
    """Finite numbers in float64, NaN for what is none; grouped thousands are numbers.

    Example:
        >>> import pandas
        >>> as_numbers(pandas.Series(["1e3", "1,000.5", "1_0", "inf"])).tolist()
        [1000.0, 1000.5, nan, nan]
    """

    def parsed(texts: Series) -> Series:
        other = "," if decimal == "." else "."
        texts = texts.astype("string")
        grouped = texts.str.fullmatch(GROUPED[decimal])
        texts = texts.mask(grouped, texts.str.replace(other, ""))
        if decimal == ",":
            texts = texts.mask(texts.str.contains(other, regex=False)).str.replace(",", ".")
        return pd.to_numeric(texts.astype(object), errors="coerce")

    numbers = (values if holds_numbers(values) else of_each(values, parsed)).astype("float64")
    return numbers.where(np.isfinite(numbers)) if np.isinf(numbers.to_numpy()).any() else numbers


def of_each(values: Series, function: Callable[[Series], Series]) -> Series:
    """What a function makes of values, called with each of them once; missing ones stay missing."""
    places, unique = pd.factorize(values)
    found = function(pd.Series(unique)).reindex(places)
    return found.set_axis(values.index)


def holds_numbers(values: Series) -> bool:
    """Whether pandas has read all of a column as numbers, the missing ones apart."""
    return values.dtype.kind in "iuf"


def read(
    path: Path,
    *,
    delimiter: str | None = None,
    encoding: str | None = None,
    decimal: Decimal | None = None,
    header: Header = "auto",
) -> Table:
    """Read a CSV file.

    Args:
        path: the file.
        delimiter: between columns; None for whichever of `, ; tab |` divides the header most.
        encoding: of the text; None for UTF-8, UTF-16 with its mark, else Latin-1.
        decimal: the decimal mark; None for a comma where the numbers of a column have one.
        header: whether the first row has the names of the columns; `auto` takes it to have them,
            and asks where most of them are numbers.

    Raises:
        DataError: it cannot be read, is not a table, or has no rows.
    """
    head, likely = _head(path, encoding)
    if delimiter is None:
        delimiter = max(DELIMITERS, key=lambda d: len(_first_row(head, d)))
    elif len(delimiter) != 1:
        raise DataError(f"delimiter must be one character, got {delimiter!r}")
    first = _first_row(head, delimiter)
    if not first:
        raise DataError(f"{path} is empty; expected a header with the names of the columns")
    names = None if header != "no" else [f"column_{i + 1}" for i in range(len(first))]
    notes = []
    try:
        frame, more = _frame(path, likely, delimiter, names, decimal or ".")
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise DataError(f"{path} cannot be read as {encoding}: {error}") from error
        likely = "latin-1"
        notes.append("the file is not UTF-8 and was read as Latin-1; else say --encoding")
        frame, more = _frame(path, likely, delimiter, names, decimal or ".")
    if decimal is None and _has_commas(frame):
        decimal = ","
        frame, more = _frame(path, likely, delimiter, names, decimal)
        more.append("numbers are read with decimal commas")
    if frame.empty:
        raise DataError(f"{path} has a header ({listed(frame.columns)}) and no rows")
    question, numeric = "", int(as_numbers(pd.Series(first, dtype=object)).notna().sum())
    if header == "auto" and 2 * numeric > len(first):
        question = (
            f"the first row of {path} is mostly numbers ({listed(first, 5)}): --header no where it "
            f"has no names of columns, which are then column_1 … column_{len(first)}; --header yes "
            f"where these are the names"
        )
    return Table(str(path), frame, decimal or ".", (*notes, *more), question)


def _head(path: Path, encoding: str | None) -> tuple[str, str]:
    """The beginning of a file as text, and how it is likely encoded."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for magic, reason in NOT_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{path} is not text: {reason}")
    likely = encoding or ("utf-16" if head.startswith(WIDE) else "utf-8")
    if likely == "utf-8" and b"\0" in head:
        raise DataError(
            f"{path} is not text: it has zero bytes; save the table as CSV, or say "
            f"--encoding utf-16 where it is that"
        )
    try:
        return head.decode(likely, errors="ignore").removeprefix("\ufeff"), likely
    except LookupError as error:
        raise DataError(f"{path} cannot be read as {likely}: {error}") from error


def _first_row(head: str, delimiter: str) -> list[str]:
    """The first row that is not empty, as far as it can be read."""
    lines = head.splitlines(keepends=True)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        return next((row for row in rows if any(map(str.strip, row))), [])
    except csv.Error:
        return []


def _frame(
    path: Path,
    encoding: str,
    delimiter: str,
    names: list[str] | None,
    decimal: Decimal,
) -> tuple[DataFrame, list[str]]:
    """The columns, and what pandas and we have left out of them."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            frame = pd.read_csv(
                path,
                encoding=encoding,
                sep=delimiter,
                decimal=decimal,
                header=0 if names is None else None,
                names=names,
                skipinitialspace=not delimiter.isspace(),
                on_bad_lines="warn",
            )
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # what pandas raises for what is no table
        reason = "; is a quote not closed?" if "EOF inside string" in str(error) else ""
        raise DataError(f"{path} cannot be read as CSV ({str(error).strip()}){reason}") from error
    skipped = [line for w in caught for line in re.findall(r"line (\d+): .*saw", str(w.message))]
    notes = []
    if skipped:
        notes.append(f"left out, having more fields than the header: lines {listed(skipped, 5)}")
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(drop=True)
        notes.append("left out: the first field of every row, for which the header has no name")
    frame.columns = [" ".join(str(name).splitlines()).strip() for name in frame.columns]
    if twice := [name for name in frame.columns if re.fullmatch(r".+\.\d+", name)]:
        again = [name for name in twice if name.rpartition(".")[0] in set(frame.columns)]
        if again:
            notes.append(f"columns of a name that was there were called {listed(again)}")
    if not frame.columns.is_unique:
        again = set(frame.columns[frame.columns.duplicated()])
        raise DataError(f"{path} has several columns of the name {listed(again)}; rename them")
    for name in frame:
        if not holds_numbers(frame[name]):
            frame[name] = of_each(frame[name], _plain)
    return frame, notes


def _plain(values: Series) -> Series:
    """Text without white space around it, missing where it says so."""
    texts = values.astype("string").str.strip()
    return texts.mask(texts.isin(MISSING)).astype(object).astype("category")


def _has_commas(frame: DataFrame) -> bool:
    """Whether most values of a column of text are numbers with a decimal comma."""
    for name in frame.columns:
        texts = frame[name].dropna()
        if holds_numbers(texts) or texts.empty:
            continue
        texts = texts.head(10_000).astype("string")
        commas = texts.str.fullmatch(COMMA)
        grouped = texts.str.fullmatch(GROUPED["."])
        if commas.mean() > 0.5 and not grouped[commas].all():
            return True
    return False
