from pathlib import Path

from equigrad.estimators import ESTIMATORS
from equigrad.estimators.table import as_markdown, rows
from helpers import call_main


def test_the_docs_hold_the_table_that_the_estimators_make():
    page = Path(__file__).parents[2] / "docs" / "estimators.md"
    assert as_markdown() in page.read_text()


def test_every_estimator_has_a_row():
    assert [row[0] for row in rows()] == [estimator.__name__ for estimator in ESTIMATORS]


def test_the_list_fits_a_terminal_of_a_hundred_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, said = call_main("list", capsys=capsys)
    assert code == 0
    assert "…" not in said  # what rich puts where a word does not fit
    assert said.count(" needed ") == said.count(" seen ") == 3
