"""A page of results: every place of the papers' tables, and what runs have reached of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from equigrad.errors import EquigradError
from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.formats import NOT_RUN, average, spread, with_error
from equigrad.experiments.runs.model import restored
from equigrad.experiments.runs.reproduction import ByExperiments, Cell, cell_folder, from_csv
from equigrad.experiments.runs.run_folders import RunFolder, mapping

HEADS = ("", "the paper, %", "ours, %", "seeds", "scale", "hardware", "minutes a seed", "command")

PREFACE = """\
# Results

Every number of the papers' tables beside what was reached here: mean ± standard error over seeds.
*Seeds* says how many of how many were run where some are missing. A command reproduces its line;
`--out DIR` names its folder, and with `--resume` a table that was stopped goes on. This page is
written by `equigrad report DIR --out FILE.md`.
"""


@dataclass(frozen=True)
class Measured:
    """A table in a folder, as far as it was measured.

    Attributes:
        folder: that of the table.
        table: its settings.
        rows: what was measured.
    """

    folder: RunFolder
    table: ByExperiments
    rows: Sequence[Any]


def results(folders: Sequence[RunFolder], kinds: Sequence[type[ByExperiments]]) -> str:
    """The page, as Markdown.

    Args:
        folders: of runs; those of other runs than such tables are passed over.
        kinds: the papers' tables, a section each.
    """
    measured = [found for folder in folders if (found := read(folder, kinds)) is not None]
    sections = (
        section(kind, [each for each in measured if type(each.table) is kind]) for kind in kinds
    )
    return "\n".join([PREFACE, *sections])


def read(folder: RunFolder, kinds: Sequence[type[ByExperiments]]) -> Measured | None:
    """The table in a folder; None where there is none of these, or none that can be read."""
    kind = next((k for k in kinds if k.__name__.lower() == folder.experiment), None)
    if kind is None:
        return None
    try:
        table = restored(kind, folder.settings)
        rows = folder.read(f"{kind.name}.csv", lambda content: from_csv(kind.row, content.decode()))
    except EquigradError:  # settings of another version
        return None
    return Measured(folder, table, rows or [])


def section(kind: type[ByExperiments], measured: Sequence[Measured]) -> str:
    """A line a place: of every folder that has it, and of the paper's scale where that lacks."""
    paper = kind.preset(scale="paper")
    places = dict.fromkeys([*paper.places(), *(p for m in measured for p in m.table.places())])
    lines = [line for place in places for line in lines_of(place, paper, measured)]
    title = (kind.__doc__ or kind.name).splitlines()[0].rstrip(".")
    begun = [
        f"\n`{command(each.table)} --out {each.folder} --resume` goes on with what is missing.\n"
        for each in measured
        if len(each.rows) < len(each.table.cells())
    ]
    return (
        f"## {title}\n\n{kind.score.capitalize()} accuracy.\n\n"
        + as_table(HEADS, lines)
        + "".join(begun)
    )


def lines_of(
    place: Cell, paper: ByExperiments, measured: Sequence[Measured]
) -> Iterator[list[str]]:
    """What was reached of a place, and what remains to be run."""
    there = [each for each in measured if each.table.of(each.rows, *place)]
    for each in there:
        yield line(place, each)
    at_paper_scale = any(each.table.scale == "paper" for each in there)
    if place in paper.places() and not at_paper_scale:
        seeds = paper.counted([], *place)
        remains = f"`{command(paper.alone(*place))}`"
        yield [
            *(paper.label(*place), published(paper, place), NOT_RUN, seeds),
            *("paper", "", "", remains),
        ]


def line(place: Cell, measured: Measured) -> list[str]:
    """What was reached of a place in a folder, and what it took."""
    table, rows = measured.table, measured.table.of(measured.rows, *place)
    scores = [getattr(row, table.score) for row in rows]
    finite = all(map(math.isfinite, scores))
    return [
        table.label(*place),
        published(table, place),
        spread(scores, ".2f") if finite else "diverged",
        table.counted(measured.rows, *place),
        table.scale,
        hardware(measured, rows),
        average([row.seconds / 60 for row in rows], ".1f"),
        f"`{command(table.alone(*place))}`",
    ]


def published(table: ByExperiments, place: Cell) -> str:
    """The paper's number, where there is one."""
    found = table.paper(*place)
    return "–" if found is None else with_error(*found, "g")


def hardware(measured: Measured, rows: Sequence[Any]) -> str:
    """What some rows were computed on; the folder of the table says it where they have none."""
    width = len(measured.table.cells()[0])
    cells = [tuple(vars(row).values())[:width] for row in rows]
    runs = [RunFolder(path) for path in (cell_folder(measured.folder.path, *c) for c in cells)]
    said = [run.result for run in runs if run.result] or [measured.folder.about]
    kind = "gpu" if any(str(s.get("device", "")).startswith("cuda") for s in said) else "processor"
    names = dict.fromkeys(str(mapping(s.get("versions")).get(kind, "not known")) for s in said)
    threads = "" if kind == "gpu" else f", {measured.table.threads} threads"
    return "; ".join(names) + threads.replace(" 1 threads", " 1 thread")


def command(table: ByExperiments) -> str:
    """What reproduces a table: the scale, and what differs from its preset."""
    preset = type(table).preset(scale=table.scale)
    words = ["equigrad", "reproduce", table.name, "--scale", table.scale]
    for field in fields(table):
        value = getattr(table, field.name)
        if field.name != "scale" and value != getattr(preset, field.name):
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)
