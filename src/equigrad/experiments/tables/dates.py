"""Columns of dates: how they are written, and their parts."""

from itertools import product

import pandas as pd

from equigrad.experiments.tables.reading import Series, of_each

DAYS = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%d/%m/%y", "%m/%d/%y")
DATES = ("ISO8601", *("".join(form) for form in product(DAYS, ("", " %H:%M", " %H:%M:%S"))))
"""How a date may be written; where several ways fit all rows, the first."""

PARTS = {"year": "year", "month": "month", "weekday": "day_of_week", "hour": "hour"}
"""Parts of a date, and what pandas calls them."""


def date_form(values: Series) -> str:
    """How the dates of a column are written; empty where they are none."""
    there = values.dropna().drop_duplicates()
    if there.empty or not there.astype(str).str.contains(r"\d[-/.:]\d").all():
        return ""
    return next((form for form in DATES if read_dates(there, form).notna().all()), "")


def read_dates(values: Series, form: str) -> Series:
    """Times, missing where they are not written that way."""

    def parsed(texts: Series) -> Series:
        return pd.to_datetime(texts.astype("string"), format=form, errors="coerce", utc=True)

    return of_each(values, parsed)


def parts_of(values: Series, form: str, *parts: str) -> dict[str, Series]:
    """Parts of dates as numbers, by name; all of them if none is named."""
    times = read_dates(values, form)
    return {part: getattr(times.dt, PARTS[part]).astype("float64") for part in parts or PARTS}
