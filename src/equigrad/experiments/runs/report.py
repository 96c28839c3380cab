"""`equigrad report`: one page about the runs in some folders, or about the papers' tables."""

import base64
import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from PIL import Image

from equigrad.errors import RunError
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.formats import (
    is_numeric,
    mean_and_error,
    short,
    shown,
    text,
    with_error,
    words,
)
from equigrad.experiments.runs.methods import LABELS
from equigrad.experiments.runs.reproduction import ByExperiments
from equigrad.experiments.runs.results import results
from equigrad.experiments.runs.run_folders import (
    RunFolder,
    find_runs,
    flat,
    json_object,
    mapping,
    numbers,
    tensors,
)
from equigrad.experiments.runs.run_groups import BESIDE, Group, grouped
from equigrad.training.files import write_whole

GENERATOR = '<meta name="generator" content="equigrad report">'
"""The mark of a page that may be overwritten."""

WRITTEN = "<!-- written by equigrad report -->"
"""That of a page of Markdown."""

MOST_ROWS = 200
"""The most rows of a table to show."""

HUGE = 1e100
"""Values of this size, like NaN, are not drawn."""

FEW_ROWS = 24
"""The most rows of a table that is shown unfolded."""


@dataclass(frozen=True)
class HtmlTable:
    """Text in rows and columns; the first column names the row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, which are aligned to the right."""
        return [
            i > 0 and all(is_numeric(row[i]) for row in self.rows)
            for i in range(len(self.headings))
        ]


@dataclass(frozen=True)
class ReportPanel:
    """A part of a run under a title: a table, a picture or a text."""

    title: str
    table: HtmlTable | None = None
    picture: str = ""
    text: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Run:
    """A run's part of the page."""

    folder: RunFolder
    anchor: str
    panels: Sequence[ReportPanel]
    open: bool


@dataclass(frozen=True)
class Section:
    """The groups of one experiment: their curves, differences and runs."""

    title: str
    groups: Sequence[Group]
    curves: Sequence[ReportPanel]
    differences: HtmlTable | None
    runs: Sequence[Run]


def report(
    folders: Sequence[Path], out: Path | None = None, tables: Sequence[type[ByExperiments]] = ()
) -> Path:
    """Write a page about all runs in some folders and below them.

    Args:
        folders: folders of runs, or folders above them.
        out: the page; `report.html` in the first folder by default. If its name ends in `.md`, the
            page shows the papers' tables cell by cell, beside the results of the runs.
        tables: the papers' tables, for such a page.

    Returns:
        The path of the page.

    Raises:
        RunError: there is no run, or the page cannot be written, or would replace another file.
    """
    out = folders[0] / "report.html" if out is None else out
    runs = find_runs(folders)
    page = f"{WRITTEN}\n{results(runs, tables)}" if out.suffix == ".md" else render(runs)
    if not out.parent.is_dir():
        raise RunError(f"cannot write {out}: {out.parent} is not a folder; give another --out")
    mark = (WRITTEN if out.suffix == ".md" else GENERATOR).encode()
    if out.exists() and not (out.is_file() and mark in out.read_bytes()[:2000]):
        raise RunError(f"{out} is not a report, so it is not overwritten; give another --out")
    write_whole(out, page.encode("utf-8", "replace"))
    return out


def render(folders: Sequence[RunFolder]) -> str:
    """The page about some runs."""
    environment = Environment(
        loader=PackageLoader("equigrad.experiments.runs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    anchors = {folder.path: f"run-{i}" for i, folder in enumerate(folders, 1)}
    sections = [section(title, groups, anchors) for title, groups in grouped(folders).items()]
    return environment.get_template("report.html").render(
        generator=Markup(GENERATOR),
        sections=sections,
        anchors=anchors,
        metrics=metric_names(folders),
        folders=folders,
        troubles=list(troubles(sections)),
        written=f"{datetime.now():%d %B %Y, %H:%M}",
        version=metadata.version("equigrad"),
        words=words,
        shown=shown,
        color=figures.color,
    )


def section(title: str, groups: Sequence[Group], anchors: Mapping[Path, str]) -> Section:
    """Compare the groups of an experiment, draw their curves, and collect their runs."""
    settings = [settings_of(group.runs[0]) for group in groups]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [n for n in names if any(each.get(n) != settings[0].get(n) for each in settings)]
    name_groups(groups, settings, differing)
    table = HtmlTable(
        ["setting", *(group.label for group in groups)],
        [[name, *(text(each.get(name, "")) for each in settings)] for name in differing],
    )
    runs = [
        Run(
            run,
            anchors[run.path],
            list(panels(run)),
            open=run in (group.family, *group.seeded[:1]),
        )
        for group in groups
        for run in group.runs
    ]
    return Section(title, groups, curves(groups), table if differing else None, runs)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """The settings that a run's results depend on, other than the seed, by dotted names."""
    settings = {name: value for name, value in run.settings.items() if name not in BESIDE}
    return dict(flat({**settings, "versions": mapping(run.about.get("versions"))}))


def name_groups(
    groups: Sequence[Group], settings: Sequence[Mapping[str, Any]], differing: Sequence[str]
) -> None:
    """Label each group by its estimator and differences, or else by its path."""
    told = [n for n in differing if n != "estimator" and not n.startswith("versions.")]
    for group, each in zip(groups, settings, strict=True):
        estimator = str(each.get("estimator") or group.runs[0].experiment)
        own = (f"{name} {text(each.get(name))}" for name in told[:3])
        group.label = ", ".join([LABELS.get(estimator, estimator), *own])
    shared = Counter(group.label for group in groups)
    for group in groups:
        if shared[group.label] > 1:
            group.label += f" ({group.family or group.runs[0]})"


def troubles(sections: Sequence[Section]) -> Iterator[tuple[str, str, str]]:
    """What a reader should know first: the run's anchor, its name, and a sentence."""
    for each in sections:
        for group in each.groups:
            for seed in group.missing:
                yield "", str(group.family), f"seed {seed} of {group.label} is missing"
        for run in each.runs:
            folder = run.folder
            said = list(folder.damage)
            if folder.seeds is None and not folder.ended:
                said.append(folder.progress)
            if folder.uneasy:
                count = f"{len(folder.uneasy)} of {len(folder.history)} outer steps"
                said.append(f"{count}, the last of them: {folder.uneasy[-1]}")
            for sentence in said:
                yield run.anchor, str(folder), sentence


def metric_names(folders: Sequence[RunFolder]) -> list[str]:
    """All metrics that a run has reported or logged."""
    return list(
        dict.fromkeys(name for folder in folders for name in [*folder.metrics, *folder.logged])
    )


def curves(groups: Sequence[Group]) -> list[ReportPanel]:
    """Curves of logged values against the outer step, with one colour for each group."""
    runs = [(i, run) for i, group in enumerate(groups) for run in group.seeded if run.history]
    found = []
    for name in [*metric_names([run for _, run in runs]), "outer_loss", "residual"]:
        lines = []
        for i, run in runs:
            rows = [*run.history, {"outer_step": run.steps_done, **run.metrics}]
            points = [(row["outer_step"], numbers(row).get(name, math.nan)) for row in rows]
            if points := [(step, value) for step, value in points if abs(value) < HUGE]:
                lines.append((i, points))
        if lines:
            svg = figures.curves(lines, log=name == "residual")
            found.append(ReportPanel(words(name), picture=data_uri(svg, "svg+xml")))
    return found


def panels(run: RunFolder) -> Iterator[ReportPanel]:
    """The files of a run as panels, the most informative first; unreadable files are noted."""
    readers: dict[str, Callable[[bytes], dict[str, Any]]] = {
        ".md": lambda content: {"text": markdown(content.decode())},
        ".png": lambda content: {"picture": data_uri(smaller(content), "png")},
        ".pt": lambda content: {"table": strengths_table(content)},
        ".json": json_panel,
        ".csv": csv_panel,
    }
    passed_over = ("config.json", "result.json", "checkpoint.pt", "model.pt")
    names = [name for name in run.files if name not in passed_over]
    for suffix, reader in readers.items():
        for name in (n for n in names if n.endswith(suffix)):
            content = run.read(name, reader)
            if content is not None:
                yield ReportPanel(name, **content)
    for name, content in (("config.json", run.about), ("result.json", run.result)):
        if content:
            yield ReportPanel(name, table=listing(content), folded=True)


def json_panel(content: bytes) -> dict[str, Any]:
    """A JSON file as a table with means if it has a row for each seed, else as folded text."""
    found = json_object(content)
    if all(is_rows(rows) for rows in found.values()):
        means = {
            name: {
                column: with_error(*mean_and_error([row[column] for row in rows]))
                for column in numbers(rows[0])
            }
            for name, rows in found.items()
        }
        return {"table": by_name(means)}
    if is_rows(list(found.values())):
        return {"table": by_name(found)}
    return {"table": listing(found), "folded": True}


def is_rows(value: Any) -> bool:
    """Whether a value is a non-empty list of dictionaries with the same keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
    )


def by_name(rows: Mapping[str, Mapping[str, Any]]) -> HtmlTable:
    """A table of named rows."""
    columns = list(next(iter(rows.values()), {}))
    return HtmlTable(
        ["", *map(words, columns)],
        [
            [LABELS.get(name, name), *(text(row.get(column, ""), brief=True) for column in columns)]
            for name, row in rows.items()
        ],
    )


def listing(content: Mapping[str, Any]) -> HtmlTable:
    """The content of a JSON object, one entry a line."""
    return HtmlTable(["name", "value"], [[name, text(value)] for name, value in flat(content)])


def csv_panel(content: bytes) -> dict[str, Any]:
    """A table of comma-separated values, limited in length, and folded if it is long."""
    headings, *rows = csv.reader(io.StringIO(content.decode()), strict=True)
    if any(len(row) != len(headings) for row in rows):
        raise ValueError("a row with more or fewer entries than the header")
    note = f"The first {MOST_ROWS} of {len(rows):,} rows." if len(rows) > MOST_ROWS else ""
    table = HtmlTable(headings, [[short(entry) for entry in row] for row in rows[:MOST_ROWS]], note)
    return {"table": table, "folded": len(rows) > FEW_ROWS}


def strengths_table(content: bytes) -> HtmlTable:
    """The distribution of the learned meta-parameters in each layer."""
    rows = []
    for name, tensor in tensors(content).items():
        values = tensor.double().flatten().numpy()
        median, high = np.quantile(values, (0.5, 0.9))
        shape = "×".join(map(str, tensor.shape))
        share = 100 * float((values == 0).mean())
        rows.append(
            [name, shape, f"{values.size:,}", f"{share:.1f}", f"{median:.3g}", f"{high:.3g}"]
        )
    return HtmlTable(
        ["learned", "shape", "number", "at zero, %", "median", "90th percentile"], rows
    )


def markdown(source: str) -> Markup:
    """Markdown as HTML; HTML within it is shown as text, and nothing is linked or fetched."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "reference"])
    return Markup(parser.render(source))


def smaller(png: bytes) -> bytes:
    """A figure in 128 colours, which takes a third of the bytes."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """An image as a data URI, which needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
