"""Conjugate gradients by contrast against those by double backward, and the contrastive rule.

A tanh network 784-256×5-10 at its minimum under a strength for every weight, float32: relative
error and cosine of the meta-gradient to conjugate gradients in float64, and CPU seconds after the
free phase, which all share. Contenders are interleaved in one process; the least of all rounds
counts.

    python benchmarks/krylov.py [--rounds 3] [--images 50] [--iterations 100] [--threads 2]
"""

import argparse
import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.estimators import Estimator
from equigrad.nn import ComplexSynapse

WIDTHS, STRENGTH = (784, *[256] * 5, 10), 1e-3


def case(images: int, dtype: torch.dtype) -> tuple[eg.Bilevel, ComplexSynapse]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    x, v = torch.rand(2, images, WIDTHS[0]).to(dtype)
    y, w = torch.randint(10, (2, images))
    synapse = ComplexSynapse(nn.Sequential(*layers[:-1]).to(dtype), strength=STRENGTH)
    problem = eg.Bilevel(
        lambda p, m: cross_entropy(synapse(p, x), y),
        lambda p, m: cross_entropy(synapse(p, v), w),
        regularizer=synapse,
    )
    return problem, synapse


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count = arguments.iterations

    problem, synapse = case(arguments.images, torch.float64)
    meta = synapse.meta_params()
    solver: Any = eg.LBFGS(tol=1e-7, max_steps=5000)
    settled = eg.settle(problem, synapse.params(), meta, solver=solver)
    reference = eg.meta_gradient(
        problem,
        synapse.params(),
        meta,
        solver=solver,
        settled=settled,
        estimator=eg.ConjugateGradient(tol=1e-9, max_iterations=5000, indefinite="stop"),
    )
    exact = flat(reference.grads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.images} images")
    print(f"settled in float64: {settled.status}; reference: {reference.status}\n")

    problem, synapse = case(arguments.images, torch.float32)
    start = {n: p.float() for n, p in settled.params.items()}
    meta = {n: m.detach().float().requires_grad_() for n, m in meta.items()}
    still = eg.GradientDescent(lr=1e-12, max_steps=1)
    rest = eg.settle(problem, start, meta, solver=still)
    nudged = eg.GradientDescent(lr=1.0, momentum=0.9, nesterov=True, max_steps=count)
    contenders: dict[str, Estimator] = {
        f"CG by double backward, {count}": eg.ConjugateGradient(
            max_iterations=count, products="autograd", indefinite="stop"
        ),
        f"CG by contrast, {count}": eg.ConjugateGradient(
            max_iterations=count, products="contrast", indefinite="stop"
        ),
        f"Contrastive, symmetric, force, β = 1e-3, {count} steps": eg.Contrastive(
            beta=1e-3, momentum="reset", nudged_solver=nudged
        ),
        f"Contrastive, forward, loss, β = 0.1, {count} steps": eg.Contrastive(
            beta=0.1,
            scheme="forward",
            nudge="loss",
            nudged_solver=eg.GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=count),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for name, estimator in contenders.items():
            began = time.process_time()
            found[name] = eg.meta_gradient(
                problem, start, meta, solver=still, estimator=estimator, settled=rest
            )
            seconds[name].append(time.process_time() - began)
    least = min(seconds[next(iter(contenders))])
    print("| method | error | cosine | gradients | CPU s | / CG | status |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, result in found.items():
        grads = flat(result.grads)
        error = ((grads - exact).norm() / exact.norm()).item()
        cosine = torch.cosine_similarity(grads, exact, dim=0).item()
        took = min(seconds[name])
        said = result.status.partition("; ")[2]
        print(
            f"| {name} | {error:.2g} | {cosine:.5f} | {result.gradient_evaluations} | {took:.2f} "
            f"| {took / least:.2f} | {said} |"
        )


if __name__ == "__main__":
    main()
