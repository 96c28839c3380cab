"""A page of results: every place of the papers' tables, and what runs have reached of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from equigrad.errors import EquigradError
from equigrad.experiments.runs.config_file import overlay
from equigrad.experiments.runs.error_curves import as_table
from equigrad.experiments.runs.formats import NOT_RUN, average, spread, with_error
from equigrad.experiments.runs.reproduction import ByExperiments, Cell, cell_folder, from_csv
from equigrad.experiments.runs.run_folders import RunFolder, mapping

HEADS = ("", "the paper, %", "ours, %", "seeds", "scale", "hardware", "minutes a seed", "command")

PREFACE = """\
# Results

Every number of the papers' tables beside what was reached at the papers' own scale, where it was
run: mean ± standard error over seeds. Smaller runs are on the pages of Table 1, of Omniglot and
of networks that settle. *Seeds* says how many of how many were run where some are missing. A
command reproduces its line; `--out DIR` names its folder, and with `--resume` a table that was
stopped goes on. This page is written by `equigrad report DIR --out FILE.md`.
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
    sections, left_out = [], []
    for kind in kinds:
        measured = []
        for folder in (f for f in folders if f.experiment == kind.__name__.lower()):
            try:
                measured.append(read(folder, kind))
            except EquigradError as error:  # settings of another version
                folder.damage.append(f"config.json cannot be read: {error}")
            left_out += [f"- {folder}: {sentence}\n" for sentence in folder.damage]
        sections.append(section(kind, measured))
    said = ["## Left out\n\n" + "".join(left_out)] if left_out else []
    return "\n".join([PREFACE, *sections, *said])


def read(folder: RunFolder, kind: type[ByExperiments]) -> Measured:
    """The table in a folder.

    Raises:
        EquigradError: it has settings that are not those of such a table.
    """
    table = overlay(kind.preset(scale=str(folder.settings.get("scale"))), folder.settings)
    rows = folder.read(f"{kind.name}.csv", lambda content: from_csv(kind.row, content.decode()))
    return Measured(folder, table, rows or [])


def section(kind: type[ByExperiments], measured: Sequence[Measured]) -> str:
    """A line a place: of every folder that has it, and of the paper's scale where that lacks."""
    paper = kind.preset(scale="paper")
    places = dict.fromkeys([*paper.places(), *(p for m in measured for p in m.table.places())])
    lines = [line for place in places for line in lines_of(place, paper, measured)]
    title = (kind.__doc__ or kind.name).splitlines()[0].rstrip(".")
    unfinished = [
        f"\n`{command(each.table)} --out {each.folder} --resume` goes on with what is missing.\n"
        for each in measured
        if len(each.rows) < len(each.table.cells())
    ]
    return (
        f"## {title}\n\n{kind.score.capitalize()} accuracy.\n\n"
        + as_table(HEADS, lines)
        + "".join(unfinished)
    )


def lines_of(
    place: Cell, paper: ByExperiments, measured: Sequence[Measured]
) -> Iterator[list[str]]:
    """What was reached of a place, and what remains to be run."""
    there = [each for each in measured if place in each.table.places()]
    lines = [line(place, each) for each in there]
    yield from (said for said in lines if said[2] != NOT_RUN)
    at_paper_scale = any(said[2] != NOT_RUN and said[4] == "paper" for said in lines)
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
    reached = spread(scores, ".2f") if all(map(math.isfinite, scores)) else "diverged"
    return [
        table.label(*place),
        published(table, place),
        reached if rows else begun(place, measured),
        table.counted(measured.rows, *place),
        table.scale,
        hardware(measured, rows),
        average([row.seconds / 60 for row in rows], ".1f"),
        f"`{command(table.alone(*place))}`",
    ]


def begun(place: Cell, measured: Measured) -> str:
    """How far the run of the first seed has come, where none has ended."""
    table = measured.table
    first = next(cell for cell in table.cells() if cell[:-1] == place)
    run = RunFolder(cell_folder(measured.folder.path, *first))
    if not run.history:
        return NOT_RUN
    score = run.logged.get(f"{table.score}_accuracy")
    reached = "" if score is None else f"{score:.2f}, "
    return f"{reached}{run.progress}"


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
    threads = measured.table.threads
    return "; ".join(names) + ("" if kind == "gpu" else f", {threads} thread{'s' * (threads > 1)}")


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
