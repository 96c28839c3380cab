import pytest
from rich.console import Console

from equigrad.experiments.runs.reproduction import as_csv, from_csv, measure_all, reproduce
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.theory.matched_phases import (
    SETTLING_DISTANCE,
    MatchedPhases,
    Point,
    fitted_slope,
)
from helpers import slope

CONFIG = MatchedPhases(seeds=1, steps=(20, 40, 60, 80))


@pytest.fixture(scope="module")
def points():
    return measure_all(CONFIG)


def test_plain_rule_follows_the_square_root_of_the_distance(points):
    """Corollary 1."""
    assert fitted_slope(points, "plain forward") == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rule", ["matched forward", "symmetric"])
def test_matched_phases_follow_the_distance_itself(points, rule):
    assert fitted_slope(points, rule) == pytest.approx(1.0, abs=0.1)


def test_best_beta_of_the_plain_rule_falls_as_corollary_1_says(points):
    """β* is proportional to the square root of the distance, where that is small."""
    plain = [p for p in points if p.rule == "plain forward"]
    assert [p.beta for p in plain] == sorted((p.beta for p in plain), reverse=True)
    near = [p for p in plain if p.distance < SETTLING_DISTANCE]
    measured = slope([p.distance for p in near], [p.beta for p in near])
    assert measured == pytest.approx(0.5, abs=0.1)


def test_drift_helps_the_plain_rule_only_from_the_centre():
    """The drift left out by matched phases points along the response there, and against it else."""
    for config, sign in (
        (MatchedPhases(seeds=1, steps=(5,), start="center"), 1),
        (MatchedPhases(seeds=1, steps=(5,), start="zero"), -1),
    ):
        plain, matched, _ = measure_all(config)
        assert sign * plain.alignment > 0.5
        assert sign * plain.error < sign * matched.error


def test_csv_holds_every_point(points):
    lines = as_csv(points).splitlines()
    assert lines[0] == "rule,steps,distance,alignment,error,beta"
    assert len(lines) == 1 + len(points)
    assert from_csv(Point, as_csv(points)) == points


def test_points_that_are_there_are_not_measured_again(points, tmp_path, monkeypatch):
    asked = []
    prepare = MatchedPhases.prepare

    def counted(config):
        measure = prepare(config)
        return lambda *cell: asked.append(cell) or measure(*cell)

    monkeypatch.setattr(MatchedPhases, "prepare", counted)
    quiet = Console(quiet=True)
    RunDirectory(tmp_path, CONFIG)
    known = [p for p in points if (p.rule, p.steps) != ("symmetric", 20)]
    (tmp_path / "matched-phases.csv").write_text(as_csv(known))
    again = reproduce(CONFIG, tmp_path, resume=True, console=quiet)
    assert asked == [("symmetric", 20)]
    assert again == points
