"""The target of a table: a class or a number for every row that has one."""

from typing import Literal

import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.tables.encoding import FEW_VALUES, is_numeric, names_of
from equigrad.experiments.tables.reading import Table
from equigrad.training.targets import Classes, Numbers, Target
from equigrad.wording import counted, listed, shortened

TaskName = Literal["auto", "classification", "regression"]


def read_target(table: Table, name: str, task: TaskName) -> tuple[Target, Table, Tensor, list[str]]:
    """What is predicted: its kind, the rows that have it, a class or number for each, and notes.

    Whole numbers of few values, and text, are classes. Rows without a target are left out, and so
    are classes of one or two rows. Numbers come as they are written, not yet standardised.

    Raises:
        DataError: one class, constant numbers, texts all different.
    """
    values = table.frame[name]
    there, numbers = values.dropna(), table.numbers(name).dropna()
    numeric = is_numeric(table, name) and len(there) > 0
    how = "as --task says"
    if task == "auto":
        whole = bool((numbers % 1 == 0).all())
        few = numbers.nunique() <= FEW_VALUES and 2 * numbers.nunique() <= len(numbers)
        task = "regression" if numeric and not (whole and few) else "classification"
        other = "regression" if task == "classification" else "classification"
        kind = ("whole numbers" if whole else "numbers") if numeric else "text"
        how = f"the target {name!r} being {kind} with {there.nunique()} values"
        how += f"; else --task {other}" if numeric else ""
    kept, what = numbers, "is no number"
    if task == "classification":
        kept, what = names_of(there), "is a class of one or two rows"
        kept = kept[kept.map(kept.value_counts()) >= 3]
    notes = []
    if gone := len(values) - len(there):
        notes.append(f"left out: {counted(gone, 'row')} without a target")
    if len(lost := there.drop(kept.index)):
        named = listed(lost.astype(str).unique(), 5)
        notes.append(f"left out: {counted(len(lost), 'row')} where the target {what}: {named}")
    if kept.nunique() < 2:
        only = f"the value {shortened(str(kept.iloc[0]))} only" if len(kept) else "no value"
        raise DataError(
            f"{table.source}: the target {name!r} has {only}, and there is nothing to tell apart"
            f"{''.join('; ' + note for note in notes)}"
        )
    rows = table if len(kept) == len(table) else table.rows(kept.index)
    if task == "regression":
        return Numbers(), rows, torch.tensor(kept.to_numpy()), [f"regression, {how}", *notes]
    names = sorted(kept.unique(), key=float if numeric else str)
    place = {text: i for i, text in enumerate(names)}
    said = f"classification into {len(names)} classes, {how}"
    return Classes(tuple(names)), rows, torch.tensor(kept.map(place).to_numpy()), [said, *notes]
