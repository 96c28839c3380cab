"""Table 1's experiments on made-up images: what is said, what is learned, what is refused."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console

from equigrad import IMAML, T1T2, ConjugateGradient, Contrastive, GradientDescent, meta_gradient
from equigrad.errors import ConfigurationError
from equigrad.estimators import ESTIMATORS
from equigrad.experiments.data import mnist
from equigrad.experiments.runs.methods import OTHERS, EstimatorName, other
from equigrad.experiments.runs.reproduction import fill, from_csv, reproduce
from equigrad.experiments.strengths.images import SETTINGS, Cifar10, Mnist
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from equigrad.experiments.strengths.table1 import Accuracies, Table1
from equigrad.nn import ComplexSynapse
from helpers import call_main, made_up

pytestmark = pytest.mark.usefixtures("made_up_images")


@pytest.mark.parametrize("setting", SETTINGS)
def test_presets_are_points_of_the_grids_of_appendix_f(setting):
    """All of Tables S1 to S4 but the learning rates of S3, which are drawn log-uniformly."""
    rates = {1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1}
    kind = Mnist if setting in Mnist.settings else Cifar10
    config = kind.preset(setting=setting, scale="paper")
    contrastive, t1t2 = config.recipe("contrastive"), config.recipe("t1t2")
    rule = contrastive.estimator
    assert isinstance(rule, Contrastive)
    assert isinstance(rule.nudged_solver, GradientDescent)
    assert rule.beta in {0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0}
    assert not rule.matched
    assert rule.nudged_solver.max_steps in {20, 50, 100, 200, 500}
    assert rule.nudged_solver.lr == contrastive.solver.lr
    for recipe in (contrastive, t1t2):
        assert recipe.solver.max_steps in {100, 200, 500, 1000, 2000}
        assert (recipe.solver.momentum, recipe.solver.nesterov) == (0.9, True)
        assert setting == "mnist-1" or {recipe.solver.lr, recipe.outer_lr} <= rates
    assert (config.outer_steps, config.initial_strength) == (100, 1e-3)
    # "mini-batch … with a minibatch size of 500" on all of MNIST alone
    assert config.batch == (500 if setting == "mnist-30000" else None)
    assert config.training == int(setting.rpartition("-")[2])
    share = {"mnist-30000": 0.5, "mnist-1": 1e-4, "mnist-10": 1e-3, "cifar-50": 0.05}[setting]
    assert config.training == pytest.approx(config.samples * share)


def tiny(**changes):
    config = Mnist.preset(scale="smoke")
    return replace(config, hidden=(16,), threads=1, compare=False, **changes)


def gradients(config, estimator):
    job = StrengthTrainer(config, 0)
    synapse = ComplexSynapse(job.network, strength=0.01)
    recipe = config.recipe(estimator)
    return meta_gradient(
        job.problem(synapse),
        synapse.params(),
        synapse.meta_params(),
        solver=recipe.solver,
        estimator=recipe.estimator,
    ).grads


def test_validation_batches_are_a_partition_of_the_validation_images():
    """T1–T2 averages the outer gradient over them: of equal size, they give the whole's."""
    whole = gradients(tiny(dtype="float64", validation_batch=None), "t1t2")
    parts = gradients(tiny(dtype="float64", validation_batch=19), "t1t2")  # 190 in tens
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-13)


def test_strengths_make_ten_images_enough():
    """Learned strengths read the patterns out of the validation images; single ones cannot."""
    config = tiny(samples=300, outer_steps=15, initial_strength=1e-3)
    solver = replace(config.contrastive.solver, lr=0.05, max_steps=100)
    contrastive = replace(config.contrastive, solver=solver, nudged_steps=30, outer_lr=0.02)
    t1t2 = replace(config.t1t2, solver=solver, outer_lr=0.02)
    job = StrengthTrainer(replace(config, contrastive=contrastive, t1t2=t1t2), 0)
    plain, _ = job.one_strength(0.0)
    for method in ("contrastive", "t1t2"):
        _, row = job.learn(method)
        assert row.validation > plain.validation + 15
        assert row.test > plain.test + 10


@pytest.mark.parametrize(("experiment", "setting"), [("mnist", "mnist-1"), ("cifar10", "cifar-50")])
def test_run_leaves_and_says_what_it_should(tmp_path, monkeypatch, capsys, experiment, setting):
    monkeypatch.chdir(tmp_path)
    words = ["run", experiment, "--setting", setting, "--scale", "smoke", "--threads", "1"]
    words += ["--out", "run", *(["--hidden", "8"] if experiment == "mnist" else [])]
    code, said = call_main(*words, capsys=capsys)
    assert code == 0
    trained = SETTINGS[setting].training
    pool = {"mnist": "60,000 training images of MNIST", "cifar10": "50,000 training images"}
    assert f"{trained} training and {200 - trained} validation images, drawn from" in said
    assert f"drawn from 400 of the {pool[experiment]}" in said
    assert "a nudged step sees 50 of the validation images" in said
    for label in ("unregularised", "best single strength", "T1–T2", "contrastive"):
        assert label in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["experiment"], result["scale"]) == (experiment, "smoke")
    assert result["paper"] is None  # for another number of images
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "strengths.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["experiment"] == experiment
    code, again = call_main(*words, "--resume", capsys=capsys)
    assert code == 0
    rounded = f"{result['metrics']['test_accuracy']:.2f}"
    assert again.rpartition("contrastive")[2].count(rounded)


def test_the_papers_numbers_stand_beside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", lambda files=None: made_up(10000, 1, 28, 0))
    words = ["run", "mnist", "--scale", "smoke", "--samples", 10000, "--no-compare", "--out", "run"]
    code, said = call_main(*words, "--hidden", "4", "--threads", "1", capsys=capsys)
    assert code == 0
    assert "96.19 ± 0.32" in said
    paper = json.loads((tmp_path / "run" / "result.json").read_text())["paper"]
    assert paper == {
        "validation_accuracy": 96.19,
        "validation_accuracy_standard_error": 0.32,
        "test_accuracy": 91.52,
        "test_accuracy_standard_error": 0.28,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training", "0"], "training must be a whole number of at least 1, got 0"),
        (["--training", "200"], "the validation split would be empty: 200 of 200"),
        (["--samples", "401"], "401 images were asked for, and there are 400"),
        (["--setting", "cifar-50"], "cifar-50"),
        (["--batch", "0"], "batch must be a whole number of at least 1, or None, got 0"),
        (
            ["--validation-batch", "0"],
            "validation_batch must be a whole number of at least 1,",
        ),
        (
            ["--contrastive.nudged-steps", "0"],
            "nudged_steps must be a whole number of",
        ),
        (["--contrastive.outer-lr", "0"], "outer_lr must be a finite number above 0, got 0"),
        (["--t1t2.outer-lr", "-1"], "outer_lr must be a finite number above 0, got -1"),
        (["--contrastive.rule.beta", "0"], "beta must be a finite number other than 0"),
        (["--hidden", "0"], "hidden must be a tuple of values, each a whole number of at least 1"),
    ],
)
def test_wrong_words_end_with_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code, said = call_main("run", "mnist", "--scale", "smoke", *words, capsys=capsys)
    assert code == 2
    assert message in said


TABLE = Table1(scale="smoke", seeds=2, only=("mnist-1", "cifar-50"), threads=1)
QUIET = Console(quiet=True)


def test_table_is_gone_on_with_where_it_was_stopped(tmp_path, monkeypatch):
    measured = []

    def measured_in(self, folder, setting, method, seed):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((setting, method, seed))
        return Accuracies(setting, method, seed, 90.0 + seed, 80.0 + 2 * seed, 2, 7, 0.5)

    monkeypatch.setattr(Table1, "_measured", measured_in)
    path, partial = tmp_path / "table1.csv", tmp_path / "table1-partial.md"
    with pytest.raises(KeyboardInterrupt):
        fill(TABLE, path, QUIET)
    assert len(from_csv(Accuracies, path.read_text())) == 5
    said = partial.read_text()
    assert said.startswith("**Partial: 5 of 8 cells were measured.**")
    assert "| 90.50 ± 0.50 | 81.00 ± 1.00 | 93.50 ± 0.63 | 89.49 ± 0.55 | 2 | 2 |" in said
    assert "| 90.00 | 80.00 | 62.97 ± 3.73 | 28.69 ± 0.85 | 1 of 2 | 2 |" in said
    first, measured[:] = list(measured), []
    rows = fill(TABLE, path, QUIET)
    assert not partial.exists()
    assert first + measured == TABLE.cells()
    assert len(measured) == 3
    # mean 90.5 and standard error ½ of 90 and 91; 81 ± 1
    line = next(line for line in TABLE.text(rows).splitlines() if "cifar-50 | T1–T2" in line)
    assert "90.50 ± 0.50 | 81.00 ± 1.00 | 62.97 ± 3.73 | 28.69 ± 0.85 | 2 | 2 |" in line
    TABLE.draw(rows)


def test_cell_of_the_table_is_the_run_of_its_seed():
    row = TABLE.measure("cifar-50", "t1t2", 1)
    _, again = StrengthTrainer(replace(Cifar10.preset(scale="smoke"), threads=1), 1).learn("t1t2")
    assert (row.validation, row.test) == (again.validation, again.test)


def test_the_force_of_the_table_is_the_run_with_that_nudge(tmp_path):
    table = Table1(scale="smoke", only=("mnist-1",), methods=("contrastive-force",), threads=1)
    config = table.experiment(*table.cells()[0])
    assert config.contrastive.rule.nudge == "force"
    assert config.contrastive.rule.beta == 0.03  # the paper's 3 is for the loss
    plain = replace(table, methods=("contrastive",))
    assert plain.experiment(*plain.cells()[0]).contrastive.rule.nudge == "loss"
    rows = reproduce(replace(table, seeds=1), tmp_path, resume=False, console=QUIET)
    metrics = tmp_path / "trials" / "mnist-1-contrastive-force-0" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == rows[0].outer_steps == 2
    curves = table.draw_curves(tmp_path)
    thin, mean = curves.axes[0].lines
    np.testing.assert_array_equal(thin.get_ydata(), mean.get_ydata())
    assert np.shape(mean.get_ydata()) == (2,)
    assert (tmp_path / "table1-curves.png").exists()


def test_paper_scale_has_the_seeds_of_the_paper():
    table = Table1.preset(scale="paper")
    seeds = {
        line: {seed for there, _, seed in table.cells() if there == line} for line in table.only
    }
    assert {line: len(found) for line, found in seeds.items()} == {
        **dict.fromkeys(("mnist-1", "mnist-10", "cifar-50"), 12),
        "mnist-30000": 5,
    }
    assert len(table.places()) == 12


def test_constant_statistics_change_the_gradient():
    config = replace(Cifar10.preset(scale="smoke"), threads=1)
    one, other = (
        gradients(replace(config, constant_statistics=constant), "t1t2")
        for constant in (False, True)
    )
    first = next(iter(one))
    assert not torch.allclose(one[first], other[first], rtol=0.1)
    with pytest.raises(ConfigurationError, match="leave out batch=20"):
        replace(config, constant_statistics=True, batch=20)


def test_a_rule_that_chooses_its_nudged_phases_is_left_alone():
    preset = Mnist.preset(scale="smoke")
    for rule in (Contrastive(rtol=0.1), Contrastive(nudged_solver=GradientDescent(lr=0.5))):
        chosen = replace(preset, contrastive=replace(preset.contrastive, rule=rule))
        assert chosen.recipe("contrastive").estimator == rule


def test_other_estimators_learn_as_the_contrastive_rule_does():
    preset = Mnist.preset(scale="smoke", estimator="conjugate-gradient")
    assert preset.other == ConjugateGradient()
    recipe, contrastive = (preset.recipe(n) for n in (preset.estimator, "contrastive"))
    assert recipe == replace(contrastive, estimator=ConjugateGradient())
    with pytest.raises(ConfigurationError, match="knobs of another estimator than 'nystrom'"):
        replace(preset, estimator="nystrom")


def test_all_estimators_can_be_chosen_that_see_strengths():
    named = {Contrastive, T1T2, *(type(other(name)) for name in OTHERS)}
    starts = {kind for kind in ESTIMATORS if kind.traits.needs_start}
    assert named == set(ESTIMATORS) - starts - {IMAML}  # which learns the centre alone
    assert set(get_args(EstimatorName)) == {"contrastive", "t1t2", *OTHERS}


@pytest.mark.parametrize("options", [{"seeds": 0}, {"only": ()}, {"only": ("mnist-1", "mnist-1")}])
def test_tables_that_cannot_be(options):
    with pytest.raises(ConfigurationError):
        Table1(**options)
