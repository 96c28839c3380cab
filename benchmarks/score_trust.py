"""Do scores that are worth nothing say so? Models and optimisers, some of them trained too long.

64 sentences of which 40 % have the wrong label, 64 that are trusted. AUC is how often a wrong one
is below a right one: 0.5 is chance. Beside it what can be known without the truth: the agreement of
two training runs, of half of the nudged phases with all of them (`steadiness`), and of two β
(`linearity`); and the rank correlation with the exact gradient of the same training runs (`exact`).

    python benchmarks/score_trust.py --out score-trust.jsonl

goes on where it was stopped, and prints the table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.training.scores import TRUSTED, example_scores, spearman

SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_labels": 2,
}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(pad_token_id=0, **SIZES)
    return transformers.LlamaForSequenceClassification(config)


class Words(nn.Module):
    """A network of layers over embedded words, called as models of transformers are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(48, width), nn.Tanh(), nn.Linear(width, 2)] if width else None
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Sequential(*(layers or [nn.Linear(48, 2)]))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.embedding(input_ids).flatten(1))


def loss(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Of each sentence."""
    out = model(input_ids=batch["input_ids"])
    logits = out if isinstance(out, Tensor) else out.logits
    return cross_entropy(logits, batch["labels"], reduction="none")


def solver(kind: type[torch.optim.Optimizer], steps: int, **options: Any) -> eg.TorchOptimizer:
    return eg.TorchOptimizer(optimizer=kind, options=options, max_steps=steps)


O = torch.optim  # noqa: E741
PAIRS: dict[str, tuple[Callable[[], nn.Module], eg.TorchOptimizer]] = {
    "BERT, AdamW 1e-3, 60": (bert, solver(O.AdamW, 60, lr=1e-3)),
    "BERT, AdamW 3e-3, 300": (bert, solver(O.AdamW, 300, lr=3e-3)),
    "Llama, AdamW 3e-3, 60": (llama, solver(O.AdamW, 60, lr=3e-3)),
    "Llama, AdamW 3e-3, 200": (llama, solver(O.AdamW, 200, lr=3e-3)),
    "linear, SGD 0.1, 200": (lambda: Words(0), solver(O.SGD, 200, lr=0.1, momentum=0.9)),
    "linear, AdamW 1e-2, 100": (lambda: Words(0), solver(O.AdamW, 100, lr=1e-2)),
    "two layers, SGD 0.1, 100": (lambda: Words(32), solver(O.SGD, 100, lr=0.1, momentum=0.9)),
    "two layers, Adam 1e-2, 60": (lambda: Words(32), solver(O.Adam, 60, lr=1e-2)),
    "two layers, Adam 1e-2, 400": (lambda: Words(32), solver(O.Adam, 400, lr=1e-2)),
    "two layers, RMSprop 3e-3, 100": (lambda: Words(32), solver(O.RMSprop, 100, lr=3e-3)),
}


def measured(pair: str) -> dict[str, Any]:
    """One row."""
    make, learner = PAIRS[pair]
    torch.manual_seed(0)
    model = make().train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 12, (128, 6), generator=generator)
    labels = (ids[:, 0 if "BERT" in pair else -1] > 5).long()
    flipped = torch.rand(64, generator=generator) < 0.4
    labels[:64][flipped] = 1 - labels[:64][flipped]
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]

    def scored(estimator: eg.Estimator | None = None) -> Any:
        return example_scores(
            model, rows[:64], rows[64:], loss, solver=learner, batch_size=16, estimator=estimator
        )

    found = scored()
    exact = scored(eg.Unrolled(products="contrast"))
    below = found.scores[flipped][:, None] < found.scores[~flipped][None]
    return {
        "pair": pair,
        "agreement": found.agreement,
        "steadiness": found.steadiness,
        "linearity": found.linearity,
        "exact": spearman(found.scores, exact.scores),
        "trusted": found.trusted,
        "auc": below.double().mean().item(),
        "validation_loss": found.validation_loss,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """By pair, and where trust and the exact gradient differ."""
    lines = ["| model, optimiser, steps | runs | halves | two β | trusted | exact | AUC |"]
    lines.append("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for r in rows:
        signs = f"{r['agreement']:.2f} | {r['steadiness']:.2f} | {r['linearity']:.2f}"
        trust = "yes" if r["trusted"] else "no"
        lines.append(f"| {r['pair']} | {signs} | {trust} | {r['exact']:.2f} | {r['auc']:.2f} |")
    wrong = [r["pair"] for r in rows if r["trusted"] and r["exact"] < TRUSTED]
    lines += ["", f"trusted from {TRUSTED}; trusted, but further from the exact ones: {wrong}"]
    return "\n".join(lines)


def main() -> None:
    """Go on with the file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("score-trust.jsonl"))
    path = parser.parse_args().out
    torch.set_num_threads(1)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    for pair in PAIRS:
        if pair not in {r["pair"] for r in rows}:
            rows.append(measured(pair))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
