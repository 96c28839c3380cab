"""Scores of training examples: right, or named as not to be trusted."""

import csv
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.cli import main
from equigrad.training.example_weights import labelled_loss
from equigrad.training.learned_weights import learn_weights, verdict
from equigrad.training.scores import example_scores, spearman
from equigrad.training.trainer import trainer_settings

N = 24


def regression(seed=0):
    """Rows of a line, of which the first six have the wrong sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    y[:6] *= -1
    return list(zip(x, y, strict=True))


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(1)


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


SOLVER = eg.TorchOptimizer(optimizer=torch.optim.SGD, options={"lr": 0.1}, max_steps=200)
TRAIN, VALID = regression(), regression(1)[6:]


def scores(**changed):
    given: Any = {"model": linear(), "train": TRAIN, "valid": VALID, "loss": squares} | changed
    return example_scores(**({"solver": SOLVER, "batch_size": N} | given))


def test_scores_are_derivatives_by_implicit_differentiation():
    """`-dL/dw_i = ∂L_out/∂φᵀ H⁻¹ ∂l_i/∂φ / n` at the minimum of a quadratic."""
    found = scores(estimator=eg.Contrastive(beta=0.01), nudged_steps=200, runs=1, valid=VALID[:N])
    x, v = (
        torch.cat([torch.stack([r[0] for r in d]), torch.ones(len(d), 1)], 1)
        for d in (TRAIN, VALID)
    )
    y, w = (torch.stack([r[1] for r in d]).squeeze(1) for d in (TRAIN, VALID))
    phi = torch.linalg.solve(x.T @ x, x.T @ y)
    outer = 2 * v.T @ (v @ phi - w) / len(w)
    each = 2 * (x @ phi - y)[:, None] * x / N
    exact = each @ torch.linalg.solve(2 * x.T @ x / N, outer)
    torch.testing.assert_close(found.scores.double(), exact, rtol=1e-3, atol=1e-5)
    assert math.isnan(found.agreement)
    assert "take runs=2" in found.status


@pytest.mark.parametrize("products", ["autograd", "contrast"])
def test_scores_of_the_optimisers_own_steps(products):
    """At the minimum the gradient through the steps is that of implicit differentiation."""
    nudged = scores(estimator=eg.Contrastive(beta=0.01), nudged_steps=200, runs=1)
    found = scores(estimator=eg.Unrolled(products=products))
    torch.testing.assert_close(found.scores, nudged.scores, rtol=1e-3, atol=1e-5)
    assert math.isnan(found.steadiness)
    assert found.trusted
    assert found.status.startswith("runs agree on the ranks by 1.00;")


def test_scores_that_depend_on_the_nudge_are_not_trusted():
    """A strong nudge leaves one of many minima, and a tenth of it does not."""

    def ripples(model, batch):
        off = (model(batch[0]) - batch[1]).mean(1)
        return (3 * off).sin().square() + off.square() / 10

    gentle, strong = (
        scores(
            loss=ripples,
            solver=dataclasses.replace(SOLVER, options={"lr": 0.02}, max_steps=300),
            estimator=eg.Contrastive(beta=beta),
        )
        for beta in (0.1, 3.0)
    )
    assert gentle.linearity > 0.99
    assert gentle.trusted
    assert strong.linearity < 0.5
    assert strong.steadiness > 0.8  # which alone would have passed
    assert not strong.trusted
    assert "the ranks change with beta" in strong.status


def test_wrong_examples_rank_first_and_runs_agree():
    found = scores(batch_size=8)
    assert set(found.ranking()[:4]) <= set(range(6))
    assert found.trusted
    assert found.status.startswith("runs agree on the ranks")
    assert found.agreement > 0.8


def test_sources():
    found = scores(sources=["bad"] * 6 + ["good"] * 9 + ["fine"] * 9)
    assert found.names == ("bad", "good", "fine")
    assert found.ranking()[0] == 0
    alone = scores(estimator=eg.Contrastive(beta=0.01), nudged_steps=200, runs=1)
    together = scores(
        sources=["a"] * 6 + ["b"] * 18,
        estimator=eg.Contrastive(beta=0.01),
        nudged_steps=200,
        runs=1,
    )
    torch.testing.assert_close(together.scores[0], alone.scores[:6].sum())


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"train": []}, eg.DataError, "train has no examples"),
        ({"valid": iter([])}, eg.DataError, "valid must have a length"),
        ({"sources": ["a"]}, eg.DataError, "sources name 1 examples, and train has 24"),
        ({"loss": lambda m, b: squares(m, b).mean()}, eg.DataError, "one number for each of 24"),
        ({"loss": None}, eg.DataError, "no 'labels'"),
        ({"runs": 0}, eg.ConfigurationError, "runs must be"),
        ({"nudged_steps": 1}, eg.ConfigurationError, "nudged_steps must be at least 2"),
        ({"model": "gpt2"}, eg.ConfigurationError, "model must be"),
        (
            {"estimator": eg.Contrastive(nudged_solver=SOLVER), "nudged_steps": 3},
            eg.ConfigurationError,
            "leave nudged_steps out",
        ),
        (
            {"estimator": eg.Unrolled(), "nudged_steps": 3},
            eg.ConfigurationError,
            "the estimator is Unrolled",
        ),
        ({"estimator": "unrolled"}, eg.ConfigurationError, "estimator must be"),
    ],
)
def test_bad_input(wrong, error, words):
    with pytest.raises(error, match=words):
        scores(**wrong)


def test_the_model_is_untouched():
    model = linear()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    scores(model=model, runs=1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_losses_of_words_leave_out_what_has_no_label():
    class Out:
        def __init__(self, logits):
            self.logits = logits

    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
    found = labelled_loss(lambda **inputs: Out(logits), {"labels": labels})
    expected = [
        cross_entropy(logits[0, :3], labels[0, 1:]),
        cross_entropy(logits[1, :1], labels[1, 1:2]),
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_ranks_agree_whatever_the_scale():
    one = torch.tensor([3.0, -1.0, 2.0, 10.0])
    assert spearman(one, one.exp()) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)


def test_runs_that_are_done_are_kept(tmp_path):
    said = []
    first = scores(folder=tmp_path, runs=1)
    again = scores(folder=tmp_path, runs=2, progress=said.append)
    assert said == ["run 1 of 2 is done", "run 2 of 2"]
    assert torch.equal(again.scores, scores(runs=2).scores)
    assert not torch.isnan(first.scores).any()
    with pytest.raises(eg.RunError, match="keeps runs with batch_size=24, and this call has 8"):
        scores(folder=tmp_path, batch_size=8)


def test_tables_of_other_forms(tmp_path):
    found = scores(runs=1)
    with pytest.raises(eg.ConfigurationError, match=r"\.csv or \.parquet, got scores\.txt"):
        found.save(tmp_path / "scores.txt")
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    found.save(tmp_path / "scores.parquet")
    assert pandas.read_parquet(tmp_path / "scores.parquet")["rank"].tolist() == [*range(1, N + 1)]


def test_arguments_of_a_trainer_are_its_optimiser_and_schedule(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        learning_rate=0.01,
        weight_decay=0.1,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        warmup_steps=3,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
    )
    settings = trainer_settings(arguments, N)
    solver = settings["solver"]
    assert settings["batch_size"] == 4
    assert (solver.max_steps, solver.accumulate, solver.clip_norm) == (18, 2, 0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = solver.scheduler(optimizer)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.01 * min(t / 3, (9 - t) / 6) for t in range(9)]
    assert rates == pytest.approx(expected)
    assert scores(**settings, runs=1).scores.isfinite().all()
    arguments.optim = "adafactor"
    with pytest.raises(
        eg.ConfigurationError, match="optim='adafactor' is not one of torch's AdamW optimizers"
    ):
        trainer_settings(arguments, N)


def weights(**changed):
    given: Any = {"model": linear(), "train": TRAIN, "valid": VALID, "loss": squares} | changed
    return learn_weights(**({"solver": SOLVER, "batch_size": 8, "outer_steps": 4} | given))


def test_weights_are_learned():
    found = weights(outer_steps=8)
    assert set(found.ranking()[:4]) <= set(range(6))  # two of them are hardly wrong
    assert found.weights[:4].max() < 0.3 < 1.5 < found.weights[6:].median()
    assert found.validation_losses[-1] < 0.2 * found.validation_losses[0]
    assert "in 8 outer steps" in found.status
    by_source = weights(sources=["bad"] * 6 + ["good"] * 18)
    assert by_source.weights[0] < 0.8 < 1.2 < by_source.weights[1]


def test_a_step_is_adam_on_the_logits_of_weights():
    """At w = 1, dw/da = 1/2: the first step moves every logit by lr, and no further."""
    scored = scores(batch_size=8, runs=1, nudged_steps=40)
    found = weights(outer_steps=1, lr=0.1)
    expected = 2 * torch.sigmoid(0.1 * scored.scores.sign())
    torch.testing.assert_close(found.weights, expected, rtol=1e-3, atol=0)


def test_learning_goes_on_from_where_it_was(tmp_path):
    said = []
    weights(folder=tmp_path, outer_steps=2)
    resumed = weights(folder=tmp_path, progress=said.append)
    assert len(said) == 2
    whole = weights()
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.validation_losses == whole.validation_losses
    assert resumed.gradient_evaluations == whole.gradient_evaluations
    with pytest.raises(eg.RunError, match=r"keeps runs with lr=0\.3, and this call has 0\.1"):
        weights(folder=tmp_path, lr=0.1)


def test_weights_that_are_of_no_use_say_so():
    assert "did not fall (1 to 1.2, the lowest before step 2)" in verdict([1.0, 0.9, 1.2])
    assert verdict([1.0, 1.2, 0.9]) == "validation loss 1 to 0.9 in 3 outer steps"
    assert "did not fall (1 to nan" in verdict([1.0, math.nan])


SCRIPT = """
import torch, equigrad as eg
x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True); y[3] = 9.0
rows = list(zip(x, y))
job = dict(
    model=torch.nn.Linear(2, 1), train=rows, valid=rows[10:], batch_size=10,
    loss=lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
    solver=eg.TorchOptimizer(optimizer=torch.optim.SGD, options={"lr": 0.1}, max_steps=50),
)
typo = {**job, "batchsize": 3}
"""


def test_the_command(tmp_path, capsys):
    script, out = tmp_path / "mine.py", tmp_path / "out"
    script.write_text(SCRIPT)
    main(["scores", f"{script}:job", "--out", str(out)])
    said = capsys.readouterr().out
    assert "most harmful: 3" in said
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [rows[0]["rank"], rows[0]["example"]] == ["1", "3"]
    assert [float(r["score"]) for r in rows] == sorted(float(r["score"]) for r in rows)
    assert json.loads((out / "result.json").read_text())["trusted"]
    assert (out / "scores.png").stat().st_size > 1000
    for words, message in ((["job"], "is not empty"), (["typo"], "has no arguments")):
        with pytest.raises(SystemExit) as ended:
            main(["scores", f"{script}:{words[0]}", "--out", str(out)])
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
    main(["scores", f"{script}:job", "--out", str(out), "--resume"])
    assert "run 2 of 2 is done" in capsys.readouterr().out


def test_the_command_learns(tmp_path, capsys):
    script, out = tmp_path / "mine.py", tmp_path / "out"
    script.write_text(SCRIPT)
    main(["scores", f"{script}:job", "--out", str(out), "--learn", "2"])
    said = capsys.readouterr().out
    assert "step 2 of 2: validation loss" in said
    assert "most harmful: 3" in said
    with (out / "weights.csv").open() as file:
        assert next(csv.DictReader(file)).keys() == {"rank", "example", "weight"}
    assert len(json.loads((out / "result.json").read_text())["validation_losses"]) == 2
    assert (out / "weights.png").stat().st_size > 1000
    main(["scores", f"{script}:job", "--out", str(out), "--learn", "3", "--resume"])
    said = capsys.readouterr().out
    assert "step 3 of 3" in said
    assert "step 2" not in said


class TestTransformers:
    """Noisy labels: a model that finds them, and one whose scores are chance."""

    @staticmethod
    def found(kind, lr, steps, nudged_steps):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_labels": 2}
        sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(**sizes)
            model = transformers.BertForSequenceClassification(config)
        else:
            config = transformers.LlamaConfig(pad_token_id=0, **sizes)
            model = transformers.LlamaForSequenceClassification(config)
        generator = torch.Generator().manual_seed(0)
        place = 0 if kind == "bert" else -1  # whose state the model classifies by
        ids = torch.randint(1, 12, (128, 6), generator=generator)
        labels = (ids[:, place] > 5).long()
        flipped = torch.rand(64, generator=generator) < 0.4
        labels[:64][flipped] = 1 - labels[:64][flipped]
        rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
        result = example_scores(
            model.train(),
            rows[:64],
            rows[64:],
            batch_size=16,
            solver=eg.TorchOptimizer(
                optimizer=torch.optim.AdamW, options={"lr": lr}, max_steps=steps
            ),
            nudged_steps=nudged_steps,
        )
        below = result.scores[flipped][:, None] < result.scores[~flipped][None]
        return result, below.double().mean().item()

    def test_scores_that_find_the_noise_are_trusted(self):
        result, area = self.found("bert", 1e-3, 60, 10)
        assert area > 0.95
        assert result.trusted

    def test_scores_of_chance_are_named(self):
        result, area = self.found("llama", 3e-3, 200, 20)
        assert area < 0.8
        assert not result.trusted
        assert "not to be trusted: two training runs agree" in result.status
