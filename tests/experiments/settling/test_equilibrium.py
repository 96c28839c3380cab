"""Networks that settle on made-up images: every method learns, resumes, and says what it cannot."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from equigrad.errors import ConfigurationError, SettlingWarning
from equigrad.estimators import GMRES
from equigrad.experiments.runs.model import Model, load_model
from equigrad.experiments.runs.reproduction import from_csv
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.settling.equilibrium import Equilibrium, ImageTrainer
from equigrad.experiments.settling.equilibrium_table import EquilibriumTable, NetworkResult
from equigrad.experiments.settling.image_networks import IMAGE_NETWORKS
from equigrad.solvers import Anderson
from equigrad.training.relaxation import classify, settled_logits
from helpers import call_main

pytestmark = pytest.mark.usefixtures("made_up_images")

PLACES = [
    (setting, method) for setting, known in IMAGE_NETWORKS.items() for method in known.methods
]


@pytest.mark.parametrize(("setting", "method"), PLACES)
def test_every_method_lowers_the_loss_it_descends(setting, method):
    """A few epochs on 50 made-up images, whose classes are easy to tell apart."""
    preset = Equilibrium.preset(setting=setting, method=method, scale="smoke")
    config = replace(
        preset, samples=150, held_out=100, batch=10, epochs=10, outer_lr=3e-3, threads=1
    )
    if IMAGE_NETWORKS[setting].source.name == "CIFAR-10":  # larger, and learned in fewer steps
        config = replace(config, epochs=6, hidden=tuple(8 for _ in config.hidden))
    history = ImageTrainer(config).learn().history
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
    options = ("--only", "recurrent", "cifar-implicit", "--methods", "exact")
    code, said = call_main(*words, tmp_path / "table", *options, capsys=capsys)
    assert code == 0, said
    assert "equilibrium RNN" in said
    rows = from_csv(NetworkResult, (tmp_path / "table" / "equilibrium.csv").read_text())
    assert [(row.setting, row.method) for row in rows] == [
        ("recurrent", "exact"),
        ("cifar-implicit", "exact"),
    ]
    table = (tmp_path / "table" / "equilibrium.md").read_text()
    assert "| convolutional implicit network | CIFAR-10 | recurrent backpropagation |" in table
    assert (tmp_path / "table" / "equilibrium.png").exists()


@pytest.mark.parametrize("setting", ["hopfield", "cifar-implicit"])
def test_what_a_run_has_left_is_asked_about_files(setting, tmp_path, capsys):
    """The images of the test as files, in another size too: the accuracy is that of the run."""
    words = ("--setting", setting, "--scale", "smoke", "--threads", "1", "--out")
    code, said = call_main("run", "equilibrium", *words, tmp_path / "run", capsys=capsys)
    assert code == 0, said
    files = IMAGE_NETWORKS[setting].source.files
    test = files.load(files.TEST)
    mode = "RGB" if files.SHAPE[0] == 3 else "L"
    for i in range(100):
        side = tuple(files.SHAPE[1:])
        image = Image.frombytes(mode, side, test.pixels[i].permute(1, 2, 0).numpy().tobytes())
        folder = tmp_path / "images" / files.CLASSES[test.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    out = tmp_path / "answers.csv"
    asked = ("predict", tmp_path / "run", "--images", tmp_path / "images", "--out", out)
    code, said = call_main(*asked, capsys=capsys)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0, said
    assert f"accuracy {result['metrics']['test_accuracy']:.4g} % on 100 with a known" in said
    assert out.read_text().startswith(f"file,prediction,p({files.CLASSES[0]}),")


def test_a_run_does_not_go_on_with_other_images(tmp_path, capsys):
    """Where more of CIFAR-10's files have come, for example: split and order would change."""
    words = ("run", "equilibrium", "--scale", "smoke", "--threads", "1", "--out", tmp_path / "run")
    code, said = call_main(*words, capsys=capsys)
    assert code == 0, said
    (tmp_path / "run" / "data.json").write_text('{"sha256": "of other images"}')
    code, said = call_main(*words, "--resume", capsys=capsys)
    assert code == 2
    assert "the data have changed since the run" in said


def test_a_saved_network_is_loaded_as_it_was(tmp_path):
    config = Equilibrium.preset(setting="recurrent", scale="smoke")
    job = ImageTrainer(replace(config, threads=1, epochs=0.5))
    quiet = Console(quiet=True)
    directory = RunDirectory(tmp_path / "run", job.config)
    job.learned(directory, resume=False, console=quiet)
    model = load_model(tmp_path / "run")
    x, _ = job.data.validation
    expected, _ = settled_logits(job.network, x, solver=job.config.solver)
    assert torch.equal(model.outputs(x), expected)
    assert model.solver == job.config.solver
    network = model.network()
    found = classify(network, x, solver=job.config.solver)
    assert torch.equal(found, expected.argmax(1))
    hurried = replace(model, solver=Anderson(tol=1e-9, max_steps=2))
    with pytest.warns(SettlingWarning, match=r"not converged for 100 samples \(0, .*of 100"):
        hurried.outputs(x)


def test_predictions_say_for_which_files_nothing_settled(tmp_path, capsys):
    job = ImageTrainer(replace(Equilibrium.preset(setting="recurrent", scale="smoke"), threads=1))
    never = Anderson(tol=1e-12, max_steps=1)
    weights = dict(job.network.named_parameters())
    architecture, data = job.config.architecture(), job.data
    model = Model(architecture, weights, data.target, data.encoding, never)
    model.save(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "black.png")
    code, said = call_main("predict", tmp_path, "--images", tmp_path / "images", capsys=capsys)
    assert code == 0, said
    assert "has not converged, so the prediction may be wrong" in said
    assert ",settled " in said
    assert ",no " in said
    assert "black.png" in said
    code, said = call_main("predict", tmp_path, "--csv", tmp_path / "no.csv", capsys=capsys)
    assert code == 2
    assert "was trained on images; use it with --images DIR" in said


def test_linear_feedback_has_weights_for_every_hidden_layer_and_they_learn():
    preset = Equilibrium.preset(setting="feed-forward", method="linear-feedback", scale="smoke")
    job = ImageTrainer(replace(preset, hidden=(16, 12, 8), threads=1))
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
        ({"setting": "spiking"}, "setting must be 'feed-forward', .*got 'spiking'"),
        ({"setting": "hopfield", "method": "kolen-pollack"}, "'hopfield' must be 'equil"),
    ],
)
def test_words_that_choose_nothing(chosen, message):
    with pytest.raises(ConfigurationError, match=message):
        Equilibrium.preset(**chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": GMRES()}, "method 'exact' needs the estimator Adjoint, got GMRES"),
        ({"hidden": ()}, r"hidden must be .* at least one, got \(\)"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"scale": "tiny"}, "scale must be 'smoke', 'small' or 'paper', got 'tiny'"),
        ({"device": "tpu"}, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ({"setting": "spiking"}, "setting must be 'feed-forward', .*got 'spiking'"),
        ({"epochs": 0.0}, "epochs must be a finite number above 0, got 0"),
        ({"clip": -1.0}, "clip must be a finite number above 0, or None, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0, got -1"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(Equilibrium.preset(), **options)


@pytest.mark.parametrize(
    ("setting", "hidden", "message"),
    [
        ("recurrent", (16, 16), r"a single hidden layer, got hidden widths \(16, 16\)"),
        ("recurrent", (), "hidden must be .* at least one, got"),
        ("cifar-implicit", (16, 16), "a single hidden layer"),
        ("cifar-implicit", (20,), "channels must be a multiple of the 8 groups.*got 20"),
        ("cifar-hopfield", (4,) * 6, "image of 32 x 32 is too small for 6 hidden layers"),
    ],
)
def test_widths_that_make_no_network(setting, hidden, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(Equilibrium.preset(setting=setting), hidden=hidden)


def test_images_held_out_are_those_of_the_data_set():
    assert Equilibrium.preset().held_out == 10_000
    config = Equilibrium.preset(setting="cifar-hopfield")
    assert (config.held_out, config.batch) == (1000, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("magic",)}, r"methods must be .*got \('magic',\)"),
        ({"only": ("hopfield",), "methods": ("kolen-pollack",)}, "none of the methods kolen"),
        ({"only": ()}, "only must be .*at least one and none twice, got"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(ConfigurationError, match=message):
        EquilibriumTable(**options)


def test_a_part_of_the_table_says_what_was_not_run():
    table = EquilibriumTable(scale="smoke", only=("hopfield",), seeds=3)
    setting, method, _ = table.cells()[0]
    rows = [NetworkResult(setting, method, s, 90.0, 80.0 + 2 * s, 1, 7, 60.0) for s in (0, 1)]
    there, missing, *_ = table.text(rows).splitlines()[2:]
    assert "| 90.00 ± 0.00 | 81.00 ± 1.00 | 2 of 3 | 1 | 7 | 1.0 |" in there
    assert "| not run | not run | 0 of 3 |" in missing
