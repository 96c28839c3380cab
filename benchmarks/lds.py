"""LDS: do scores of training examples predict what training without some of them does?

Two small models of transformers, trained by AdamW on generated texts, some of them noisy. From
random subsets of nine tenths of the training set each model is trained again, from the same start,
with the same batches but for the examples that are left out, and its validation loss is measured.
The linear datamodelling score is Spearman's correlation of these losses with what a method's scores
predict, the sum of those of the examples left out. Cost: gradient evaluations of a method, its own
training included, by those of one training run.

AdamW divides by the root of a running mean plus ε. With its usual 1e-8 the step is nearly the sign
of a gradient that is close to zero, and a small change of the weights need not have a small effect;
with a larger ε training is smooth (Ilyas & Engstrom 2025 say "metasmooth"). Both are measured. The
number of texts and of steps was chosen by the exact gradient's score alone.

    python benchmarks/lds.py --out lds.jsonl

goes on where it was stopped, and prints the table.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.problems import Params
from equigrad.training.scores import spearman

WORDS, LENGTH, TRAIN, VALID, BATCH, STEPS, SUBSETS, SHARE = 24, 10, 512, 128, 32, 96, 60, 0.9
SIZES: dict[str, int] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RATES = {"bert": 1e-3, "gpt2": 2e-3}
KINDS = {f"{name}, ε = {eps:g}": (name, eps) for name in RATES for eps in (1e-8, 1e-3)}
RETRAINED = "retrained"


def texts(count: int, seed: int) -> Tensor:
    """Each word is the last one plus the text's first step; a third of the texts are noise."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, WORDS, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    ids = (first + step * torch.arange(LENGTH)) % WORDS
    if seed == 0:
        noisy = torch.rand(count, generator=generator) < 1 / 3
        ids[noisy] = torch.randint(0, WORDS, ids[noisy].shape, generator=generator)
    return ids


def model(kind: str, attention: str) -> torch.nn.Module:
    """A classifier of the texts' first words, or a model of the next word."""
    torch.manual_seed(0)
    common = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    if kind == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        settings: dict[str, Any] = {**SIZES, **dropout, "num_labels": 2}
        config: Any = transformers.BertConfig(
            **settings,
            vocab_size=WORDS,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
        make = transformers.BertForSequenceClassification
    else:
        dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            **dropout, **common, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH
        )
        make = transformers.GPT2LMHeadModel
    config._attn_implementation = attention
    return make(config)


def labels(ids: Tensor, seed: int) -> Tensor:
    """Whether a text's first word is of the lower half; a third of the training labels are not."""
    found = (ids[:, 0] < WORDS // 2).long()
    if seed:
        return found
    wrong = torch.rand(len(ids), generator=torch.Generator().manual_seed(2)) < 1 / 3
    return torch.where(wrong, 1 - found, found)


def job(kind: str, attention: str = "sdpa") -> tuple[eg.Bilevel, Params, eg.TorchOptimizer]:
    """Weighted training inside, validation outside; every pass has the same batches."""
    name, eps = KINDS[kind]
    net = eg.nn.Functional(model(name, attention))
    (ids, targets), (valid, valid_targets) = (
        (t, labels(t, seed)) for seed in (0, 1) for t in (texts((TRAIN, VALID)[seed], seed),)
    )

    def losses(params: Params, ids: Tensor, targets: Tensor) -> Tensor:
        if name == "bert":
            return cross_entropy(net(params, input_ids=ids).logits, targets, reduction="none")
        logits = net(params, input_ids=ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    def inner(params: Params, meta: Params, rows: Tensor) -> Tensor:
        weights = meta["weight"].index_select(0, rows)
        return (weights * losses(params, ids[rows], targets[rows])).mean()

    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(3))
    problem = eg.Bilevel(
        inner,
        lambda params, meta: losses(params, valid, valid_targets).mean(),
        inner_batches=list(order.split(BATCH)),
        modules=(net.model,),
    )
    solver = eg.TorchOptimizer(
        optimizer=torch.optim.AdamW,
        options={"lr": RATES[name], "weight_decay": 0.01, "eps": eps},
        max_steps=STEPS,
        tol=None,
    )
    return problem, net.params(), solver


def retrained(kind: str, left_out: Sequence[Tensor]) -> list[float]:
    """Validation losses after training without some examples, side by side, by torch alone."""
    problem, params, solver = job(kind, "eager")
    weights = torch.ones(len(left_out), TRAIN)
    for row, numbers in zip(weights, left_out, strict=True):
        row[numbers] = 0.0
    stacked = {n: p.expand(len(left_out), *p.shape).clone() for n, p in params.items()}
    optimizer = torch.optim.AdamW(list(stacked.values()), **solver.options)

    def inner(params: Params, weights: Tensor, rows: Tensor) -> Tensor:
        return problem.inner_loss(params, {"weight": weights}, rows)

    gradients = torch.func.vmap(torch.func.grad(inner), in_dims=(0, 0, None))
    batches: Any = problem.inner_batches
    for step in range(STEPS):
        found = gradients(stacked, weights, batches[step % len(batches)])
        for name, p in stacked.items():
            p.grad = found[name]
        optimizer.step()
    return torch.func.vmap(lambda p: problem.outer_loss(p, {}))(stacked).tolist()


def bf16() -> AbstractContextManager[Any]:
    """The losses in sixteen bits."""
    return torch.autocast("cpu", torch.bfloat16)


Method = Callable[[str], tuple[Tensor, float]]
"""Of a kind of model: scores, and what they cost in training runs."""


def by(
    estimator: eg.Estimator,
    *,
    nudged: int | None = None,
    attention: str = "sdpa",
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Method:
    """Scores by an estimator, with nudged phases of so many steps where it has any."""

    def scores(kind: str) -> tuple[Tensor, float]:
        problem, params, solver = job(kind, attention)
        rule = estimator
        if nudged is not None:
            shorter = dataclasses.replace(solver, max_steps=nudged)
            rule = dataclasses.replace(rule, nudged_solver=shorter)  # pyright: ignore
        with around():
            found = eg.meta_gradient(
                problem, params, {"weight": torch.ones(TRAIN)}, solver=solver, estimator=rule
            )
        return -found.grads["weight"], found.gradient_evaluations / STEPS

    return scores


def small_loss(kind: str) -> tuple[Tensor, float]:
    """Examples with a high loss after training are taken for harmful."""
    problem, params, solver = job(kind)
    weights = torch.ones(TRAIN, requires_grad=True)
    settled = eg.settle(problem, params, {"weight": weights.detach()}, solver=solver)
    batches: Any = problem.inner_batches
    losses = [problem.inner_loss(settled.params, {"weight": weights}, rows) for rows in batches]
    return -torch.autograd.grad(torch.stack(losses).sum(), weights)[0], 1 + len(batches) / STEPS


def contrastive(**settings: Any) -> eg.Contrastive:
    return eg.Contrastive(beta=0.3, error=False, **settings)


METHODS: dict[str, Method] = {
    "Unrolled(), eager attention": by(eg.Unrolled(), attention="eager"),
    'Unrolled(products="contrast")': by(eg.Unrolled(products="contrast")),
    'Unrolled(products="contrast"), bf16': by(eg.Unrolled(products="contrast"), around=bf16),
    "Contrastive, force, T/5 steps": by(contrastive(), nudged=STEPS // 5),
    "Contrastive, force, T/5 steps, bf16": by(contrastive(), nudged=STEPS // 5, around=bf16),
    "Contrastive, force, T steps": by(contrastive(), nudged=STEPS),
    "Contrastive, loss, T/5 steps": by(contrastive(nudge="loss"), nudged=STEPS // 5),
    "T1T2, eager attention": by(eg.T1T2(), attention="eager"),
    "ConjugateGradient, damping 0.01, eager attention": by(
        eg.ConjugateGradient(max_iterations=20, damping=0.01, indefinite="stop"),
        attention="eager",
    ),
    "small loss": small_loss,
}


def lines(path: Path) -> list[dict[str, Any]]:
    """What is there already; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def work(path: Path, kind: str, said: Callable[[dict[str, Any]], None]) -> None:
    """All retrainings and all methods that are not in the file yet."""
    done = {(line["model"], line["what"]) for line in lines(path)}
    if (kind, RETRAINED) not in done:
        generator = torch.Generator().manual_seed(5)
        orders = [torch.randperm(TRAIN, generator=generator) for _ in range(SUBSETS)]
        left_out = [order[round(SHARE * TRAIN) :] for order in orders]
        losses = retrained(kind, left_out)
        said({"what": RETRAINED, "left_out": [o.tolist() for o in left_out], "losses": losses})
    for name, method in METHODS.items():
        if (kind, name) not in done:
            began = time.perf_counter()
            torch.manual_seed(0)
            scores, runs = method(kind)
            seconds = time.perf_counter() - began
            said({"what": name, "scores": scores.tolist(), "runs": runs, "seconds": seconds})


def table(path: Path) -> str:
    """LDS and cost by method and model."""
    found = lines(path)
    rows = ["| method | model | LDS | training runs | s |", "| --- | --- | ---: | ---: | ---: |"]
    for kind in KINDS:
        own = [line for line in found if line["model"] == kind]
        (subsets,) = (line for line in own if line["what"] == RETRAINED)
        measured = torch.tensor(subsets["losses"])
        for line in own:
            if "scores" in line:
                scores = torch.tensor(line["scores"])
                predicted = torch.stack([scores[o].sum() for o in subsets["left_out"]])
                value = spearman(predicted, measured)
                cost = f"{line['runs']:.1f} | {line['seconds']:.1f}"
                rows.append(f"| {line['what']} | {kind} | {value:.2f} | {cost} |")
    return "\n".join(rows)


def main() -> None:
    """Go on with the file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("lds.jsonl"))
    path = parser.parse_args().out
    torch.set_num_threads(1)
    for kind in KINDS:
        with path.open("a") as file:

            def said(line: dict[str, Any], kind: str = kind, file: Any = file) -> None:
                file.write(json.dumps({"model": kind} | line) + "\n")
                file.flush()

            work(path, kind, said)
    print(table(path))


if __name__ == "__main__":
    main()
