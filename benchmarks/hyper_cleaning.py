"""Hyper-cleaning: which half of 5,000 MNIST labels is wrong, by 5,000 validation images.

A weight σ(a_i) for every training image, learned such that a softmax classifier, or a network of
two layers, does well on the validation set (Franceschi et al. 2017, with half of the labels
flipped). At every outer step the learner goes on from where it was, for 20 steps, and Adam moves a.
Each method has the same time, in seconds of the processor, one thread. In the end the learner is
trained anew with the weights; F1 is that of the flipped labels, found where σ(a_i) < ½.
Small loss: the learner is trained once, and the half of the images with the highest loss is left
out; `none` is training on all of them.

    EQUIGRAD_DATA=… python benchmarks/hyper_cleaning.py --out hyper-cleaning.jsonl

goes on where it was stopped, and prints the table, mean ± standard error over seeds.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.experiments.data import mnist
from equigrad.problems import Params

PART, DECAY, INNER_STEPS, FINAL_STEPS = 5000, 1e-4, 20, 300
NETWORKS = {"linear": (784, 10), "two layers": (784, 100, 10)}
SECONDS = {"linear": 15.0, "two layers": 45.0}
LEARNER: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "nesterov": True}
OUTER_LR = 0.2
ESTIMATORS: dict[str, eg.Estimator] = {
    "Contrastive": eg.Contrastive(
        beta=0.1, error=False, nudged_solver=eg.GradientDescent(**LEARNER, max_steps=10)
    ),
    "Unrolled": eg.Unrolled(),
    "ConjugateGradient": eg.ConjugateGradient(max_iterations=10, damping=1e-2, indefinite="stop"),
    "T1T2": eg.T1T2(),
}
METHODS = ("none", "small loss", *ESTIMATORS)


class Cleaning:
    """The data and losses of one network."""

    def __init__(self, network: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        every, test = mnist.load(), mnist.load(mnist.TEST)
        order = torch.randperm(len(every.labels), generator=generator)[: 2 * PART]
        pixels, labels = _flat(every.pixels[order]), every.labels[order]
        self.x, self.v = pixels.split(PART)
        true, self.w = labels.split(PART)
        self.flipped = torch.rand(PART, generator=generator) < 0.5
        other = (true + torch.randint(1, 10, (PART,), generator=generator)) % 10
        self.y = torch.where(self.flipped, other, true)
        self.test = _flat(test.pixels), test.labels
        sizes = NETWORKS[network]
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.start = {name: p.detach() for name, p in self.net.named_parameters()}
        self.problem = eg.Bilevel(self.inner_loss, self.outer_loss, modules=(self.net,))

    def losses(self, params: Params) -> Tensor:
        """The loss of every training image."""
        return cross_entropy(
            functional_call(self.net, dict(params), (self.x,)), self.y, reduction="none"
        )

    def inner_loss(self, params: Params, meta: Params) -> Tensor:
        """Weighted training loss and weight decay."""
        decay = sum(p.square().sum() for p in params.values())
        return (torch.sigmoid(meta["a"]) * self.losses(params)).mean() + DECAY * decay

    def outer_loss(self, params: Params, meta: Params) -> Tensor:
        """Validation loss."""
        return cross_entropy(functional_call(self.net, dict(params), (self.v,)), self.w)

    def trained(self, a: Tensor, steps: int = FINAL_STEPS) -> dict[str, Tensor]:
        """The learner with these weights."""
        solver = eg.GradientDescent(**LEARNER, max_steps=steps)
        return dict(eg.settle(self.problem, self.start, {"a": a}, solver=solver).params)

    def learned(self, estimator: eg.Estimator, seconds: float) -> tuple[Tensor, int, int]:
        """a, outer steps, and gradient evaluations spent."""
        end = time.process_time() + seconds
        a = torch.zeros(PART, requires_grad=True)
        optimizer = torch.optim.Adam([a], lr=OUTER_LR)
        solver = eg.GradientDescent(**LEARNER, max_steps=INNER_STEPS)
        params, spent, steps = self.start, 0, 0
        while time.process_time() < end:
            result = eg.meta_gradient(
                self.problem, params, {"a": a}, solver=solver, estimator=estimator
            )
            result.assign()
            optimizer.step()
            params, spent, steps = result.params, spent + result.gradient_evaluations, steps + 1
        return a.detach(), steps, spent

    def small_loss(self) -> Tensor:
        """Weights of nearly zero for the half with the highest loss."""
        with torch.no_grad():
            losses = self.losses(self.trained(torch.full((PART,), 20.0)))
        return torch.where(losses > losses.median(), -20.0, 20.0)

    def judged(self, a: Tensor) -> dict[str, float]:
        """Test accuracy after training with the weights, and F1 of flipped labels."""
        images, labels = self.test
        with torch.no_grad():
            found = functional_call(self.net, self.trained(a), (images,)).argmax(1)
        said = a < 0
        hits = (said & self.flipped).sum().item()
        f1 = 2 * hits / max(said.sum().item() + self.flipped.sum().item(), 1)
        return {"accuracy": (found == labels).float().mean().item(), "f1": f1}


def _flat(pixels: Tensor) -> Tensor:
    return pixels.flatten(1).float() / 255


def measured(network: str, method: str, seed: int) -> dict[str, Any]:
    """One method and seed."""
    job = Cleaning(network, seed)
    steps, spent = 0, FINAL_STEPS
    if method == "none":
        a = torch.full((PART,), 20.0)
    elif method == "small loss":
        a = job.small_loss()
    else:
        a, steps, spent = job.learned(ESTIMATORS[method], SECONDS[network])
    row = {"network": network, "method": method, "seed": seed, "seconds": SECONDS[network]}
    return row | job.judged(a) | {"outer_steps": steps, "evaluations": spent}


def table(rows: list[dict[str, Any]]) -> str:
    """By network and method."""
    head = "| network | method | seeds | test accuracy | F1 | outer steps | gradient evaluations |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for network in NETWORKS:
        for method in METHODS:
            own = [r for r in rows if (r["network"], r["method"]) == (network, method)]
            if own:
                accuracy, f1 = (_mean([r[key] for r in own]) for key in ("accuracy", "f1"))
                counts = (_mean([r[key] for r in own])[0] for key in ("outer_steps", "evaluations"))
                lines.append(
                    f"| {network} | {method} | {len(own)} | {accuracy[0]:.1%} ± {accuracy[1]:.1%} "
                    f"| {f1[0]:.3f} ± {f1[1]:.3f} | {' | '.join(f'{c:.0f}' for c in counts)} |"
                )
    return "\n".join(lines)


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def main() -> None:
    """Go on with the file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("hyper-cleaning.jsonl"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    done = {(r["network"], r["method"], r["seed"], r["seconds"]) for r in rows}
    for seed, (network, method) in product(range(given.seeds), product(given.networks, METHODS)):
        if (network, method, seed, SECONDS[network]) not in done:
            rows.append(measured(network, method, seed))
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
