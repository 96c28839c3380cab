"""Ask a model that a run has saved."""

import csv
import io
import sys
from pathlib import Path

import torch
from rich.console import Console

from equigrad.data import tables
from equigrad.data.encoding import Encoding
from equigrad.data.tables import MISSING, Decimal, Table, listed
from equigrad.data.targets import Target
from equigrad.errors import DataError, RunError
from equigrad.experiments.model import load_model
from equigrad.training.files import write_whole


def predict_table(
    model: Path,
    path: Path,
    *,
    out: Path | None,
    delimiter: str | None,
    encoding: str,
    decimal: Decimal,
    console: Console,
) -> None:
    """Predict the target of every row of a CSV file, in its order, and score where it is known.

    Args:
        model: a run's folder, or its `model.pt`.
        path: the table; columns in any order.
        out: the file of predictions; None for standard output.
        delimiter: as in `equigrad.data.tables.read`.
        encoding: likewise.
        decimal: likewise.
        console: where notes go.

    Raises:
        RunError: there is no model, or `out` exists.
        DataError: the table cannot be read, or is not one of such rows.
    """
    asked = load_model(model)
    if not isinstance(asked.encoding, Encoding):
        raise DataError(f"{model} learned from images; ask it with --images DIR")
    table = tables.read(path, delimiter=delimiter, encoding=encoding, decimal=decimal)
    x, notes = asked.encoding.encode(table)
    known = {column.name for column in asked.encoding.columns} | {asked.encoding.target}
    if more := [name for name in table.columns if name not in known]:
        notes.append(f"not looked at: {listed(more)}")
    outputs = asked.outputs(x)
    notes += scored(asked.target, asked.encoding.target, outputs, table)
    write(out, {"line": table.lines, **asked.target.answers(outputs)})
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"{len(table)} predictions saved in {out}", highlight=False, soft_wrap=True)


def scored(target: Target, name: str, outputs: torch.Tensor, table: Table) -> list[str]:
    """What the predictions are worth on the rows whose target is there and can be read."""
    if name not in table.columns:
        return []
    texts = table.columns[name]
    values = target.read(texts, table.numbers(name))
    strange = {t for t, v in zip(texts, values, strict=True) if v is None and t not in MISSING}
    rows = [i for i, value in enumerate(values) if value is not None]
    notes = [f"not scored, {name!r} being {listed(sorted(strange), 5)}"] if strange else []
    if rows:
        y = torch.tensor([values[i] for i in rows])
        found = target.metrics(outputs[rows], y)
        said = ", ".join(f"{metric} {value:.4g}" for metric, value in found.items())
        notes.append(f"{said} on {len(rows)} rows with a target")
    return notes


def write(out: Path | None, columns: dict[str, list]) -> None:
    """Write columns as CSV; nothing is written over."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if out is None:
        sys.stdout.write(text.getvalue())
        return
    if out.exists():
        raise RunError(f"{out} is there, and nothing is written over; give another --out")
    write_whole(out, text.getvalue())
