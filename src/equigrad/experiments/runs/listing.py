"""The output of `equigrad list`."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from equigrad.estimators.table import HEADINGS, LEGEND, rows

ROOMY = 100
"""Width of a terminal, in columns, from which tables have wide spacing."""


def show(known: Sequence[Any]) -> None:
    """Print the commands and the estimators.

    Args:
        known: the commands, as in `experiments/registry.py`.
    """
    console = Console()
    table = Table(box=None, show_header=False)
    for command in known:
        table.add_row(f"equigrad {command.verb} {command.name}", command.summary)
    console.print(table)
    headings = (heading[0].upper() + heading[1:] for heading in HEADINGS)
    roomy = console.width >= ROOMY
    estimators = Table(
        *headings,
        box=SIMPLE_HEAD,
        padding=(0, int(roomy), 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    estimators.columns[0].no_wrap = True
    for column, texts in zip(estimators.columns, zip(HEADINGS, *rows(), strict=True), strict=True):
        longest = max(len(word) for text in texts for word in text.split())
        column.min_width, column.width = longest, None if roomy else longest
    for row in rows():
        estimators.add_row(*row)
    console.print(estimators)
    console.print(LEGEND)
