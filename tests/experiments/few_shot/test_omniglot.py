"""Few-shot learning of images: the paper's settings, the files of a run, and the user's classes."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.errors import ConfigurationError, DataError, RunError
from equigrad.experiments.few_shot import omniglot as experiment
from equigrad.experiments.few_shot.meta_training import MetaTrainer, meta_train
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS
from equigrad.experiments.few_shot.omniglot import Omniglot
from equigrad.experiments.few_shot.table2 import COLUMNS, QUOTED, FewShotResult, Table2
from equigrad.experiments.runs.reproduction import from_csv, reproduce
from equigrad.nn import ComplexSynapse, Modulation
from equigrad.tasks import ClassCollection, split_classes
from equigrad.tasks.learner import Statistics
from equigrad.training.few_shot import accuracy
from helpers import call_main

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def strokes(monkeypatch):
    """Classes that are easy to tell apart: a bright line at a place of its own, and some noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.1 * torch.rand(30, 20, 1, 28, 28, generator=generator)
    for c in range(30):
        turned = pixels[c] if c % 2 else pixels[c].transpose(-1, -2)
        turned[..., 2 * (c // 2) : 2 * (c // 2) + 2, :] += 0.9
    collection = ClassCollection(pixels, tuple(f"line {c}" for c in range(30)))
    split = split_classes(collection, train=15, validation=7, test=8)
    monkeypatch.setattr(experiment, "omniglot", lambda *name, **knobs: split)
    return split


def smoke(**changes) -> Omniglot:
    return replace(Omniglot.preset(scale="smoke"), threads=1, **changes)


@pytest.mark.parametrize("setting", ["5way1shot", "20way1shot"])
@pytest.mark.parametrize("method", ["least-control-modulation", "least-control-synaptic"])
def test_least_control_learns_from_characters(strokes, method, setting, tmp_path, capsys):
    """A short run by the command line; two steps under a controller that inverts."""
    config = Omniglot.preset(scale="smoke", method=method, setting=setting)
    rule = config.learner(config.network()).estimator
    assert isinstance(rule, eg.LeastControl)
    assert isinstance(rule.controller, eg.DynamicInversion)
    assert rule.controller.solver == replace(config.solver, max_steps=2)
    assert config.way == int(setting.removesuffix("way1shot"))
    words = ["--scale", "smoke", "--method", method, "--way", 5, "--threads", 1]
    words += ["--setting", setting, "--out", tmp_path / "run"]
    words += ["--estimator.controller.proportional", 0.2]
    code, said = call_main("run", "omniglot", *words, capsys=capsys)
    assert code == 0, said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["estimator"], result["method"]) == ("LeastControl", method)
    learner, meta_params = Omniglot.load_learner(tmp_path / "run")
    loaded = learner.estimator
    assert isinstance(loaded, eg.LeastControl)
    assert loaded.controller.strength == 0.2
    assert all(m.isfinite().all() for m in meta_params.values())


@pytest.mark.parametrize("setting", COLUMNS)
@pytest.mark.parametrize(
    ("method", "nudged_steps"), [("contrastive-synaptic", 100), ("contrastive-modulation", 50)]
)
def test_scale_paper_is_what_the_methods_section_says(method, nudged_steps, setting):
    """Methods, "Few-shot learning experiments"."""
    config = Omniglot.preset(scale="paper", method=method, setting=setting)
    assert config.solver == eg.GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=200)
    rule = config.estimator
    assert isinstance(rule, eg.Contrastive)
    assert (rule.beta, rule.scheme, rule.nodes) == (0.1, "symmetric", (1, -1))
    assert (rule.nudge, rule.momentum, rule.matched) == ("loss", "keep", False)
    learner = config.learner(config.network())
    assert isinstance(learner.estimator, eg.Contrastive)
    assert learner.estimator.nudged_solver == replace(config.solver, max_steps=nudged_steps)
    assert (config.outer_lr, config.outer_steps, config.queries) == (1e-3, 3750, 15)
    assert config.tasks == (32 if setting.startswith("5way") else 16)
    assert f"{config.way}way{config.shot}shot" == setting
    assert (config.held_out, config.split, config.rotations) == (0, "background-evaluation", True)
    assert config.statistics == "query"  # transductive
    pooled = [type(m).__name__ for m in config.network().modules()].count("MaxPool2d")
    assert (config.filters, pooled) == (64, 4)
    if method == "contrastive-synaptic":
        assert isinstance(learner.model, ComplexSynapse)
        strengths = learner.model.strengths(learner.model.meta_params())
        assert {round(s.unique().item(), 6) for s in strengths.values()} == {0.1}
        assert learner.model.learn == ("center",)
    else:
        assert isinstance(learner.model, Modulation)
        assert learner.model.regularizer is None
    assert config.notes() == ()


def test_what_is_scaled_down_is_said():
    (timed,) = replace(Omniglot.preset(), minutes=2.5).notes()
    assert "2.5 minutes (3,750 meta-steps)" in timed
    assert "outer_steps" not in timed
    (reptile,) = Omniglot.preset(method="reptile").notes()
    assert "nudged" not in reptile  # it has no nudged phases
    (said,) = Omniglot.preset().notes()
    for part in ("filters 32 (64)", "solver.max_steps 5 (200)", "tasks 16 (32)", "queries 5 (15)"):
        assert part in said
    assert "seed" not in said


@pytest.mark.usefixtures("strokes")
@pytest.mark.parametrize("method", FEW_SHOT_METHODS)
def test_every_method_learns_images(method):
    config = replace(Omniglot.preset(scale="smoke", method=method), threads=1)
    job = MetaTrainer(config)
    start = job.learner.model.meta_params()
    state = job.learn()
    moved = {n for n, m in state.meta_params.items() if not m.equal(start[n])}
    assert bool(moved) == (method != "scratch")


def test_a_run_learns_says_and_saves(strokes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "omniglot", "--scale", "smoke", "--outer-steps", "20", "--filters", "8"]
    words += ["--validate-every", "10", "--device", "cpu", "--threads", "1"]
    code, said = call_main(*words, "--out", "one", capsys=capsys)
    assert code == 0, said
    assert strokes.note in said
    assert "scale smoke, other than the paper's" in said
    assert "98.05 ± 0.06" in said  # the paper's, beside
    names = {path.name for path in Path("one").iterdir()}
    assert {"model.pt", "result.json", "learning.png", "tasks.png", "metrics.jsonl"} <= names
    metrics = json.loads(Path("one/result.json").read_text())["metrics"]
    learner, meta_params = Omniglot.load_learner("one")
    config = smoke(outer_steps=20, filters=8)
    batch = MetaTrainer(config).tasks.test.sample(6, 0)
    params = learner.settle(meta_params, batch)
    for kind in get_args(Statistics):
        name = "test" if kind == "query" else "test_support_statistics"
        outputs = learner.predict(params, meta_params, batch, statistics=kind)
        again = accuracy(outputs, batch.query[1]).mean().item()
        assert again == pytest.approx(metrics[f"{name}_accuracy"], abs=0.5)
    assert metrics["test_accuracy"] > 50  # of five classes, 20 by chance
    code, said = call_main("report", "one", capsys=capsys)
    assert code == 0
    page = Path("one/report.html").read_text()
    assert "validation accuracy, %" in page
    assert "paper 98.05" in page


@pytest.mark.usefixtures("strokes")
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"way": 20}, ConfigurationError, "a 20-way task needs 20 classes, but there are 7"),
        ({"shot": 10}, DataError, "10 shots and 15 queries need 25 examples"),
        ({"way": 1}, ConfigurationError, "way must be a whole number of at least 2, got 1"),
        ({"filters": 0}, ConfigurationError, "filters must be a whole number of at least 1, got 0"),
        ({"side": 8, "pooling": True}, ConfigurationError, "at least 16 with pooling, got 8"),
        ({"images": Path("nowhere")}, DataError, "nowhere is no folder of images"),
    ],
)
def test_tasks_that_cannot_be(changes, kind, message):
    with pytest.raises(kind, match=message):
        MetaTrainer(smoke(**changes))


def test_words_that_name_nothing(capsys, tmp_path):
    for option, word in (("--setting", "3way"), ("--method", "anil"), ("--scale", "huge")):
        code, said = call_main("run", "omniglot", option, word, "--out", tmp_path, capsys=capsys)
        assert code == 2
        assert word in said


@pytest.fixture
def own_images(tmp_path) -> Path:
    """Dark bars at a height of their own on paper, a folder a class, in several sizes."""
    folder = tmp_path / "images"
    for c in range(12):
        (folder / f"bar {c:02}").mkdir(parents=True)
        for i in range(6):
            image = Image.new("L", (40 + i, 40 + i), 250 - i)
            image.paste(10 * i, (0, 3 * c, 40 + i, 3 * c + 4))
            image.save(folder / f"bar {c:02}" / f"{i}.png")
    return folder


def test_own_images_are_learned_from_and_adapted_to(own_images, tmp_path):
    config = smoke(
        images=own_images, way=2, queries=3, test_queries=4, outer_steps=15, filters=8, tasks=4
    )
    metrics = meta_train(config, tmp_path / "run", resume=False, console=Console(quiet=True))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "8 classes for meta-training, 2 for validation, 2 for the meta-test" in result["tasks"]
    assert result["paper"] is None
    assert metrics["test_accuracy"] > 60

    spec = importlib.util.spec_from_file_location("own", EXAMPLES / "adapt_to_your_images.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    known, asked = tmp_path / "known", tmp_path / "asked"
    for name in ("bar 00", "bar 11"):
        (known / name).mkdir(parents=True)
        (asked / name).mkdir(parents=True)
        for i in range(6):
            where = known if i < 2 else asked
            shutil.copy(own_images / name / f"{i}.png", where / name / f"{i}.png")
    answers = example.adapt(tmp_path / "run", known, asked)
    assert len(answers) == 8
    hits = sum(answer == path.parent.name for path, answer in answers.items())
    assert hits >= 6  # 4 by chance
    with pytest.raises(DataError, match=r"12 classes, and .* has learned to tell 2 apart"):
        example.adapt(tmp_path / "run", own_images, asked)


def test_a_run_does_not_go_on_with_other_images(own_images, tmp_path):
    config = smoke(images=own_images, way=2, queries=3, test_queries=4)
    meta_train(config, tmp_path / "run", resume=False, console=Console(quiet=True))
    (tmp_path / "run" / "result.json").unlink()
    Image.new("L", (40, 40), 128).save(own_images / "bar 03" / "2.png")
    with pytest.raises(RunError, match="the data have changed since the run"):
        meta_train(config, tmp_path / "run", resume=True, console=Console(quiet=True))


def test_a_part_with_too_few_classes_is_named(own_images):
    config = smoke(images=own_images, way=3, queries=3, test_queries=4)
    with pytest.raises(ConfigurationError, match=r"needs 3 classes, .*2 are for validation"):
        MetaTrainer(config)


def test_smoothed_labels_judge_queries_and_teach_no_task(strokes):
    """Of 5 classes, a label that is smoothed by s has a share of s/5 of every class."""
    trainer = MetaTrainer(smoke(label_smoothing=0.3))
    theta = trainer.learner.model.meta_params()
    batch = trainer.tasks.train.sample(2, 0)
    found = trainer.learner.meta_gradient(theta, batch)
    plain = MetaTrainer(smoke()).learner.meta_gradient(theta, batch)
    assert all(torch.equal(p, found.params[n]) for n, p in plain.params.items())
    said = trainer.learner.predict(found.params, theta, batch).log_softmax(-1)
    sharp = -said.gather(-1, batch.query[1][..., None]).mean()
    expected = 0.7 * sharp - 0.3 * said.mean()
    assert found.outer_loss == pytest.approx(expected.item(), rel=1e-4)
    assert plain.outer_loss == pytest.approx(sharp.item(), rel=1e-4)
    with pytest.raises(ConfigurationError, match=r"label_smoothing must be .*in \[0, 1\), got 1"):
        smoke(label_smoothing=1.0)


def test_weight_decay_shrinks_what_tasks_share_by_its_share_of_a_step(strokes):
    """θ ← (1 - η w) θ before Adam's own step, which does not see it (AdamW)."""
    start = MetaTrainer(smoke()).learner.model.meta_params()
    plain, decayed = (
        MetaTrainer(smoke(weight_decay=w, outer_lr=0.1, outer_steps=1)).learn().meta_params
        for w in (0.0, 0.5)
    )
    for name, there in plain.items():
        torch.testing.assert_close(decayed[name], there - 0.1 * 0.5 * start[name])


@pytest.mark.parametrize("method", ["contrastive-modulation", "contrastive-synaptic", "maml"])
def test_in_bf16_products_are_lowered_and_nothing_else(strokes, method):
    """Of all that is returned or judged only the rounding of products, 2⁻⁹ each, is seen."""
    config = replace(Omniglot.preset(scale="smoke", method=method), threads=1, precision="bf16")
    trainer = MetaTrainer(config)
    seen = set()

    def loss(outputs, targets):
        seen.add(outputs.dtype)
        return cross_entropy(outputs, targets)

    theta = trainer.learner.model.meta_params()
    batch = trainer.tasks.train.sample(4, 0)
    learner = replace(trainer.learner, loss=loss)
    start = learner.start(theta, 4)
    plain = learner.predict(start, theta, batch)
    with trainer.precision():
        lowered = learner.predict(start, theta, batch)
        result = learner.meta_gradient(theta, batch)
    assert seen == {torch.float32}
    assert {t.dtype for r in (result.grads, result.params) for t in r.values()} == seen
    assert lowered.dtype == torch.bfloat16
    off = (lowered - plain).norm() / plain.norm()
    assert 2**-11 < off < 2**-5  # five layers
    for tensors in (result.params, result.grads):
        assert not any(torch.equal(t, t.bfloat16().float()) for t in tensors.values() if t.any())


def test_a_run_has_its_precision_and_does_not_go_on_in_another(strokes, tmp_path, monkeypatch):
    lowered = []
    judge = MetaTrainer.judge
    monkeypatch.setattr(
        MetaTrainer,
        "judge",
        lambda *a: lowered.append(torch.is_autocast_enabled("cpu")) or judge(*a),
    )
    config, quiet = smoke(precision="bf16"), Console(quiet=True)
    meta_train(config, tmp_path / "run", resume=False, console=quiet)
    assert set(lowered) == {True}
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RunError, match=r"precision: there 'bf16', here 'float32'"):
        meta_train(smoke(), tmp_path / "run", resume=True, console=quiet)


@pytest.mark.usefixtures("strokes")
def test_a_precision_that_does_nothing_is_named():
    if not torch.cuda.is_available():
        assert "tf32 does nothing on a cpu" in MetaTrainer(smoke(precision="tf32")).notes()[-1]
    assert "precision bf16 (float32)" in MetaTrainer(smoke(precision="bf16")).notes()[0]
    with pytest.raises(ConfigurationError, match=r"precision 'bf16' .* dtype is 'float64'"):
        smoke(precision="bf16", dtype="float64")


def test_all_cells_of_table_2_have_its_precision():
    table = replace(Table2.preset(scale="smoke"), precision="bf16")
    assert {table.experiment(*cell).precision for cell in table.cells()} == {"bf16"}


@pytest.mark.usefixtures("strokes")
def test_table_2_keeps_what_was_measured_and_what_is_quoted_apart(tmp_path, monkeypatch):
    table = Table2.preset(scale="smoke")
    methods = ("contrastive-modulation", "reptile")
    table = replace(table, methods=methods, seeds=2, threads=1)
    began: list[str] = []
    learned = MetaTrainer.learned

    def once(job, directory, **options):
        began.append(directory.path.name)
        if len(began) == 3:
            raise KeyboardInterrupt
        return learned(job, directory, **options)

    monkeypatch.setattr(MetaTrainer, "learned", once)
    monkeypatch.setattr(Omniglot, "draw", lambda *_: None)  # a second a cell
    with pytest.raises(KeyboardInterrupt):
        reproduce(table, tmp_path, resume=False, console=Console(quiet=True))
    rows = reproduce(table, tmp_path, resume=True, console=Console(quiet=True))
    cells = [
        f"background-evaluation-5way1shot-{m}-{seed}" for seed in (0, 1) for m in table.methods
    ]
    assert began == [cells[0], cells[1], cells[2], cells[2], cells[3]]
    assert rows == from_csv(FewShotResult, (tmp_path / "table2.csv").read_text())
    measured, quoted = (tmp_path / "table2.md").read_text().split("Quoted by the paper")
    mean = sum(row.test for row in rows if row.method == "reptile") / 2
    (line,) = (line for line in measured.splitlines() if "| 5way1shot | Reptile" in line)
    assert f"| {mean:.2f} ± " in line
    assert "98.05 ± 0.06" in measured
    for name, numbers in QUOTED.items():
        assert name in quoted
        assert f"{numbers[0][0]:g} ± {numbers[0][1]:g}" in quoted
        assert f"{numbers[0][0]:g} ±" not in measured


def test_table_2_nudges_by_force_at_scale_paper_and_says_so():
    table = Table2.preset(scale="paper")
    assert len(table.places()) == 48
    config = table.experiment("1100-100-423", "20way5shot", "contrastive-synaptic", 0)
    assert (config.split, config.setting) == ("1100-100-423", "20way5shot")
    (note,) = config.notes()
    assert "estimator.nudge force (loss)" in note
    assert config.published() is None  # the paper's characters are others
    published = replace(table, nudge="loss", splits=("background-evaluation",))
    first = published.experiment(*published.cells()[0])
    assert first.notes() == ()
    assert first.published() == {
        "test_accuracy": 98.05,
        "test_accuracy_standard_deviation": 0.06,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("maml", "maml")}, "methods must be .*at least one and none twice, got"),
        ({"only": ()}, "only must be .*at least one and none twice, got"),
        ({"splits": ()}, "splits must be .*at least one and none twice, got"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"minutes": -1.0}, "minutes must be a finite number above 0, or None, got -1"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Table2(**options)
