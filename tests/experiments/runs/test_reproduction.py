"""What all reproductions share: nothing is measured twice, nothing is lost, files read the same."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments.registry import COMMANDS
from equigrad.experiments.runs.error_curves import ErrorPoint
from equigrad.experiments.runs.reproduction import (
    Reproduction,
    as_csv,
    decades,
    from_csv,
    reproduce,
)
from equigrad.experiments.theory.bound import Fig1, FigS1, FigS2
from equigrad.experiments.theory.quadratic import FigS3, FigS4, FigS5, FigS6

QUIET = Console(quiet=True)
FIGURES = ["fig1", "fig2", "figS1", "figS2", "figS3", "figS4", "figS5", "figS6"]


@dataclass(frozen=True)
class Row:
    word: str
    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Counting(Reproduction):
    """Counts what is measured, and fails at a number."""

    name: ClassVar[str] = "counting"
    row: ClassVar[type] = Row
    log: ClassVar[list[tuple[str, int]]] = []
    fails_at: ClassVar[int | None] = None

    size: int = 3

    def cells(self) -> list[tuple[str, int]]:
        return [("a, quoted", n) for n in range(self.size)] + [("b", 0), ("b", 0)]

    def prepare(self) -> Callable[..., Row]:
        def measure(word: str, number: int) -> Row:
            if number == self.fails_at:
                raise KeyboardInterrupt
            self.log.append((word, number))
            return Row(word, number, math.sqrt(number + 0.1))

        return measure

    def text(self, rows) -> str:
        return f"{len(rows)} rows"

    def draw(self, rows) -> Figure:
        return Figure()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Counting, "log", [])
    monkeypatch.setattr(Counting, "fails_at", None)


def test_each_cell_is_measured_once_and_saved(tmp_path):
    rows = reproduce(Counting(), tmp_path, resume=False, console=QUIET)
    assert Counting.log == [("a, quoted", 0), ("a, quoted", 1), ("a, quoted", 2), ("b", 0)]
    assert from_csv(Row, (tmp_path / "counting.csv").read_text()) == rows
    assert (tmp_path / "counting.md").read_text() == "4 rows"
    assert (tmp_path / "counting.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "fails_at", 2)
    with pytest.raises(KeyboardInterrupt):
        reproduce(Counting(), tmp_path, resume=False, console=QUIET)
    assert len(from_csv(Row, (tmp_path / "counting.csv").read_text())) == 2
    monkeypatch.setattr(Counting, "fails_at", None)
    Counting.log.clear()
    rows = reproduce(Counting(), tmp_path, resume=True, console=QUIET)
    assert Counting.log == [("a, quoted", 2), ("b", 0)]
    assert [(row.word, row.number) for row in rows] == list(dict.fromkeys(Counting().cells()))
    whole = reproduce(Counting(), tmp_path / "whole", resume=False, console=QUIET)
    assert whole == rows
    tables = [(folder / "counting.csv").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert tables[0] == tables[1]
    with pytest.raises(RunError, match="size: there 3, here 5"):
        reproduce(Counting(size=5), tmp_path, resume=True, console=QUIET)


@pytest.mark.parametrize("damage", ["word,number\nb,0\n", "word,number,value\nb,0,much\n"])
def test_damaged_table_is_named(tmp_path, damage):
    reproduce(Counting(), tmp_path, resume=False, console=QUIET)
    (tmp_path / "counting.csv").write_text(damage)
    with pytest.raises(RunError, match=r"damaged.*word, number, value"):
        reproduce(Counting(), tmp_path, resume=True, console=QUIET)


def test_numbers_survive_the_table_to_the_last_bit():
    values = [0.1 + 0.2, 1e-300, math.pi, 10 ** (-7 / 3), math.inf]
    rows = [ErrorPoint(2, math.inf, 20, beta, 1 / 3) for beta in values]
    assert from_csv(ErrorPoint, as_csv(rows)) == rows
    assert as_csv(from_csv(ErrorPoint, as_csv(rows))) == as_csv(rows)


def test_decades():
    grid = decades(-2, 1, 10)
    assert (grid[0], grid[-1], len(grid)) == (0.01, 10.0, 31)
    assert all(b / a == pytest.approx(10**0.1) for a, b in pairwise(grid))


def test_every_figure_and_table_has_a_command_with_a_summary():
    known = {c.name: c.summary for c in COMMANDS if c.verb == "reproduce"}
    tables = ["accuracy", "table1", "table2", "fig3", "equilibrium"]
    assert list(known) == ["matched-phases", *FIGURES, *tables]
    for name in FIGURES:
        assert known[name].startswith(f"Fig. {name.removeprefix('fig')}:")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Fig1, {"errors": (0.1, 0.1)}, "errors must be .*none twice"),
        (Fig1, {"betas": (0.0,)}, "betas must be .*above 0"),
        (FigS1, {"errors": (0.995,)}, "add up to less than 1"),
        (FigS2, {"betas": ()}, "betas must be .*at least one"),
        (FigS3, {"points": (1, 2)}, "points must be .*of at least 2"),
        (FigS3, {"smallest_exponent": 3}, "smallest_exponent must be less than"),
        (FigS4, {"steps": (0, 1)}, "steps must be .*of at least 1"),
        (FigS4, {"betas": (-1.0,)}, "betas must be .*above 0"),
        (FigS5, {"strength": 0.0}, "strength must be a finite number above 0"),
        (FigS5, {"per_decade": 0}, "per_decade must be a whole number of at least 1"),
        (FigS6, {"draws": 0}, "draws must be a whole number of at least 1"),
        (FigS6, {"total_steps": 1}, "total_steps must be a whole number of at least 2"),
    ],
)
def test_settings_that_cannot_work(kind, options, message):
    with pytest.raises(ConfigurationError, match=message):
        kind(**options)
