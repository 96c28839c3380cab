"""Figure 3: what its rows say, and that a cell is the run that it stands for."""

import math
from dataclasses import replace

import pytest

from equigrad.errors import ConfigurationError, SettlingError
from equigrad.estimators import T1T2, Contrastive
from equigrad.experiments.runs.reproduction import as_csv, from_csv
from equigrad.experiments.strengths.first_phase import NO_NUDGE, Fig3, PhaseResult
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.solvers import GradientDescent

SMOKE = replace(Fig3.preset(scale="smoke"), threads=1)
FIGURE = Fig3(seeds=2, steps=(500, 50), cifar_steps=(450, 50), betas=(1.0, 3.0, 10.0))


def made_rows(figure):
    """The rule gains 40 points from more steps and T1–T2 loses as many; the best β falls to 1."""
    rows = []
    for panel, method, steps, beta, seed in figure.cells():
        if panel == "A":
            accuracy = {50: 55, 500: 95 if method == "contrastive" else 15}[steps] + 2 * seed
        else:
            best = {50: 10.0, 450: 1.0}[steps]
            accuracy = 80 - 10 * abs(math.log10(beta / best))
        rows.append(PhaseResult(panel, method, steps, beta, seed, accuracy, accuracy - 5, 7, 0.5))
    return rows


def test_text_says_where_each_method_is_best_and_which_beta():
    rows = made_rows(FIGURE)
    assert FIGURE.best_steps(rows) == {"contrastive": 500, "t1t2": 50}
    assert FIGURE.best_betas(rows) == {50: 10.0, 450: 1.0}
    text = FIGURE.text(rows)
    # 95 and 97, and 15 and 17: standard error ½ · √2 · √2
    assert "| 500 | 96.00 ± 1.00 | 16.00 ± 1.00 |" in text
    assert "contrastive is best after 500; T1–T2 is best after 50" in text
    assert "| 50 | 30.00 | 25.23 | 20.00 | 10 |" in text
    assert "20 nudged steps" in text
    assert len(FIGURE.draw(rows).axes) == 2


def test_one_panel_stands_alone():
    figure = replace(FIGURE, only=("B",))
    rows = made_rows(figure)
    assert {row.panel for row in rows} == {"B"}
    assert "MNIST" not in figure.text(rows)
    assert len(figure.draw(rows).axes) == 1


def test_a_phase_that_diverged_is_said_and_is_never_best(monkeypatch):
    def diverge(self, name, callbacks=(), *, watched=True):
        raise SettlingError("the nudged phase diverged")

    monkeypatch.setattr(StrengthTrainer, "__init__", lambda self, config, seed: None)
    monkeypatch.setattr(StrengthTrainer, "learn", diverge)
    lost = FIGURE.measure("B", "contrastive", 50, 10.0, 0)
    assert math.isnan(lost.validation)
    there = made_rows(FIGURE)
    cell = (lost.panel, lost.estimator, lost.steps, lost.beta, lost.seed)
    rows = [lost if tuple(vars(row).values())[:5] == cell else row for row in there]
    assert FIGURE.best_betas(rows) == {50: 3.0, 450: 1.0}
    assert "| 50 | 30.00 | 25.23 | diverged | 3 |" in FIGURE.text(rows)
    FIGURE.draw(rows)
    again = from_csv(PhaseResult, as_csv(rows))
    assert [vars(row) for row in again if row.validation == row.validation] == [
        vars(row) for row in rows if row.validation == row.validation
    ]
    assert len(again) == len(rows)


def test_methods_of_a_learn_alike_and_phases_of_b_are_plain():
    experiment = FIGURE.mnist(150)
    ours, theirs = experiment.recipe("contrastive"), experiment.recipe("t1t2")
    assert ours.solver == theirs.solver
    assert ours.outer_lr == theirs.outer_lr == FIGURE.outer_lr
    assert ours.solver.max_steps == 150
    assert theirs.estimator == T1T2()
    photographs = FIGURE.cifar(450, 3.0).recipe("contrastive")
    rule = photographs.estimator
    assert isinstance(rule, Contrastive)
    assert isinstance(rule.nudged_solver, GradientDescent)
    assert (rule.beta, rule.matched, photographs.solver.max_steps) == (3.0, False, 450)
    assert rule.nudged_solver.max_steps != 450


def test_where_all_diverged_nothing_is_best():
    lost = [replace(r, validation=math.nan) for r in made_rows(FIGURE)]
    assert set(FIGURE.best_betas(lost).values()) == {None}
    text = FIGURE.text(lost)
    assert "contrastive is best after –; T1–T2 is best after –" in text
    assert "| 50 | diverged | diverged | diverged | – |" in text
    FIGURE.draw(lost)


def test_a_part_of_the_figure_says_what_was_not_run():
    part = [row for row in made_rows(FIGURE) if (row.panel, row.steps) != ("B", 450)]
    text = FIGURE.text(part)
    assert "| 50 | 30.00 | 25.23 | 20.00 | 10 |" in text
    assert "| 450 | not run | not run | not run | – |" in text


@pytest.mark.usefixtures("made_up_images")
@pytest.mark.parametrize("cell", [("A", "t1t2", 5, NO_NUDGE, 0), ("B", "contrastive", 10, 3.0, 0)])
def test_cell_is_the_run_that_it_stands_for(cell):
    assert cell in SMOKE.cells()
    row = SMOKE.measure(*cell)
    panel, method, steps, beta, seed = cell
    experiment = SMOKE.mnist(steps) if panel == "A" else SMOKE.cifar(steps, beta)
    learned, watched = StrengthTrainer(experiment, seed).learn(method)
    assert len(learned.state.history) == SMOKE.outer_steps
    assert (row.validation, row.test) == (watched.validation, watched.test)
    assert row.gradient_evaluations == watched.gradient_evaluations


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0},
        {"only": ()},
        {"betas": (1.0, 1.0)},
        {"betas": (0.0, 1.0)},
        {"steps": (0,)},
        {"cifar_outer_steps": 0},
    ],
)
def test_figures_that_cannot_be(options):
    with pytest.raises(ConfigurationError):
        Fig3(**options)
