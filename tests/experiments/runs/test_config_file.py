"""Configurations from files: what was written is read the same, and what is wrong is named."""

import dataclasses
import json
from pathlib import Path

import pytest

from equigrad.experiments.registry import COMMANDS
from equigrad.experiments.runs.config_file import overlay, read_config
from equigrad.experiments.runs.run_directory import describe
from equigrad.experiments.strengths.digits import Digits
from equigrad.experiments.strengths.images import Mnist
from helpers import call_main

SMOKE = ["run", "digits", "--scale", "smoke", "--no-compare"]


REQUIRED = {"csv": Path("mine.csv"), "target": "price", "images": Path("mine")}


def given(config):
    """With what has no default, also in the experiment that is searched."""
    fields = {field.name for field in dataclasses.fields(config)}
    changed = {name: value for name, value in REQUIRED.items() if name in fields}
    if dataclasses.is_dataclass(experiment := getattr(config, "experiment", None)):
        changed["experiment"] = given(experiment)
    return dataclasses.replace(config, **changed)


@pytest.mark.parametrize("scale", ["smoke", "paper"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.verb}-{c.name}")
def test_every_configuration_is_read_as_it_was_written(command, scale):
    config = given(command.defaults(scale=scale))
    written = json.loads(json.dumps(describe(config)))
    assert overlay(command.defaults(scale="small"), written) == config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_of_a_runs_configuration_is_that_run(folder, capsys):
    words = ["--seed", "3", "--solver.lr", "0.03", "--contrastive.beta", "0.5"]
    assert call_main(*SMOKE, *words, "--out", "one", capsys=capsys)[0] == 0
    words = ["run", "digits", "--config", "one/config.json", "--out"]
    assert call_main(*words, "two", capsys=capsys)[0] == 0
    assert call_main(*words, "other", "--solver.lr", "0.02", capsys=capsys)[0] == 0
    one, two, other = (
        [json.loads((folder / run / name).read_text()) for name in ("config.json", "result.json")]
        for run in ("one", "two", "other")
    )
    assert one[0]["config"] == two[0]["config"]
    assert one[1]["metrics"] == two[1]["metrics"]
    # the command line wins, and nothing else differs
    one[0]["config"]["solver"]["lr"] = 0.02
    assert other[0]["config"] == one[0]["config"]


def test_the_file_chooses_the_presets_that_it_does_not_set(folder):
    (folder / "mine.json").write_text(
        json.dumps({"experiment": "mnist", "config": {"setting": "mnist-1", "seed": 4}})
    )
    config = read_config(folder / "mine.json", Mnist.preset, {"scale": "paper"})
    assert (config.training, config.seed) == (1, 4)
    assert config.contrastive == Mnist.preset(setting="mnist-1", scale="paper").contrastive


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read mine.json"),
        ("{", "mine.json is not JSON"),
        ("[]", "mine.json must contain a JSON object, got list"),
        ('{"experiment": "digits"}', "mine.json has no configuration"),
        (
            '{"experiment": "mnist", "config": {}}',
            "is the configuration of 'mnist', not of 'digits'",
        ),
        ({"solver": {"rate": 1}}, "mine.json: there is no solver.rate; GradientDescent has max"),
        ({"solver": {"lr": "fast"}}, "solver.lr must be float, got 'fast'"),
        ({"solver": {"lr": True}}, "solver.lr must be float, got True"),
        ({"solver": 3}, "solver must be GradientDescent, got 3"),
        ({"solver": {"type": "LBFGS"}}, "solver.type must be one of GradientDescent, got 'LBFGS'"),
        ({"solver": {"max_steps": 1.5}}, "solver.max_steps must be int or null, got 1.5"),
        ({"outer_steps": True}, "outer_steps must be int, got True"),
        ({"hidden": [8, "8"]}, "hidden[1] must be int, got '8'"),
        ({"estimator": "guess"}, "estimator must be 'contrastive', "),
        (
            {"contrastive": {"nudged_solver": {"type": "BlackBox"}}},
            "contrastive.nudged_solver: BlackBox",
        ),
        ({"outer_lr": -1}, "outer_lr must be a finite number above 0, got -1"),
        ({"scale": "small"}, "--scale is smoke on the command line, but small in mine.json"),
    ],
)
def test_files_that_cannot_be(folder, capsys, content, message):
    if isinstance(content, dict):
        content = json.dumps({"experiment": "digits", "config": content})
    if content is not None:
        (folder / "mine.json").write_text(content)
    code, said = call_main(*SMOKE, "--config", "mine.json", capsys=capsys)
    assert code == 2
    assert message in said
    assert not (folder / "runs").exists()


def test_changes_leave_the_configuration_as_it_was():
    config = Digits.preset()
    assert overlay(config, {"solver": {"lr": 0.5}}).solver.lr == 0.5
    assert config == Digits.preset()
