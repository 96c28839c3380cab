"""Networks that settle on made-up images: every method learns, resumes, and says what it cannot."""

import json
from dataclasses import replace

import pytest
import torch

from equigrad.errors import ConfigurationError
from equigrad.estimators import GMRES
from equigrad.experiments.equilibrium import SETTINGS, Equilibrium, Job
from equigrad.experiments.equilibrium_table import EquilibriumTable, Reached
from equigrad.experiments.reproduction import from_csv
from helpers import call_main

pytestmark = pytest.mark.usefixtures("made_up_images")

PLACES = [(setting, method) for setting, known in SETTINGS.items() for method in known.methods]


@pytest.mark.parametrize(("setting", "method"), PLACES)
def test_every_method_lowers_the_loss_it_descends(setting, method):
    """A few epochs on 100 made-up images, whose classes are easy to tell apart."""
    preset = Equilibrium.preset(setting=setting, method=method, scale="smoke")
    config = replace(
        preset, samples=200, held_out=100, batch=20, epochs=10, outer_lr=3e-3, threads=1
    )
    history = Job(config).learn().history
    losses = [float(row["outer_loss"]) for row in history]
    first, last = losses[:5], losses[-5:]
    assert sum(last) < 0.8 * sum(first)


def test_a_run_leaves_what_it_reached_and_resumes_to_it(tmp_path, capsys):
    words = ("run", "equilibrium", "--scale", "smoke", "--threads", "1", "--out")
    code, said = call_main(*words, tmp_path / "run", capsys=capsys)
    assert code == 0, said
    assert "300 training, 100 validation and 100 test images" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"].keys() == {"validation_accuracy", "test_accuracy"}
    assert (result["epochs"], result["outer_steps"]) == (1, 6)
    for name in ("model.pt", "learning.png", "checkpoint.pt", "metrics.jsonl"):
        assert (tmp_path / "run" / name).exists()
    (tmp_path / "run" / "result.json").unlink()
    code, said = call_main(*words, tmp_path / "run", "--resume", capsys=capsys)
    assert code == 0, said
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    assert again["metrics"] == result["metrics"]


def test_the_table_has_a_line_a_network_and_method(tmp_path, capsys):
    words = ("reproduce", "equilibrium", "--scale", "smoke", "--threads", "1", "--out")
    options = ("--only", "recurrent", "hopfield", "--methods", "exact")
    code, said = call_main(*words, tmp_path / "table", *options, capsys=capsys)
    assert code == 0, said
    assert "equilibrium RNN" in said
    rows = from_csv(Reached, (tmp_path / "table" / "equilibrium.csv").read_text())
    assert [(row.setting, row.method) for row in rows] == [
        ("recurrent", "exact"),
        ("hopfield", "exact"),
    ]
    assert (tmp_path / "table" / "equilibrium.png").exists()


def test_linear_feedback_has_weights_for_every_hidden_layer_and_they_learn():
    preset = Equilibrium.preset(setting="feed-forward", method="linear-feedback", scale="smoke")
    job = Job(replace(preset, hidden=(16, 12, 8), threads=1))
    found = {n: q for n, q in job.network.named_parameters() if n.startswith("feedback")}
    assert {n: tuple(q.shape) for n, q in found.items()} == {
        "feedback.0": (16, 10),
        "feedback.1": (12, 10),
        "feedback.2": (8, 10),
    }
    assert not any(q.any() for q in found.values())
    job.learn()
    forward = dict(job.network.named_parameters())["blocks.3.1.weight"].T
    last = found["feedback.2"]
    assert torch.cosine_similarity(last.flatten(), forward.flatten(), dim=0) > 0.7


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"setting": "spiking"}, "setting must be one of feed-forward, .*got 'spiking'"),
        ({"setting": "hopfield", "method": "kolen-pollack"}, "'hopfield' is trained by equil"),
    ],
)
def test_words_that_choose_nothing(chosen, message):
    with pytest.raises(ConfigurationError, match=message):
        Equilibrium.preset(**chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": GMRES()}, "method 'exact' has the estimator Adjoint, got GMRES"),
        ({"hidden": ()}, r"hidden widths must be at least 1, got \(\)"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"epochs": 0.0}, "epochs must be positive, got 0"),
        ({"clip": -1.0}, "clip must be positive, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(Equilibrium.preset(), **options)


@pytest.mark.parametrize("hidden", [(16, 16), ()])
def test_a_recurrent_network_has_one_hidden_layer(hidden):
    with pytest.raises(ConfigurationError, match="hidden"):
        replace(Equilibrium.preset(setting="recurrent"), hidden=hidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("magic",)}, "methods must be of .*got 'magic'"),
        ({"only": ("hopfield",), "methods": ("kolen-pollack",)}, "none of the methods kolen"),
        ({"only": ()}, "only must hold different values"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(ConfigurationError, match=message):
        EquilibriumTable(**options)
