"""`equigrad report`: one page of HTML about the runs in some folders."""

import base64
import csv
import io
import json
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
from equigrad.experiments import figures
from equigrad.experiments.run_folders import (
    RunFolder,
    find_runs,
    flat,
    is_number,
    json_object,
    numbers,
    tensors,
)
from equigrad.experiments.strength_learning import LABELS, mean_and_error
from equigrad.training.files import write_whole

GENERATOR = '<meta name="generator" content="equigrad report">'
"""The mark of a page that may be written over."""

SECTION = ("setting", "scale")
"""Settings that make runs of one experiment another matter."""

MOST_ROWS = 200
"""Rows of a table that are shown."""


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers, which are set to the right."""
        return [
            i > 0 and all(is_numeric(row[i]) for row in self.rows)
            for i in range(len(self.headings))
        ]


@dataclass(frozen=True)
class Panel:
    """Something of a run: a table, a picture or a text, under a title."""

    title: str
    table: Table | None = None
    picture: str = ""
    text: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Run:
    """What the page has of a folder."""

    folder: RunFolder
    anchor: str
    panels: Sequence[Panel]
    open: bool


class Group:
    """Runs with the same settings but for the seed."""

    def __init__(self, family: RunFolder | None) -> None:
        self.family, self.runs, self.label = family, list[RunFolder](), ""

    @property
    def seeded(self) -> list[RunFolder]:
        """The runs without the folder that holds those of all seeds."""
        return [run for run in self.runs if run.seeds is None]

    @property
    def missing(self) -> list[int]:
        """Seeds that were asked for and have no folder."""
        there = {run.settings.get("seed") for run in self.seeded}
        asked = (self.family.seeds if self.family else None) or 0
        return [seed for seed in range(asked) if seed not in there]

    @property
    def finished(self) -> list[RunFolder]:
        """Those that have ended."""
        return [run for run in self.seeded if run.ended]

    @property
    def status(self) -> str:
        """Whether all have ended, and how far the others are."""
        if len(self.finished) == len(self.seeded) and not self.missing:
            return "finished"
        several = len(self.seeded) + len(self.missing) > 1
        lines = [
            f"seed {run.settings.get('seed')}: {run.progress}" if several else run.progress
            for run in self.seeded
            if not run.ended
        ]
        lines += [f"seed {seed}: missing" for seed in self.missing]
        if several:
            total = len(self.seeded) + len(self.missing)
            lines.insert(0, f"{len(self.finished)} of {total} seeds finished")
        return "; ".join(lines)

    @property
    def seeds(self) -> str:
        """The seeds of those that have ended; of all where none has."""
        seeds = [
            run.settings["seed"]
            for run in self.finished or self.seeded
            if run.settings.get("seed") is not None
        ]
        return ", ".join(map(str, seeds))

    def mean(self, read: Callable[[RunFolder], float | None]) -> tuple[float, float | None] | None:
        """Mean and standard error over those that have ended, or None where there is no number."""
        values = [value for run in self.finished if (value := read(run)) is not None]
        return mean_and_error(values) if values else None

    @property
    def gradients(self) -> str:
        """Mean number of gradients of a seed."""
        found = self.mean(lambda run: numbers(run.result).get("gradient_evaluations"))
        return "" if found is None else f"{found[0]:,.0f}"

    @property
    def time(self) -> str:
        """Mean time of a seed."""
        found = self.mean(lambda run: numbers(run.result).get("seconds"))
        return "" if found is None else duration(found[0])

    @property
    def device(self) -> str:
        """Where it was computed."""
        devices = (str(run.result["device"]) for run in self.finished if "device" in run.result)
        return ", ".join(dict.fromkeys(devices))

    def cell(self, metric: str) -> "Cell":
        """A metric, beside the paper's."""
        found = self.mean(lambda run: run.metrics.get(metric))
        if found is None:
            last = [
                f"{shown(run.logged[metric])} at step {run.steps_done}"
                for run in self.seeded
                if metric in run.logged
            ]
            return Cell("", "; ".join(last))
        paper = next(
            (p for run in self.finished if metric in (p := numbers(run.result.get("paper")))), None
        )
        if paper is None:
            return Cell(with_error(*found))
        published = with_error(paper[metric], paper.get(f"{metric}_standard_error"))
        return Cell(with_error(*found), f"paper {published}", f"{found[0] - paper[metric]:+.2f}")


@dataclass(frozen=True)
class Cell:
    """A number of the overview, what stands below it, and how far they are apart."""

    number: str
    below: str = ""
    difference: str = ""


@dataclass(frozen=True)
class Section:
    """Groups of one experiment: their curves, what they differ in, and their runs."""

    title: str
    groups: Sequence[Group]
    curves: Sequence[Panel]
    differences: Table | None
    runs: Sequence[Run]


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about all runs in some folders and below them.

    Args:
        folders: folders of runs, or above them.
        out: the page; `report.html` in the first folder by default.

    Returns:
        Where the page is.

    Raises:
        RunError: there is no run, or the page cannot be written, or would replace another file.
    """
    out = folders[0] / "report.html" if out is None else out
    page = render(find_runs(folders))
    if not out.parent.is_dir():
        raise RunError(f"cannot write {out}: {out.parent} is not a folder; give another --out")
    if out.exists() and not (out.is_file() and GENERATOR.encode() in out.read_bytes()[:2000]):
        raise RunError(f"{out} is not a report, and nothing is written over; give another --out")
    write_whole(out, page.encode("utf-8", "replace"))
    return out


def render(folders: Sequence[RunFolder]) -> str:
    """The page about some runs."""
    environment = Environment(
        loader=PackageLoader("equigrad.experiments"),
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


def grouped(folders: Sequence[RunFolder]) -> dict[str, list[Group]]:
    """Groups of runs by the title of their section, in order of path."""
    families = {folder.path: folder for folder in folders if folder.seeds is not None}
    sections: dict[str, dict[str, list[Group]]] = {}
    for run in folders:
        family = next(
            (families[at] for at in (run.path, *run.path.parents) if at in families), None
        )
        title = ", ".join(
            [
                run.experiment,
                *(f"{word} {run.settings[word]}" for word in SECTION if word in run.settings),
            ]
        )
        alike = {k: v for k, v in run.settings.items() if k not in ("seed", "seeds")}
        # a run without readable settings is like no other
        key = json.dumps([str(family), alike or str(run)], sort_keys=True)
        same = sections.setdefault(title, {}).setdefault(key, [])
        taken = (run.settings.get("seed"), run.seeds)
        for group in same:  # a seed that was run twice is not two seeds
            if all((r.settings.get("seed"), r.seeds) != taken for r in group.runs):
                break
        else:
            same.append(group := Group(family))
        group.runs.append(run)
    return {
        title: [group for groups in keyed.values() for group in groups]
        for title, keyed in sections.items()
    }


def section(title: str, groups: Sequence[Group], anchors: Mapping[Path, str]) -> Section:
    """Label the groups by what tells them apart, draw their curves, and gather their runs."""
    settings = [
        {
            "": str(group.runs[0]),
            **dict(
                flat(
                    {k: v for k, v in group.runs[0].settings.items() if k not in ("seed", "seeds")}
                )
            ),
            **dict(flat({"versions": group.runs[0].about.get("versions", {})})),
        }
        for group in groups
    ]
    names = list(dict.fromkeys(name for each in settings for name in each if name))
    differing = [n for n in names if any(each.get(n) != settings[0].get(n) for each in settings)]
    for group, each in zip(groups, settings, strict=True):
        estimator = each.get("estimator")
        own = [
            f"{name} {text(each.get(name))}"
            for name in differing
            if name != "estimator" and not name.startswith("versions.")
        ]
        first = LABELS.get(str(estimator), str(estimator or group.runs[0].experiment))
        group.label = ", ".join([first, *own[:3]])
    labels = Counter(group.label for group in groups)
    for group in groups:
        if labels[group.label] > 1:
            group.label += f" ({group.family or group.runs[0]})"
    table = Table(
        ["setting", *(group.label for group in groups)],
        [[name, *(text(each.get(name, "")) for each in settings)] for name in differing],
    )
    runs = [
        Run(run, anchors[run.path], list(panels(run)), open=run is group.runs[0])
        for group in groups
        for run in group.runs
    ]
    return Section(title, groups, curves(groups), table if differing else None, runs)


def troubles(sections: Sequence[Section]) -> Iterator[tuple[str, str, str]]:
    """What a reader should know before all else: the run's anchor, its name, a sentence."""
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
    """All metrics that a run has reached or logged."""
    return list(
        dict.fromkeys(name for folder in folders for name in [*folder.metrics, *folder.logged])
    )


def curves(groups: Sequence[Group]) -> list[Panel]:
    """What was logged against the outer step, the runs over each other; a colour a group."""
    runs = [(i, run) for i, group in enumerate(groups) for run in group.seeded if run.history]
    found = []
    for name in [*metric_names([run for _, run in runs]), "outer_loss", "residual"]:
        lines = []
        for i, run in runs:
            points = [(r["outer_step"], r[name]) for r in run.history if name in numbers(r)]
            if name in run.metrics:  # with what was learned, after the last step
                points.append((run.steps_done, run.metrics[name]))
            if points:
                lines.append((i, points))
        if lines:
            svg = figures.curves(lines, log=name == "residual")
            found.append(Panel(words(name), picture=data_uri(svg, "svg+xml")))
    return found


def panels(run: RunFolder) -> Iterator[Panel]:
    """What lies in a run's folder, the best to look at first; what cannot be read is noted."""
    readers: dict[str, Callable[[bytes], dict[str, Any]]] = {
        ".md": lambda content: {"text": markdown(content.decode())},
        ".png": lambda content: {"picture": data_uri(smaller(content), "png")},
        ".pt": lambda content: {"table": strengths_table(content)},
        ".json": json_panel,
        ".csv": lambda content: {"table": csv_table(content), "folded": True},
    }
    passed_over = ("config.json", "checkpoint.pt")
    names = [name for name in run.files if name not in passed_over]
    for suffix, reader in readers.items():
        for name in (n for n in names if n.endswith(suffix)):
            content = run.read(name, reader)
            if content is not None:
                yield Panel(name, **content)
    table = Table(["setting", "value"], [[n, text(v)] for n, v in flat(run.about)])
    yield Panel("config.json", table=table, folded=True)


def json_panel(content: bytes) -> dict[str, Any]:
    """A table by rows, of means where there is one a seed, or else all that it says, folded."""
    found = json_object(content)
    if found and all(isinstance(value, list) for value in found.values()):
        found = {
            name: {
                column: with_error(*mean_and_error([numbers(row)[column] for row in rows]))
                for column in numbers(rows[0])
            }
            for name, rows in found.items()
        }
    if found and all(isinstance(value, dict) for value in found.values()):
        columns = list(dict.fromkeys(column for row in found.values() for column in row))
        rows = [
            [LABELS.get(name, name), *(text(row.get(column, ""), brief=True) for column in columns)]
            for name, row in found.items()
        ]
        return {"table": Table(["", *map(words, columns)], rows)}
    return {"table": Table(["", ""], [[n, text(v)] for n, v in flat(found)]), "folded": True}


def csv_table(content: bytes) -> Table:
    """A table of comma-separated values, as far as it is shown."""
    headings, *rows = csv.reader(io.StringIO(content.decode()), strict=True)
    note = f"The first {MOST_ROWS} of {len(rows):,} rows." if len(rows) > MOST_ROWS else ""
    return Table(headings, [[short(entry) for entry in row] for row in rows[:MOST_ROWS]], note)


def strengths_table(content: bytes) -> Table:
    """How the learned strengths, or whatever was learned, are distributed in each layer."""
    rows = []
    for name, tensor in tensors(content).items():
        values = tensor.double().flatten().numpy()
        median, high = np.quantile(values, (0.5, 0.9))
        shape = "×".join(map(str, tensor.shape))
        share = 100 * float((values == 0).mean())
        rows.append(
            [name, shape, f"{values.size:,}", f"{share:.1f}", f"{median:.3g}", f"{high:.3g}"]
        )
    return Table(["learned", "shape", "number", "at zero, %", "median", "90th percentile"], rows)


def markdown(source: str) -> Markup:
    """Markdown as HTML; HTML within it is text, and nothing is linked or fetched."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "image", "autolink", "reference"])
    return Markup(parser.render(source))


def smaller(png: bytes) -> bytes:
    """A figure in a third of the bytes: in 128 colours."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """An image that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def words(name: str) -> str:
    """A name as a heading; accuracies are in percent.

    Example:
        >>> words("test_accuracy")
        'test accuracy, %'
    """
    return name.replace("_", " ") + (", %" if name.endswith("_accuracy") else "")


def shown(number: float) -> str:
    """A number as a table has it.

    Example:
        >>> [shown(number) for number in (80702, 94.4258, 0.00012345)]
        ['80,702', '94.43', '0.0001234']
    """
    if isinstance(number, int) or abs(number) >= 1e4:
        return f"{number:,.0f}"
    return f"{number:.2f}" if abs(number) >= 1 else f"{number:.4g}"


def with_error(mean: float, error: float | None) -> str:
    """`mean ± error` with the same digits after the point, or the mean alone.

    Example:
        >>> with_error(95.1, 0.66), with_error(0.0123, 0.00041), with_error(80702.0, None)
        ('95.10 ± 0.66', '0.0123 ± 0.00041', '80,702')
    """
    if error is None:
        return shown(mean)
    return f"{shown(mean)} ± {f'{error:.2f}' if 1 <= abs(mean) < 1e4 else f'{error:.2g}'}"


def is_numeric(entry: str) -> bool:
    """Whether a table's entry is a number, or empty."""
    return not entry.strip(" 0123456789,.±+-−einfa∞")


def text(value: Any, *, brief: bool = False) -> str:
    """A value of JSON as a table has it; `brief` leaves out digits that nobody reads."""
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return shown(value) if brief and is_number(value) else str(value)


def short(entry: str) -> str:
    """A number with no more digits than anyone reads; other words as they are."""
    try:
        return shown(float(entry)) if "." in entry else entry
    except ValueError:
        return entry


def duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> [duration(seconds) for seconds in (0.26, 76.4, 7300)]
        ['0.3 s', '1 min 16 s', '2 h 1 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
