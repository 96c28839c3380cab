"""The page about runs says what their files say, and what is missing; it fetches nothing."""

import json
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from equigrad.cli import main
from equigrad.errors import RunError
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.report import report
from helpers import call_main


class Page(HTMLParser):
    """Tags with their attributes, rows of tables as lists of words, and all words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words, self.in_cell = "", False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag in ("small", "p", "li"):
            self.handle_data(" ")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.words += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The first row that begins with these words."""
        return next(row for row in self.rows if row and row[0] == first)


def page_of(*folders: Path, out: Path | None = None) -> Page:
    return Page(report(folders, out))


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """Two seeds of a short run, by both estimators."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    words = [
        "run",
        "digits",
        "--scale",
        "smoke",
        "--seeds",
        "2",
        "--hidden",
        "8",
        "--device",
        "cpu",
        "--out",
    ]
    main([*words, str(folder)])
    return folder


@pytest.fixture
def copied(two_seeds, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(two_seeds, tmp_path / "both"))


def write_run(folder: Path, *, history=(), result=None, **config) -> Path:
    """A run's folder by hand."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "estimator": "contrastive", "outer_steps": 3, **config}
    about = {"experiment": "digits", "config": config, "command": "equigrad run digits"}
    (folder / "config.json").write_text(json.dumps(about))
    if history:
        lines = [json.dumps({"outer_step": i, **row}) + "\n" for i, row in enumerate(history)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_page_fetches_nothing(two_seeds, tmp_path):
    page = page_of(two_seeds, out=tmp_path / "page.html")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert "url(" not in page.source
    assert "@import" not in page.source
    links = {value for _, each in page.tags if (value := each.get("href"))}
    assert links <= {f"#{each['id']}" for _, each in page.tags if "id" in each}
    pictures = [each for tag, each in page.tags if tag == "img"]
    assert len(pictures) == 4 + 4  # curves; and the strengths of two seeds, two estimators
    assert all(each["alt"] for each in pictures)


@pytest.mark.parametrize(
    ("label", "inside"), [("per weight, contrastive", "."), ("per weight, T1–T2", "t1t2")]
)
def test_overview_has_means_of_the_results(two_seeds, tmp_path, label, inside):
    page = page_of(two_seeds, out=tmp_path / "page.html")
    results = [
        json.loads((two_seeds / f"seed-{seed}" / inside / "result.json").read_text())
        for seed in (0, 1)
    ]
    row = page.row(label)
    for column, name in ((1, "validation_accuracy"), (2, "test_accuracy")):
        values = [result["metrics"][name] for result in results]
        error = statistics.stdev(values) / 2**0.5
        assert row[column] == f"{statistics.mean(values):.2f} ± {error:.2f}"
        for value in values:
            assert f"{name.replace('_', ' ')} {value:.2f} %" in page.words
    gradients = statistics.mean(result["gradient_evaluations"] for result in results)
    assert row[3:6] == ["0, 1", "finished", f"{gradients:,.0f}"]
    # the table of means by hand from summary.json is that of the overview
    tables = [r for r in page.rows if r and r[0] == label and r is not row]
    assert [row[1], row[2]] in [table[1:3] for table in tables]


def test_the_papers_numbers_stand_beside(tmp_path):
    paper = {"test_accuracy": 91.52, "test_accuracy_standard_error": 0.28}
    for seed, accuracy in enumerate((90.0, 93.0, 93.0)):  # 92 ± 1
        result = {"metrics": {"test_accuracy": accuracy}, "paper": paper, "seconds": 100 + seed}
        write_run(tmp_path / str(seed), seed=seed, result=result)
    page = page_of(tmp_path)
    assert page.row("per weight, contrastive")[1].split() == (
        ["92.00", "±", "1.00", "paper", "91.52", "±", "0.28", "difference", "+0.48"]
    )
    assert "1 min 41 s" in page.words
    assert "the test column is the verdict" in page.words


def test_what_is_unfinished_or_missing_is_named(copied):
    shutil.rmtree(copied / "seed-1")
    (copied / "seed-0" / "result.json").unlink()
    log = copied / "seed-0" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # killed while it wrote the third line
    last = json.loads(log.read_text().splitlines()[1])
    page = page_of(copied)
    unfinished = "seed 0: unfinished, 2 of 3 outer steps; seed 1: missing"
    row = page.row("per weight, contrastive")
    assert row[4] == f"0 of 2 seeds finished; {unfinished}"
    assert row[2].strip() == f"{last['test_accuracy']:.2f} at step 2"  # no mean of what has no end
    assert page.row("per weight, T1–T2")[4] == "1 of 2 seeds finished; seed 1: missing"
    assert "seed-0: metrics.jsonl: 1 of 3 lines, the first of them line" in page.words
    assert f"{copied}: seed 1 of per weight, contrastive is missing" in page.words


@pytest.mark.parametrize("content", [b"", b'a,b\n{"half', b"\xff\xfe\x00"])
def test_damaged_files_are_named_and_the_rest_is_shown(copied, content):
    names = ["config.json", "result.json", "table.json", "learned.pt", "strengths.png", "more.csv"]
    for name in names:
        (copied / "seed-1" / name).write_bytes(content)
    page = page_of(copied)
    for name in names:
        assert f"seed-1: {name} cannot be read" in page.words
    assert page.row("per weight, contrastive")[4] == "1 of 2 seeds finished; seed 1: missing"
    assert page.row("per weight, T1–T2")[4] == "finished"


def test_names_and_texts_are_not_html(tmp_path):
    attack = "<img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / attack, estimator=attack, note="<script>alert(1)</script>")
    (folder / "notes.md").write_text(f"{attack} <script></script> ![i](http://e.com/i.png)\n")
    (folder / "notes.csv").write_text(f"{attack}\n{attack}\n")
    (folder / f"{attack}.json").write_text(json.dumps({attack: {attack: attack}}))
    page = page_of(tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.words.count(attack) >= 8
    assert "<script>alert(1)</script>" in page.words


def test_a_seed_that_was_run_twice_is_not_two_seeds(tmp_path):
    for folder, accuracy in (("a", 50.0), ("b", 60.0)):
        write_run(tmp_path / folder, result={"metrics": {"test_accuracy": accuracy}})
    page = page_of(tmp_path)
    label = "per weight, contrastive"
    assert page.row(f"{label} ({tmp_path / 'a'})")[1] == "50.00"
    assert page.row(f"{label} ({tmp_path / 'b'})")[1] == "60.00"


def test_settings_that_differ_tell_groups_apart(tmp_path):
    for folder, lr in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / folder, solver={"lr": lr, "max_steps": 7})
    page = page_of(tmp_path)
    assert page.row("solver.lr") == ["solver.lr", "0.1", "0.2"]
    assert not [row for row in page.rows if row and row[0] == "solver.max_steps"]
    assert page.rows.count(["config.solver.max_steps", "7"]) == 2
    assert page.row("per weight, contrastive, solver.lr 0.2")[2] == "unfinished, 0 of 3 outer steps"


def test_strengths_are_described_by_layer(tmp_path):
    folder = write_run(tmp_path / "run")
    strengths = torch.arange(11.0).clamp(min=2) - 2  # 0, 0, 0, 1, 2 … 8
    torch.save({"meta_params": {"strength.0.weight": strengths[None]}}, folder / "learned.pt")
    page = page_of(tmp_path)
    assert page.row("strength.0.weight")[1:] == ["1×11", "11", "27.3", "3", "7"]


def test_what_did_not_settle_is_said(tmp_path):
    statuses = ["converged: residual 1e-7 after 9 steps"] * 2
    statuses.append("not converged: residual 0.1 after 20 steps, tol 1e-6")
    rows = [{"status": status} for status in statuses]
    write_run(tmp_path / "uneasy", history=[*rows[:2], {**rows[2], "uneasy": True}])
    write_run(tmp_path / "well", history=[{"status": "stopped: residual 0.1 after 20 steps"}])
    page = page_of(tmp_path)
    said = f"1 of 3 outer steps, the last of them: {statuses[-1]}"
    assert f"{tmp_path / 'uneasy'}: {said}" in page.words
    assert page.words.count("the last of them") == 1
    assert "Outer step 1: stopped: residual 0.1 after 20 steps." in page.words


def test_reproductions_and_searches_are_shown_as_they_lie(tmp_path):
    folder = write_run(tmp_path / "table", outer_steps=None)
    (folder / "fig.csv").write_text("beta,error\n0.1,0.123456789\n")
    assert page_of(tmp_path).row("per weight, contrastive")[2] == "unfinished"
    (folder / "fig.md").write_text(
        "| β | error |\n| --- | ---: |\n| a < b | 0.5 |\n\nAll *well*.\n"
    )
    Image.new("RGB", (30, 20), "red").save(folder / "fig.png")
    write_run(folder / "trials" / "000", estimator="t1t2")  # a row of its table
    page = page_of(tmp_path)
    assert page.row("per weight, contrastive")[2] == "finished"
    assert ["a < b", "0.5"] in page.rows
    assert ["0.1", "0.123457"] in page.rows
    assert "All well." in page.words
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "T1–T2" not in page.words


def test_curves_of_long_runs_stay_small():
    points = [(i, 1.0 / (i + 1)) for i in range(100_000)]
    svg = figures.curves([(i, points) for i in range(12)], log=True)
    assert len(svg) < 150_000


def test_command_writes_the_page_and_no_other_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = write_run(Path("run"))
    Path("empty").mkdir()
    code, said = call_main("report", run, "--out", "page.html", capsys=capsys)
    assert (code, said) == (0, "written to page.html")
    assert "Runs of equigrad" in Page(tmp_path / "page.html").words
    assert call_main("report", run, "--out", "page.html", capsys=capsys)[0] == 0
    Path("mine.html").write_text("<p>mine")
    for words, message in (
        ((run, "--out", "mine.html"), "mine.html is not a report"),
        ((run, "--out", "gone/page.html"), "gone is not a folder"),
        (("empty",), "none of the folders there has a config.json"),
        (("gone",), "gone is not a folder"),
    ):
        code, said = call_main("report", *words, capsys=capsys)
        assert code == 2
        assert message in said
    assert Path("mine.html").read_text() == "<p>mine"


def test_page_is_in_the_first_folder_by_default(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert report([tmp_path / "a", tmp_path / "b", tmp_path]) == tmp_path / "a" / "report.html"
    assert "2 folders with a run" in Page(tmp_path / "a" / "report.html").words
    with pytest.raises(RunError):
        report([tmp_path / "a" / "config.json"])
