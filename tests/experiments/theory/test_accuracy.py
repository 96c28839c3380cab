"""The table of accuracy on request, on one small problem."""

import dataclasses
import math

import pytest

import equigrad as eg
from equigrad.experiments.runs.reproduction import measure_all
from equigrad.experiments.theory import accuracy
from equigrad.testing.zoo import ZOO


@pytest.fixture(scope="module")
def rows():
    config = accuracy.Accuracy(
        problems=("quadratic-1",), rtols=(1e-2, 1e-5), repeats=1, tuned=False
    )
    return config, {row.method: row for row in measure_all(config)}


def test_what_was_asked_for_and_what_others_reach(rows):
    _, by_method = rows
    for rtol in (1e-2, 1e-5):
        row = by_method[accuracy.asked(rtol)]
        assert row.error <= rtol
        assert row.error <= row.estimate <= rtol
    assert by_method["conjugate gradient"].error < 1e-4
    assert by_method["unrolled"].error < 1e-8  # 400 steps settle a condition of two
    assert by_method["T1–T2"].error > 0.1  # the Hessian is not the identity
    # three gradients a step and one at the end; two for the checks
    assert by_method["unrolled"].gradients == pytest.approx(3 * 400, abs=5)
    assert all(row.seconds > 0 for row in by_method.values())
    assert math.isnan(by_method["unrolled"].estimate)


def test_the_text_counts_what_the_rows_say(rows):
    config, by_method = rows
    text = config.text(list(by_method.values()))
    assert "1 at 0.01, 1 at 1e-05" in text
    assert "in 2 of 2" in text
    config.draw(list(by_method.values()))


def test_rows_without_an_answer_are_told_as_such(rows):
    config, by_method = rows
    failed = [
        dataclasses.replace(row, error=math.inf, estimate=math.nan, note="SettlingError")
        for row in by_method.values()
    ]
    text = config.text(failed)
    assert "0 at 0.01, 0 at 1e-05" in text
    assert "SettlingError" in text
    config.draw(failed)


def test_memory_of_a_child_that_fails_is_not_a_number():
    assert math.isnan(accuracy.peak_memory(lambda: 1 / 0))
    little, much = (accuracy.peak_memory(lambda n=n: bytearray(n)) for n in (1, 10**8))
    assert 90 < much - little < 110


def test_a_model_without_a_double_backward_is_noted():
    case = ZOO["transformer"]()
    solver = eg.LBFGS(max_steps=50)
    estimator = eg.ConjugateGradient(max_iterations=1, products="autograd")
    with pytest.raises(eg.DoubleBackwardError):
        accuracy.run(case, solver, estimator)
    with accuracy.plain_attention():
        accuracy.run(case, solver, estimator)


def test_tuned_settings_reach_the_accuracy():
    case = ZOO["poisson"]()
    for method in accuracy.TUNED:
        row = accuracy.measure_tuned("poisson", method, case, 1)
        assert row.error <= 1e-2
        assert row.note.startswith("tol ")


@pytest.mark.parametrize(
    "options", [{"problems": ("none",)}, {"rtols": (2.0,)}, {"repeats": 0}, {"problems": ()}]
)
def test_knobs_that_cannot_work(options):
    with pytest.raises(eg.ConfigurationError):
        accuracy.Accuracy(**options)
