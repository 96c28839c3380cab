"""The page of results: what was run beside the paper's number, what was not with its command."""

import json
import math
import shlex
from dataclasses import replace

import pytest

from equigrad.cli import main
from equigrad.errors import RunError
from equigrad.experiments.registry import paper_tables
from equigrad.experiments.runs.report import report
from equigrad.experiments.runs.reproduction import as_csv
from equigrad.experiments.runs.results import command
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.strengths.first_phase import Fig3, PhaseResult
from equigrad.experiments.strengths.table1 import Accuracies, Table1

PART = replace(Table1.preset(scale="paper"), only=("mnist-1",), seeds=3, threads=1)


def rows_of(page, place):
    lines = [line for line in page.splitlines() if line.startswith(f"| {place} |")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def page(tmp_path):
    """Of a part of Table 1, and of a point of Figure 3 that diverged."""
    RunDirectory(tmp_path / "table1", PART)
    rows = [Accuracies("mnist-1", "t1t2", s, 90.0, 80.0 + s, 100, 7, 60.0) for s in (0, 1)]
    (tmp_path / "table1" / "table1.csv").write_text(as_csv(rows))
    own = tmp_path / "table1" / "trials" / "mnist-1-contrastive-0"
    RunDirectory(own, PART.experiment("mnist-1", "contrastive", 0))
    step = {"outer_step": 11, "test_accuracy": 41.239, "validation_accuracy": 50.0}
    (own / "metrics.jsonl").write_text(json.dumps(step))
    RunDirectory(tmp_path / "fig3", Fig3(only=("B",), cifar_steps=(50,), betas=(30.0,)))
    lost = PhaseResult("B", "contrastive", 50, 30.0, 0, math.nan, math.nan, 0, math.nan)
    (tmp_path / "fig3" / "fig3.csv").write_text(as_csv([lost]))
    return report([tmp_path], tmp_path / "results.md", paper_tables()).read_text()


def test_a_line_has_the_papers_number_ours_seeds_hardware_minutes_and_command(page, tmp_path):
    (line,) = rows_of(page, "mnist-1, T1–T2")
    assert line[1:5] == ["85.89 ± 0.55", "80.50 ± 0.50", "2 of 3", "paper"]
    assert line[5].endswith("cores, 1 thread")
    assert line[6] == "1.0"
    options = "--seeds 3 --only mnist-1 --methods t1t2"
    assert line[7] == f"`equigrad reproduce table1 --scale paper --threads 1 {options}`"
    begun = "--threads 1 --seeds 3 --only mnist-1"
    assert f"`equigrad reproduce table1 --scale paper {begun} --out {tmp_path}/table1" in page
    (lost,) = rows_of(page, "B, β = 30, 50 steps")
    assert lost[2] == "diverged"


def test_a_cell_that_has_begun_says_how_far_it_is(page):
    (line,) = rows_of(page, "mnist-1, contrastive")
    assert line[2:5] == ["41.24, unfinished, 12 of 100 outer steps", "0 of 3", "paper"]


def test_a_table_with_settings_of_another_version_is_named(tmp_path):
    RunDirectory(tmp_path / "old", PART)
    there = json.loads((tmp_path / "old" / "config.json").read_text())
    there["config"]["colour"] = "blue"
    (tmp_path / "old" / "config.json").write_text(json.dumps(there))
    page = report([tmp_path], tmp_path / "results.md", paper_tables()).read_text()
    assert f"- {tmp_path}/old: config.json cannot be read: " in page.partition("## Left out")[2]


def test_what_was_not_run_says_so_with_the_command_that_remains(page):
    (line,) = rows_of(page, "cifar-50, contrastive, force")
    remains = (
        "`equigrad reproduce table1 --scale paper --only cifar-50 --methods contrastive-force`"
    )
    assert line[1:] == ["31.68 ± 0.26", "not run", "0 of 12", "paper", "", "", remains]
    assert rows_of(page, "1100-100-423, 20way1shot, MAML")[0][1] == "95.8 ± 0.3"
    places = sum(len(kind.preset(scale="paper").places()) for kind in paper_tables())
    assert page.count("| not run |") == places - 2


@pytest.mark.parametrize("kind", paper_tables())
def test_the_command_of_every_place_makes_that_place_alone(kind, monkeypatch):
    from equigrad.experiments.runs import reproduction

    asked = []
    monkeypatch.setattr(reproduction, "reproduce", lambda table, *_, **__: asked.append(table))
    table = kind.preset(scale="paper")
    for place in (table.places()[0], table.places()[-1]):
        alone = replace(table, threads=1).alone(*place)
        main(shlex.split(command(alone))[1:])
        assert asked.pop() == alone
        assert place in alone.places()


def test_a_page_that_was_not_written_by_report_is_left_alone(tmp_path, page):
    (tmp_path / "results.md").write_text("# My own\n")
    with pytest.raises(RunError, match="is not a report, so it is not overwritten"):
        report([tmp_path], tmp_path / "results.md", paper_tables())
    assert page.startswith("<!-- written by equigrad report -->\n# Results")
