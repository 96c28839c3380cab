"""Predictions of a saved model for a CSV file or a folder of images."""

import csv
import io
import sys
from collections.abc import Sequence
from math import isnan
from pathlib import Path

import torch
from rich.console import Console

from equigrad.errors import DataError, RunError
from equigrad.experiments.data.image_folder import SUFFIXES, find, named, read_images
from equigrad.experiments.data.images import Pixels
from equigrad.experiments.runs.model import load_model
from equigrad.experiments.tables.encoding import Encoding, names_of
from equigrad.experiments.tables.reading import Decimal, Header, read
from equigrad.training.files import write_whole
from equigrad.training.targets import Target
from equigrad.wording import counted, listed


def predict_table(
    model: Path,
    path: Path,
    *,
    out: Path | None,
    delimiter: str | None,
    encoding: str | None,
    decimal: Decimal | None,
    header: Header,
    console: Console,
) -> None:
    """Predict the target of every row of a CSV file, and score predictions if it is known.

    Args:
        model: a run's folder, or its `model.pt`.
        path: the table, with columns in any order.
        out: file of the predictions; None for standard output.
        delimiter: as in `equigrad.experiments.tables.reading.read`.
        encoding: as there.
        decimal: as there; None for that of the training table.
        header: as there.
        console: console for notes.

    Raises:
        RunError: there is no model, or `out` exists.
        DataError: the table cannot be read, or lacks columns of the model.
    """
    asked = load_model(model)
    if not isinstance(asked.encoding, Encoding):
        raise DataError(f"{model} was trained on images; use it with --images DIR")
    decimal = decimal or asked.encoding.decimal
    table = read(path, delimiter=delimiter, encoding=encoding, decimal=decimal, header=header)
    x, notes = asked.encoding.encode(table)
    notes = [*table.notes, *notes]
    known = {column.column for column in asked.encoding.columns} | {asked.encoding.target}
    if more := [name for name in table.frame.columns if name not in known]:
        notes.append(f"columns that the model does not use: {listed(more)}")
    outputs, _ = asked.ask(x)
    name = asked.encoding.target
    if name in table.frame:
        numbers = [None if isnan(x) else x for x in table.numbers(name)]
        notes += scored(asked.target, outputs, names_of(table.frame[name]).tolist(), numbers)
    rows = list(range(1, len(table) + 1))
    write(out, {"row": rows, **asked.target.answers(outputs)}, notes, console)


def predict_images(
    model: Path, folder: Path, *, out: Path | None, skip_broken: bool, console: Console
) -> None:
    """Predict the class of every image in a folder and below, and score if subfolders name it.

    Args:
        model: a run's folder, or its `model.pt`.
        folder: folder of images.
        out: file of the predictions; None for standard output.
        skip_broken: whether to leave out files that cannot be read, with a note.
        console: console for notes.

    Raises:
        RunError: there is no model, or `out` exists.
        DataError: there are no images, or broken ones.
    """
    asked = load_model(model)
    if not isinstance(asked.encoding, Pixels):
        raise DataError(f"{model} was trained on a table; use it with --csv FILE")
    if not (files := find(folder)):
        raise DataError(f"{folder} contains no images ({', '.join(sorted(SUFFIXES))})")
    pixels, kept, broken = read_images(
        files, size=asked.encoding.size, channels=asked.encoding.channels
    )
    if broken and not (skip_broken and kept):
        raise DataError(named(broken, len(files)) + "; repair them, or use --skip-broken")
    notes = [named(broken, len(files)) + ", left out"] if broken else []
    outputs, unsettled = asked.ask(asked.encoding.encode(pixels))
    if unsettled:
        names = listed([str(kept[i]) for i in unsettled], 5)
        notes.append(f"the network has not converged, so the prediction may be wrong, for {names}")
    classes = [class_of(path, folder, asked.target) for path in kept]
    unknown: list[float | None] = [None] * len(classes)
    if any(label is not None for label in asked.target.read(classes, unknown)):
        notes += scored(asked.target, outputs, classes, unknown)
    columns = {"file": kept, **asked.target.answers(outputs)}
    if asked.solver is not None:
        missed = set(unsettled)
        columns["settled"] = ["no" if i in missed else "yes" for i in range(len(kept))]
    write(out, columns, notes, console)


def class_of(path: Path, folder: Path, target: Target) -> str:
    """The outermost subfolder that names a class, else the innermost one.

    For an image in the folder itself, the folder's name if that is a class, else None.
    """
    parts = path.relative_to(folder).parts[:-1] or (folder.resolve().name,)
    known = target.read(parts, [None] * len(parts))
    named = (part for part, label in zip(parts, known, strict=True) if label is not None)
    return next(named, parts[-1] if path.parent != folder else "")


def scored(
    target: Target, outputs: torch.Tensor, texts: Sequence[str], numbers: Sequence[float | None]
) -> list[str]:
    """The score of predictions for rows whose target can be read."""
    values = target.read(texts, numbers)
    strange = {t for t, v in zip(texts, values, strict=True) if v is None and t}
    rows = [i for i, value in enumerate(values) if value is not None]
    notes = (
        [f"not scored, because the model does not know the target {listed(sorted(strange), 5)}"]
        if strange
        else []
    )
    if rows:
        y = torch.tensor([values[i] for i in rows])
        found = target.metrics(outputs[rows], y)
        said = ", ".join(
            f"{metric} {v:.4g}{' %' if metric == 'accuracy' else ''}"
            for metric, v in found.items()
            if not isnan(v)
        )
        notes.append(f"{said} on {len(rows)} with a known target")
    return notes


def write(
    out: Path | None, columns: dict[str, list], notes: Sequence[str], console: Console
) -> None:
    """Write columns as CSV, without overwriting a file, and print the notes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if out is None:
        sys.stdout.write(text.getvalue())
    elif out.exists():
        raise RunError(f"{out} exists already, and nothing is overwritten; give another --out")
    else:
        write_whole(out, text.getvalue())
        notes = [*notes, f"{counted(len(columns['prediction']), 'prediction')} saved in {out}"]
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
