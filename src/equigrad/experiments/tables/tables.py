"""CSV files of users: reading and checking, with the line number of every row."""

import codecs
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from equigrad.errors import DataError
from equigrad.training.names import name_of
from equigrad.wording import counted, listed, meant, shortened

LONGEST_LINE = 2**20
"""Characters; a longer line is no row of a table that a network could learn from."""

LONGEST_HEADER = 100
"""Lines among which the header is looked for when what divides the columns is not told."""

DELIMITERS = ",;\t|"
MISSING = frozenset({"", "?", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>"})
"""What stands for a value that is not there."""

WIDE = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
NOT_TEXT = {
    b"PK\x03\x04": "it is a spreadsheet or a zip archive: save the table as CSV",
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
    **dict.fromkeys(WIDE, "it is encoded as UTF-16: say --encoding utf-16, or save it as UTF-8"),
}

Decimal = Literal[".", ","]
GROUPED: dict[Decimal, re.Pattern[str]] = {
    ",": re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+(,\d*)?"),
    ".": re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?"),
}
"""A number in which the other mark groups thousands, by the decimal mark."""


@dataclass(frozen=True)
class Table:
    """Columns of text.

    Attributes:
        source: the file.
        columns: values by name of the column, without the white space around them.
        lines: where in the file each row ends.
        decimal: the decimal mark of numbers.
    """

    source: str
    columns: dict[str, list[str]]
    lines: list[int]
    decimal: Decimal = "."

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, option: str) -> list[str]:
        """A column by its name.

        Raises:
            DataError: there is none, and what comes near.
        """
        if name in self.columns:
            return self.columns[name]
        raise DataError(
            f"{option} {name!r} is no column of {self.source}, which has {listed(self.columns)}."
            f"{meant(name, self.columns)}"
        )

    def rows(self, chosen: Sequence[int]) -> "Table":
        """Some of the rows."""
        columns = {name: [c[i] for i in chosen] for name, c in self.columns.items()}
        return replace(self, columns=columns, lines=[self.lines[i] for i in chosen])

    def numbers(self, name: str) -> list[float | None]:
        """A column's values as finite numbers, None where they are not."""
        return [as_number(text, self.decimal) for text in self.columns[name]]

    def names(self, name: str) -> list[str]:
        """A column's values as names of categories, empty where they are missing.

        Where all are numbers, each number has one name, however it is written.
        """
        texts = without_missing(self.columns[name])
        numbers = self.numbers(name)
        if any(number is None and text for text, number in zip(texts, numbers, strict=True)):
            return texts
        return ["" if number is None else name_of(number) for number in numbers]

    def where(self, name: str, chosen: Sequence[int]) -> str:
        """Some values of a column with their lines: at most five, and how many more."""
        some = [f"{shortened(self.columns[name][i])} (line {self.lines[i]})" for i in chosen[:5]]
        more = f" and {len(chosen) - 5} more" if len(chosen) > 5 else ""
        return ", ".join(some) + more


def as_number(text: str, decimal: Decimal = ".") -> float | None:
    """The finite number that a text writes, or None.

    Example:
        >>> as_number("1e3"), as_number("1.000,5", ","), as_number("1_0"), as_number("inf")
        (1000.0, 1000.5, None, None)
    """
    if decimal == ",":
        if GROUPED[decimal].fullmatch(text):
            text = text.replace(".", "")
        elif "." in text:
            return None
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") and "_" not in text else None


def without_missing(texts: Sequence[str]) -> list[str]:
    """Texts with all that stands for a missing value made empty."""
    return ["" if text in MISSING else text for text in texts]


def read(
    path: Path, *, delimiter: str | None = None, encoding: str = "utf-8", decimal: Decimal = "."
) -> Table:
    """Read a CSV file with a header.

    Args:
        path: the file.
        delimiter: between columns; None for whichever of `, ; tab |` divides the header most.
        encoding: of the text; a byte-order mark is skipped.
        decimal: the decimal mark; with a comma, points group thousands.

    Raises:
        DataError: it cannot be read, is not a table, or has no rows; the message names the line.
    """
    try:
        with path.open("rb") as file:
            start = file.peek(4)
            if start.startswith(codecs.BOM_UTF8):
                file.seek(len(codecs.BOM_UTF8))
            try:
                text = TextIOWrapper(file, encoding, newline="")
                wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
            except (LookupError, ValueError) as error:
                raise DataError(
                    f"encoding {encoding!r} is unknown to Python; try 'latin-1'"
                ) from error
            for magic, reason in NOT_TEXT.items():
                if start.startswith(magic) and not (wide and magic in WIDE):
                    raise DataError(f"{path} is not text: {reason}")
            return _parse(path, text, delimiter, decimal)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(path: Path, file: TextIOWrapper, delimiter: str | None, decimal: Decimal) -> Table:
    lines = _lines(path, file)
    if delimiter is None:
        delimiter, lines = _detected(lines)
    elif len(delimiter) != 1:
        raise DataError(f"delimiter must be one character, got {delimiter!r}")
    rows = _rows(path, _reader(lines, delimiter, strict=True))
    header, _ = next(rows, ([], 0))
    if not header:
        raise DataError(f"{path} is empty; expected a header with the names of the columns")
    names = [" ".join(name.splitlines()) for name in header]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has several columns of the name {listed(twice)}; rename them")
    found: list[list[str]] = []
    places: list[int] = []
    ragged: list[str] = []
    for fields, line in rows:
        if len(fields) != len(names):
            ragged.append(f"line {line} ({len(fields)})")
            continue
        found.append(fields)
        places.append(line)
    if ragged:
        more = f" and {len(ragged) - 5} more" if len(ragged) > 5 else ""
        raise DataError(
            f"{path}: the header has {counted(len(names), 'column')}, other lines do not: "
            f"{', '.join(ragged[:5])}{more}. Mend them; a value that holds the delimiter "
            f"{delimiter!r} needs quotes around it"
        )
    if not found:
        raise DataError(f"{path} has a header ({listed(names)}) and no rows")
    columns = {name: [row[i] for row in found] for i, name in enumerate(names)}
    return Table(str(path), columns, places, decimal)


def _detected(lines: Iterator[str]) -> tuple[str, Iterator[str]]:
    """The delimiter that divides the header into most fields, and all lines again."""
    blank: list[str] = []
    head: list[str] = []
    for line in lines:
        (head if head or not line.isspace() else blank).append(line)
        if len(head) == LONGEST_HEADER:
            break
    delimiter = max(DELIMITERS, key=lambda d: len(next(_reader(head, d), [])))
    return delimiter, chain(blank, head, lines)


def _reader(lines: Iterable[str], delimiter: str, *, strict: bool = False) -> Any:
    """Rows of fields; spaces may stand before a field in quotes where they are no delimiter."""
    return csv.reader(
        lines, delimiter=delimiter, strict=strict, skipinitialspace=not delimiter.isspace()
    )


def _lines(path: Path, file: TextIOWrapper) -> Iterator[str]:
    """Lines, however they end; none is held in memory that is longer than a row may be."""
    number = 1
    try:
        while line := file.readline(LONGEST_LINE + 1):
            if "\0" in line:
                raise DataError(
                    f"{path} is not text: it has zero bytes; save the table as CSV, or say "
                    f"--encoding utf-16 where it is that"
                )
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{path}: line {number} is longer than {LONGEST_LINE:,} characters, which no "
                    f"row of a table should be; is it one, with line ends?"
                )
            yield line.removeprefix("\ufeff") if number == 1 else line
            number += 1
    except UnicodeError as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):  # of a block, which may have several lines
            before, reason = error.object[: error.start], error.reason
            number += max(before.count(b"\n"), before.count(b"\r"))
        raise DataError(
            f"{path}: line {number} is not {file.encoding} ({reason}); save the file as UTF-8, or "
            f"say --encoding latin-1"
        ) from error


def _rows(path: Path, reader: Any) -> Iterator[tuple[list[str], int]]:
    """Rows that are not empty, with the line of the file that they end in."""
    while True:
        line = reader.line_num
        try:
            fields = [field.strip() for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}: the row that begins in line {line + 1} cannot be read ({error}); is a "
                f"quote not closed?"
            ) from error
        if any(fields):
            yield fields, reader.line_num
