"""Figures of tasks that say what the numbers say."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from equigrad.errors import ConfigurationError
from equigrad.experiments.few_shot.task_figures import (
    RIGHT,
    WRONG,
    sinusoid_fits,
    task_sheet,
)
from equigrad.experiments.runs.figures import learning_curves
from equigrad.tasks import NWayKShot, Sinusoids


def frames(panel):
    return [to_hex(p.get_edgecolor()) for p in panel.patches if isinstance(p, Rectangle)]


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_counts_and_marks_what_is_wrong(channels):
    sampler = NWayKShot(torch.rand(6, 20, channels, 8, 8), way=5, shot=1, queries=4)
    batch = sampler.sample(3, draw=0)
    predictions = batch.query[1].clone()
    predictions[0, 6] = 4  # a query of the second class; classes are counted from 1
    figure = task_sheet(batch, predictions, tasks=2)
    first, second = figure.axes
    assert first.get_title() == "task 1: 19 of 20 right"
    assert second.get_title() == "task 2: 20 of 20 right"
    assert (frames(first).count(RIGHT), frames(first).count(WRONG)) == (19, 1)
    (mark,) = first.texts
    assert mark.get_text() == "5"
    assert 1 < mark.get_position()[1] < 2  # in the second row
    assert not second.texts


def test_sheet_shows_ink_black():
    images = torch.zeros(2, 3, 1, 4, 4)
    images[..., 0, 0] = 1
    batch = NWayKShot(images, way=2, shot=1, queries=2).sample(1, draw=0)
    for inverted, ink in ((True, 0), (False, 1)):
        (panel,) = task_sheet(batch, inverted=inverted).axes
        assert len(panel.images) == 2 * (1 + 2)
        for image in panel.images:
            pixels = image.get_array()
            assert pixels is not None
            assert pixels[0, 0].tolist() == [ink] * 3
            assert pixels[1, 1].tolist() == [1 - ink] * 3
        assert panel.get_title() == "task 1"


def test_fits_show_the_curve_and_its_errors():
    batch = Sinusoids(amplitude=(2.0, 2.0), phase=(0.0, 0.0)).sample(3, draw=0)
    grid = torch.linspace(-3, 3, 101)
    true = (2 * grid.sin()).expand(3, -1)
    figure = sinusoid_fits(batch, (true + 3)[..., None], true + 0.5, grid, tasks=2)
    assert len(figure.axes) == 2
    for task, panel in enumerate(figure.axes):
        assert panel.get_title() == "mean squared error 9 → 0.25"
        curve, before, after, points = (torch.as_tensor(x.get_ydata()) for x in panel.lines)
        assert torch.allclose(curve, true[0], atol=1e-5)
        assert torch.allclose(before - after, torch.full_like(before, 2.5))
        assert torch.equal(points, batch.support[1][task].flatten())


def test_figures_that_cannot_be():
    sinusoids = Sinusoids().sample(2, draw=0)
    with pytest.raises(ConfigurationError, match=r"shows images.*got inputs of shape \(2, 10, 1\)"):
        task_sheet(sinusoids)
    images = NWayKShot(torch.rand(5, 20, 1, 8, 8)).sample(2, draw=0)
    with pytest.raises(ConfigurationError, match=r"one for each query, \(2, 75\), got \(2, 5\)"):
        task_sheet(images, images.support[1])
    with pytest.raises(
        ConfigurationError, match=r"after must be .* 2 tasks and 7 points.*\(2, 8\)"
    ):
        sinusoid_fits(sinusoids, torch.zeros(2, 7), torch.zeros(2, 8), torch.zeros(7))


def test_learning_curves_stand_against_steps_and_seconds():
    rows = [{"outer_step": t, "outer_loss": 40.0 - t, "seconds": 2.0 * t} for t in range(40)]
    steps, seconds = learning_curves(rows, "accuracy").axes  # nothing was validated
    assert points(seconds)[0][-1] == [78, 1]
    smooth = points(steps)[1]
    assert (smooth[0], smooth[-1]) == ([0, 40], [39, 1.5])  # means of two
    rows[9] |= {"validation_accuracy": 50.0}
    rows[39] |= {"validation_accuracy": 90.0}
    scores, by_time, *_ = learning_curves(rows, "accuracy").axes
    assert points(scores) == [[[9, 50], [39, 90]]]
    assert points(by_time) == [[[18, 50], [78, 90]]]
    assert scores.get_ylabel() == "validation accuracy, %"


def points(axes):
    return [np.asarray(line.get_xydata()).tolist() for line in axes.lines]
