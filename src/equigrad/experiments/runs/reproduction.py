"""Reproductions of figures and tables, measured row by row, saved and resumed."""

import csv
import functools
import io
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from equigrad.errors import RunError
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import Experiment, ScaleName
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.runs.run_folders import IN_TABLE
from equigrad.fields import Checked, Threads, require
from equigrad.training.device import DeviceName
from equigrad.training.files import write_whole

Placed = TypeVar("Placed", bound=Experiment)
Cell = tuple[Any, ...]
"""The key of a row of the table: the values of its first fields."""

SAVE_EVERY = 1.0
"""The least number of seconds between two writes of the table."""


class Reproduction(Checked):
    """A figure or table of a paper, as a configuration with its measurement, text and drawing.

    Attributes:
        name: name of its files.
        row: dataclass of a row of the table; a cell consists of its first fields.
    """

    name: ClassVar[str]
    row: ClassVar[type]

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults for some choices, such as `scale`."""
        return cls()

    @abstractmethod
    def cells(self) -> Sequence[Cell]:
        """The cells to measure, in the order of the table."""

    @abstractmethod
    def prepare(self) -> Callable[..., Any]:
        """Prepare, and return the function that measures the row of a cell."""

    def prepare_in(self, folder: Path) -> Callable[..., Any]:
        """Like `prepare`; a measurement that can be stopped keeps its progress in the folder."""
        return self.prepare()

    @abstractmethod
    def text(self, rows: Sequence[Any]) -> str:
        """The results, as Markdown."""

    @abstractmethod
    def draw(self, rows: Sequence[Any]) -> Figure:
        """The figure."""

    def figures(self, rows: Sequence[Any], folder: Path) -> dict[str, Figure]:
        """All that is drawn, by name of the file; the folder is that of the table."""
        return {self.name: self.draw(rows)}


@dataclass(frozen=True, kw_only=True)
class ByExperiments(Reproduction):
    """A table or figure whose cells are runs of an experiment with some settings changed.

    The last part of a cell is the seed; the other parts are its *place*, a line of the table.

    Attributes:
        score: the column of a row that is compared with the paper's number on a page of results.
    """

    score: ClassVar[str] = "test"

    scale: ScaleName = "small"
    """Preset of the hyperparameters; `paper` is the paper's own."""

    threads: Threads = 2
    """CPU threads."""

    device: DeviceName = "auto"
    """The device to compute on; `auto` is CUDA if there is any."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """For each scale, the settings that differ from the defaults."""

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The settings of a scale."""
        scale: Any = chosen.get("scale")
        return cls(scale=scale, **cls.presets[scale]) if scale in cls.presets else cls()

    @abstractmethod
    def measure(self, *cell: Any, **named: Any) -> Any:
        """Measure the row of a cell."""

    @abstractmethod
    def alone(self, *place: Any, **named: Any) -> Self:
        """This table with no other place."""

    @abstractmethod
    def label(self, *place: Any, **named: Any) -> str:
        """A place in words."""

    def paper(self, *place: Any, **named: Any) -> tuple[float, float] | None:
        """The paper's score of a place: mean, and standard error or deviation."""
        return None

    def places(self) -> list[Cell]:
        """What the table has, each with some seeds."""
        return list(dict.fromkeys(cell[:-1] for cell in self.cells()))

    def of(self, rows: Sequence[Any], *place: Any) -> list[Any]:
        """The rows of a place: those of the seeds that were measured."""
        return [row for row in rows if tuple(vars(row).values())[: len(place)] == place]

    def counted(self, rows: Sequence[Any], *place: Any) -> str:
        """How many seeds of a place were measured, and of how many where some are missing."""
        there, all_ = len(self.of(rows, *place)), sum(c[:-1] == place for c in self.cells())
        return str(there) if there == all_ else f"{there} of {all_}"

    def prepare(self) -> Callable[..., Any]:
        """Set the number of threads."""
        torch.set_num_threads(self.threads)
        return self.measure

    def placed(self, preset: Placed, **changes: Any) -> Placed:
        """An experiment's settings with some changes, on this device with these threads."""
        return replace(preset, threads=self.threads, device=self.device, **changes)


@dataclass(frozen=True, kw_only=True)
class ByRuns(ByExperiments):
    """A table whose cells are whole runs in their own folders, so that a stopped run can resume."""

    @abstractmethod
    def experiment(self, *cell: Any, **named: Any) -> Any:
        """The settings of a cell."""

    @abstractmethod
    def run(self, config: Any, directory: RunDirectory, console: Console) -> None:
        """Run with these settings in a directory, or resume the run in it."""

    @abstractmethod
    def read(self, result: dict[str, Any], *cell: Any, **named: Any) -> Any:
        """The row of a cell, from the `result.json` of its run."""

    def prepare_in(self, folder: Path) -> Callable[..., Any]:
        """Measure each cell in a folder inside this one."""
        self.prepare()
        return functools.partial(self._measured, folder)

    def measure(self, *cell: Any) -> Any:
        """Run in a temporary folder."""
        with TemporaryDirectory() as folder:
            return self._measured(Path(folder), *cell)

    def _measured(self, folder: Path, *cell: Any) -> Any:
        """Run in a folder, or resume there."""
        config = self.experiment(*cell)
        directory = RunDirectory(cell_folder(folder, *cell), config, resume=True)
        if directory.result is None:
            # plain lines, since the terminal's only bar is that of the table
            console = Console(force_terminal=False, markup=False)
            self.run(config, directory, console)
        return self.read(directory.result or {}, *cell)


def cell_folder(folder: Path, *cell: Any) -> Path:
    """Where the run of a cell lies, in the folder of its table."""
    return folder / IN_TABLE / "-".join(map(str, cell))


def over_seeds(seeds: int, spread: str = "standard error") -> str:
    """A caption for the numbers of a table: of seed 0, or means over seeds."""
    return "seed 0" if seeds == 1 else f"mean ± {spread} over {seeds} seeds"


def reproduce(figure: Reproduction, out: Path, *, resume: bool, console: Console) -> list[Any]:
    """Measure, print and save `NAME.{csv,md,png}`; existing rows are kept."""
    directory = RunDirectory(out, figure, resume=resume)
    rows = fill(figure, directory.path / f"{figure.name}.csv", console)
    text = figure.text(rows)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    write_whole(directory.path / f"{figure.name}.md", text)
    for name, drawn in figure.figures(rows, directory.path).items():
        figures.save(drawn, directory.path / f"{name}.png")
    return rows


def fill(figure: Reproduction, table: Path, console: Console) -> list[Any]:
    """Measure the missing cells of the table; results are kept if this is stopped."""
    cells = list(dict.fromkeys(figure.cells()))
    known = from_csv(figure.row, table.read_text()) if table.exists() else []
    rows = {tuple(vars(row).values())[: len(cells[0])]: row for row in known}
    missing = [cell for cell in cells if cell not in rows]
    if missing:
        measure, saved = figure.prepare_in(table.parent), time.monotonic()
        try:
            for cell in track(missing, "measuring", console=console, transient=True):
                rows[cell] = measure(*cell)
                if time.monotonic() - saved > SAVE_EVERY:
                    save(figure, table, rows, cells)
                    saved = time.monotonic()
        finally:
            save(figure, table, rows, cells)
    return save(figure, table, rows, cells)


def save(
    figure: Reproduction, table: Path, rows: Mapping[Cell, Any], cells: Sequence[Cell]
) -> list[Any]:
    """Write what was measured, in the order of the cells; where some are missing, say so.

    A table by experiments, which may take days, has its text in `NAME-partial.md` until it is
    whole.
    """
    ordered = [rows[cell] for cell in cells if cell in rows]
    partial = table.with_name(f"{figure.name}-partial.md")
    if ordered:
        write_whole(table, as_csv(ordered))
    if len(ordered) == len(cells):
        partial.unlink(missing_ok=True)
    elif ordered and isinstance(figure, ByExperiments):
        said = f"**Partial: {len(ordered)} of {len(cells)} cells were measured.** "
        write_whole(partial, f"{said}`--resume` measures the rest.\n\n{figure.text(ordered)}")
    return ordered


def measure_all(figure: Reproduction) -> list[Any]:
    """Measure all rows, without a folder."""
    measure = figure.prepare()
    return [measure(*cell) for cell in dict.fromkeys(figure.cells())]


def decades(lowest: float, highest: float, per_decade: int) -> list[float]:
    """Numbers from `10^lowest` to `10^highest`, evenly spaced on a logarithmic scale.

    Example:
        >>> decades(-1, 1, 1)
        [0.1, 1.0, 10.0]
    """
    first, last = round(lowest * per_decade), round(highest * per_decade)
    return [10 ** (k / per_decade) for k in range(first, last + 1)]


def check_grid(smallest: int, largest: int) -> None:
    """Raise a `ConfigurationError` unless the exponents of a grid are in order."""
    require(
        smallest < largest,
        f"smallest_exponent must be less than largest_exponent, got {smallest} and {largest}",
    )


def as_csv(rows: Sequence[Any]) -> str:
    """Rows of a dataclass under a header, with numbers written so that they read back exactly."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(vars(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


def _number(text: str) -> float:
    """A number from text; without a point it stays whole, so that it is written the same again."""
    return int(text) if text.isdigit() else float(text)


READERS: dict[type, Callable[[str], Any]] = {str: str, int: int, float: _number}


def from_csv(row: type, text: str) -> list[Any]:
    """Rows from the text of `as_csv`, for fields that are strings or numbers.

    Raises:
        RunError: the table does not have such rows.
    """
    fields = {name: READERS[kind] for name, kind in get_type_hints(row).items()}
    try:
        found = list(csv.DictReader(io.StringIO(text), strict=True))
        return [row(**{name: read(line[name]) for name, read in fields.items()}) for line in found]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunError(
            f"the table of the run is damaged ({error!r}), its columns should be "
            f"{', '.join(fields)}; delete the .csv to measure it again, or give another --out"
        ) from error
