"""A picture as a network: both methods learn it, a run resumes, and is painted at any size."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import equigrad as eg
from equigrad.errors import ConfigurationError, RunError
from equigrad.experiments.data.picture import psnr
from equigrad.experiments.settling.representation import (
    PICTURE_METHODS,
    Painter,
    PictureTrainer,
    Representation,
)
from equigrad.solvers import Anderson
from helpers import call_main

SMOKE = ("run", "representation", "--scale", "smoke", "--threads", "1")


def small(method="exact", **changes):
    """A picture of 24 x 24 pixels, and a network that can learn it in seconds."""
    preset = Representation.preset(method=method, scale="smoke")
    changes = {"side": 24, "hidden": 32, "features": 32, "epochs": 15, "outer_lr": 0.01, **changes}
    return replace(preset, frequency=2.0, threads=1, **changes)


@pytest.mark.parametrize("method", list(PICTURE_METHODS))
def test_pixels_that_were_not_learned_are_found_better_than_by_their_neighbours(method):
    job = PictureTrainer(small(method))
    history = job.learn().history
    assert job.measured("test")["test_psnr"] > job.nearest() + 0.5
    settled = [str(row["status"]).startswith("converged") for row in history]
    assert all(settled)


def test_the_gradient_under_control_is_nearly_the_exact_one():
    """After the network has learned for a while; by the cosine, for each of the weights."""
    job = PictureTrainer(small("exact", epochs=20))
    job.learn()
    rows = job.parts["training"][:64]
    inputs = job.painter.encode(job.places[rows])
    network = job.painter.network
    problem = network.problem(inputs, job.colors[rows])

    def gradient(estimator, solver):
        meta_params = dict(network.named_parameters())
        return eg.meta_gradient(
            problem, network.start(inputs), meta_params, solver=solver, estimator=estimator
        )

    tight = Anderson(tol=1e-5, max_steps=200)
    exact = gradient(eg.Adjoint(solver=tight), tight)
    under = gradient(PICTURE_METHODS["dynamic-inversion"][1], tight)
    assert under.status.startswith("converged")
    for name, g in exact.grads.items():
        cosine = torch.cosine_similarity(g.flatten(), under.grads[name].flatten(), dim=0)
        assert cosine > 0.95, name


def test_a_run_leaves_what_it_reached_and_resumes_to_it(tmp_path, capsys):
    out = tmp_path / "run"
    code, said = call_main(*SMOKE, "--out", out, capsys=capsys)
    assert code == 0, said
    assert "64 for training, 50 for validation, 142 for test" in said
    for folder in (out, out / "dynamic-inversion"):
        for name in ("model.pt", "learning.png", "picture.png", "metrics.jsonl", "result.json"):
            assert (folder / name).exists()
    assert (out / "comparison.png").exists()
    result = json.loads((out / "result.json").read_text())
    assert list(result["metrics"]) == ["training_psnr", "validation_psnr", "test_psnr"]
    assert (result["epochs"], result["outer_steps"], result["pixels_unsettled"]) == (2, 4, 0)
    table = json.loads((out / "table.json").read_text())
    assert table["exact"] == result["metrics"]
    (out / "result.json").unlink()
    code, said = call_main(*SMOKE, "--out", out, "--resume", capsys=capsys)
    assert code == 0, said
    assert json.loads((out / "result.json").read_text())["metrics"] == result["metrics"]


def test_a_picture_of_ones_own_is_painted_at_any_size(tmp_path, capsys):
    """All of its pixels are learned; a picture of one colour has it at every resolution."""
    Image.new("RGB", (40, 30), (51, 102, 204)).save(tmp_path / "mine.jpg")
    options = ("--image", tmp_path / "mine.jpg", "--stride", 1, "--epochs", 25, "--no-compare")
    out = tmp_path / "run"
    code, said = call_main(*SMOKE, *options, "--outer-lr", 0.01, "--out", out, capsys=capsys)
    assert code == 0, said
    assert "mine.jpg, 16 x 16 pixels: 256 for training" in said
    assert not (out / "comparison.png").exists()
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert list(metrics) == ["training_psnr"]
    painter = Painter.load(out)
    true = Image.open(tmp_path / "mine.jpg").getpixel((20, 15))
    color = torch.tensor(true) / 255
    assert psnr(painter.paint(16), color.expand(16, 16, 3)) == pytest.approx(
        metrics["training_psnr"], abs=1e-3
    )
    assert psnr(painter.paint(33), color.expand(33, 33, 3)) > 25
    Image.new("RGB", (40, 30), (0, 102, 204)).save(tmp_path / "mine.jpg")
    code, said = call_main(
        *SMOKE, *options, "--outer-lr", 0.01, "--out", out, "--resume", capsys=capsys
    )
    assert (code, "the data have changed since the run" in said) == (2, True)


def test_the_simplest_guess():
    """Stripes about columns 0, 3 and 6, which are learned: the nearest such pixel is right."""
    job = PictureTrainer(small(side=9, stride=3, held_out=10, batch=9))
    columns = ((torch.arange(9) + 1) // 3).clamp(max=2) / 3
    job.picture = replace(job.picture, colors=columns[None, :, None].expand(9, 9, 3).clone())
    assert job.nearest() == pytest.approx(100)


def test_pixels_that_have_not_settled_are_counted(tmp_path, capsys):
    options = ("--no-compare", "--epochs", 1, "--solver.max-steps", 2, "--solver.tol", 1e-9)
    code, said = call_main(*SMOKE, *options, "--out", tmp_path / "run", capsys=capsys)
    assert code == 0, said
    assert "has not settled for 256 of 256 pixels within 2 steps" in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["pixels_unsettled"] == 256


def test_what_was_saved_is_mistrusted(tmp_path):
    with pytest.raises(RunError, match=r"there is no .*: a run saves it at its end"):
        Painter.load(tmp_path)
    torch.save({"format": "another"}, tmp_path / "model.pt")
    with pytest.raises(RunError, match="is 'another', expected 'equigrad representation 1'"):
        Painter.load(tmp_path)


def test_a_method_that_is_not_there():
    with pytest.raises(ConfigurationError, match=r"method must be 'exact' .*got 'magic'"):
        Representation.preset(method="magic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": eg.GMRES()}, "method 'exact' needs the estimator Adjoint, got GMRES"),
        ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
        ({"held_out": 192}, "must leave some of the 192 pixels .* got 192; lower it"),
        ({"epochs": 0.0}, "epochs must be a finite number above 0, got 0"),
        ({"clip": -1.0}, "clip must be a finite number above 0, or None, got -1"),
        ({"frequency": -1.0}, "frequency must be a finite number above 0, got -1"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(Representation.preset(scale="smoke"), **options)
