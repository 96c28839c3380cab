"""Formatting of numbers, names and tables as text."""

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

NOT_RUN = "not run"
"""Stands for a number that was not measured."""

UNITS = {"_accuracy": ", %", "_psnr": ", dB"}
"""Units of metrics, by the ends of their names."""


def words(name: str) -> str:
    """The name of a metric as a heading, with its unit.

    Example:
        >>> words("test_accuracy"), words("test_r2"), words("test_rmse"), words("test_psnr")
        ('test accuracy, %', 'test R²', 'test RMSE', 'test PSNR, dB')
    """
    known = {"r2": "R²", "rmse": "RMSE", "psnr": "PSNR"}
    said = " ".join(known.get(word, word) for word in name.split("_"))
    return said + next((u for end, u in UNITS.items() if name.endswith(end)), "")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number.

    Example:
        >>> [is_number(value) for value in (1, 0.5, True, "1", None)]
        [True, True, False, False, False]
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(number: float) -> str:
    """A number as the text of a table cell.

    Example:
        >>> [shown(number) for number in (80702, 94.4258, 0.00012345, 1.4e40)]
        ['80,702', '94.43', '0.0001234', '1.4e+40']
    """
    if isinstance(number, int) or 1e4 <= abs(number) < 1e12:
        return f"{number:,.0f}"
    return f"{number:.2f}" if 1 <= abs(number) < 1e4 else f"{number:.4g}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard error if there are several values.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None
    return mean, float(np.std(values, ddof=1) / np.sqrt(len(values)))


def with_error(mean: float, error: float | None, form: str | None = None) -> str:
    """`mean ± error`, or the mean alone, with a readable number of digits or in a given format.

    Example:
        >>> with_error(95.1, 0.66), with_error(0.0123, 0.00041), with_error(502.0, 0.0)
        ('95.10 ± 0.66', '0.01230 ± 0.00041', '502 ± 0')
        >>> with_error(95.1, 0.66, ".1f")
        '95.1 ± 0.7'
    """
    if form is not None:
        return format(mean, form) if error is None else f"{mean:{form}} ± {error:{form}}"
    if error is None:
        return shown(mean)
    if not (math.isfinite(mean) and math.isfinite(error)):
        return f"{mean:.4g} ± {error:.4g}"
    if abs(mean) >= 1e4 or (mean == round(mean) and error == 0):
        places = 0
    else:
        places = 2 if abs(mean) >= 1 or error == 0 else max(2, 1 - math.floor(math.log10(error)))
    return f"{mean:,.{places}f} ± {error:,.{places}f}"


def spread(values: Sequence[float], form: str | None = None) -> str:
    """Mean ± standard error of some values; the mean alone where there is one value.

    Example:
        >>> spread([1.0, 2.0], ".1f"), spread([1.0], ".1f"), spread([])
        ('1.5 ± 0.5', '1.0', 'not run')
    """
    return with_error(*mean_and_error(values), form) if values else NOT_RUN


def average(values: Sequence[float], form: str) -> str:
    """The mean of some values; nothing where there are none.

    Example:
        >>> average([1.0, 2.0], ".1f"), average([], ".1f")
        ('1.5', '')
    """
    return format(fmean(values), form) if values else ""


def as_rich(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal, whose rows have a name and numbers aligned to the right.

    Args:
        title: title of the table.
        heads: headings of the columns of numbers.
        rows: a name and the text of each column; last columns may be left out.
    """
    table = Table(title=title)
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def is_numeric(entry: str) -> bool:
    """Whether the text of a table cell is a number, or empty."""
    return not entry.strip(" 0123456789,.±+-−einfa∞")


def text(value: Any, *, brief: bool = False) -> str:
    """A value of JSON as the text of a table cell; `brief` rounds numbers."""
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return shown(value) if brief and is_number(value) else str(value)


def short(entry: str) -> str:
    """A number rounded for readers; other words unchanged."""
    try:
        return f"{float(entry):.6g}" if "." in entry else entry
    except ValueError:
        return entry


def duration(seconds: float) -> str:
    """Seconds as text with suitable units.

    Example:
        >>> [duration(seconds) for seconds in (0.26, 76.4, 7300, float("nan"))]
        ['0.3 s', '1 min 16 s', '2 h 1 min', '–']
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
