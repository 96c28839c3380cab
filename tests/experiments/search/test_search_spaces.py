"""The spaces of Tables S1 to S4, and points of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equigrad.errors import ConfigurationError
from equigrad.experiments.runs.config_file import at_paths, overlay
from equigrad.experiments.search.spaces import SPACES, Choice, LogUniform, Space, read_space
from equigrad.experiments.strengths.digits import Digits
from equigrad.experiments.strengths.images import Cifar10, Mnist
from equigrad.experiments.strengths.tabular import Tabular


def configured(what, **chosen):
    if what == "digits":
        return Digits.preset()
    if what == "tabular":
        return Tabular(csv=Path("mine.csv"), target="price")
    return (Mnist if what in Mnist.settings else Cifar10).preset(setting=what, **chosen)


def value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(("what", "estimator"), SPACES)
def test_the_papers_best_are_points_of_the_spaces(what, estimator):
    """What scale `paper` presets is in bold in the same tables."""
    config = configured(what, scale="paper")
    for path, domain in SPACES[what, estimator].domains.items():
        best = value_at(config, path)
        if isinstance(domain, Choice):
            assert best in domain.values
        else:
            assert domain.low < best < domain.high


@pytest.mark.parametrize(("what", "estimator"), SPACES)
def test_every_point_is_a_configuration(what, estimator):
    config = configured(what)
    for point in SPACES[what, estimator].points(20, seed=0):
        changed = overlay(config, at_paths(point))
        assert {path: value_at(changed, path) for path in point} == point


@pytest.mark.parametrize(
    ("key", "size", "trials"),
    [
        (("cifar-50", "contrastive"), 7 * 7 * 4, 196),  # fewer than the 500 to draw
        (("cifar-50", "t1t2"), 7 * 7 * 3, 147),
        (("mnist-10", "contrastive"), 7 * 7 * 7 * 5, 500),
        (("mnist-10", "t1t2"), 7 * 7 * 5, 245),
        (("mnist-1", "contrastive"), None, 500),
        (("mnist-1", "t1t2"), None, 500),
        (("mnist-30000", "contrastive"), 7 * 7 * 2 * 5, 490),
        (("mnist-30000", "t1t2"), 7 * 7 * 3, 147),
    ],
)
def test_points_are_as_many_as_the_tables_say_and_differ(key, size, trials):
    space = SPACES[key]
    points = space.points(space.trials, seed=0)
    assert space.size == size
    assert len(points) == len({tuple(point.values()) for point in points}) == trials
    assert points == space.points(space.trials, seed=0)
    assert points != space.points(space.trials, seed=1)


def test_a_log_uniform_rate_is_as_likely_in_each_decade():
    """Three decades of 3,000 draws: 1,000 each, with a standard deviation of 26."""
    space = Space("mine", {"rate": LogUniform(1e-4, 1e-1)})
    logs = [math.log10(point["rate"]) for point in space.points(3000, seed=0)]
    counts, _ = np.histogram(logs, bins=[-4, -3, -2, -1])
    assert counts.sum() == 3000
    assert all(abs(count - 1000) < 4 * 26 for count in counts)
    with pytest.raises(ConfigurationError, match="no whole grid"):
        space.points(None, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "varies nothing"),
        ('{"solver.lr": []}', "solver.lr: a list of values to choose from is empty"),
        ('{"solver.lr": 0.1}', "solver.lr must be a list of values or"),
        ('{"solver.lr": {"loguniform": [1, 2]}}', "got {'loguniform': [1, 2]}"),
        ('{"solver.lr": {"log_uniform": [1]}}', "solver.lr must be a list of values or"),
        ('{"solver.lr": {"log_uniform": [0, 1]}}', "low must be a finite number above 0, got 0"),
        ('{"solver.lr": {"log_uniform": [2, 1]}}', "needs low < high, got [2, 1]"),
    ],
)
def test_spaces_that_cannot_be(tmp_path, content, message):
    path = tmp_path / "space.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        read_space(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
