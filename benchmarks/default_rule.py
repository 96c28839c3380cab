"""Which contrastive rule serves best as the default: scheme, nudge and β.

The rules are compared on the zoo by the true relative error of the hypergradient and the number of
gradients; on three networks of the zoo under AdamW; and on the logarithms of a weight
decay a layer of a small convolutional network that Adam trains on 200 images of MNIST in batches of
50, where the truth is a central difference of the retrained network.

    python benchmarks/default_rule.py [--only zoo]
"""

import argparse
import statistics
import warnings
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.experiments.data import mnist
from equigrad.testing.zoo import ZOO

RULES: dict[str, Any] = {
    f"{scheme}, {nudge}, β {beta:g}": {"scheme": scheme, "nudge": nudge, "beta": beta}
    for scheme, nudge, beta in product(
        ("forward", "symmetric"), ("loss", "force"), (0.1, 0.01, 0.001)
    )
}


def adam(kind: type[torch.optim.Optimizer], lr: float, steps: int) -> eg.Solver:
    return eg.TorchOptimizer(
        optimizer=kind, options={"lr": lr, "weight_decay": 0.0}, max_steps=steps
    )


def on_the_zoo() -> None:
    solvers = {tol: eg.LBFGS(tol=tol, max_steps=2000) for tol in (1e-4, 1e-7)}
    print("| rule | tol | median error | worst | off by > 10 % and not named | gradients |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (name, rule), (tol, solver) in product(RULES.items(), solvers.items()):
        errors, counts, silent = [], [], 0
        for build in ZOO.values():
            case = build()
            try:
                result = eg.meta_gradient(
                    case.problem,
                    case.params,
                    case.meta_params,
                    solver=solver,
                    estimator=eg.Contrastive(**rule),
                )
            except eg.EquigradError:
                errors.append(float("inf"))
                continue
            errors.append(case.relative_error(result.grads))
            counts.append(result.gradient_evaluations)
            silent += errors[-1] > 0.1 and "estimated error" not in result.status
        print(
            f"| {name} | {tol:g} | {statistics.median(errors):.1e} | {max(errors):.1e} | {silent} "
            f"| {statistics.median(counts):.0f} |",
            flush=True,
        )


def under_adamw() -> None:
    print("| network | AdamW | rule | error | estimated | gradients |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for problem, (lr, steps) in product(
        ("softmax", "convolution", "transformer"), ((1e-2, 300), (3e-3, 3000))
    ):
        case = ZOO[problem]()
        for name, rule in RULES.items():
            result = eg.meta_gradient(
                case.problem,
                case.params,
                case.meta_params,
                solver=adam(torch.optim.AdamW, lr, steps),
                estimator=eg.Contrastive(nudged_solver=adam(torch.optim.AdamW, lr, 300), **rule),
            )
            print(
                f"| {problem} | {lr:g}, {steps} steps | {name} "
                f"| {case.relative_error(result.grads):.2g} | {result.error_estimate:.2g} "
                f"| {result.gradient_evaluations} |",
                flush=True,
            )


def on_mnist(steps: int = 200) -> None:
    data = mnist.load()
    images, labels = data.pixels.float() / 255, data.labels
    x, y, v, w = images[:200], labels[:200], images[1000:1500], labels[1000:1500]
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )
    layers = {"0": "first", "2": "second", "5": "readout"}
    log_decay = {layer: torch.tensor(-6.0) for layer in layers.values()}

    def inner(p: dict[str, Tensor], m: dict[str, Tensor], rows: slice) -> Tensor:
        decay = sum(m[layers[name[0]]].exp() * q.square().sum() for name, q in p.items())
        return cross_entropy(functional_call(network, p, (x[rows],)), y[rows]) + 0.5 * decay

    def outer(p: dict[str, Tensor], m: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(network, p, (v,)), w)

    problem = eg.Bilevel(inner, outer, inner_batches=[slice(i, i + 50) for i in range(0, 200, 50)])
    solver, params = adam(torch.optim.Adam, 3e-3, steps), dict(network.named_parameters())

    def retrained(layer: str, by: float) -> float:
        moved = {**log_decay, layer: log_decay[layer] + by}
        settled = eg.settle(problem, params, moved, solver=solver)
        with torch.no_grad():
            return outer(settled.params, moved).item()

    truth = {n: (retrained(n, 0.01) - retrained(n, -0.01)) / 0.02 for n in log_decay}
    print(f"| rule | {' | '.join(log_decay)} | estimated error |")
    print("| --- | " + "---: | " * 4)
    print(f"| truth | {' | '.join(f'{g:.4f}' for g in truth.values())} | |")
    for name, rule in RULES.items():
        result = eg.meta_gradient(
            problem, params, log_decay, solver=solver, estimator=eg.Contrastive(**rule)
        )
        grads = " | ".join(f"{g.item():.4f}" for g in result.grads.values())
        print(f"| {name} | {grads} | {result.error_estimate:.2g} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["zoo", "adamw", "mnist"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = {"zoo": on_the_zoo, "adamw": under_adamw, "mnist": on_mnist}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()
            print()


if __name__ == "__main__":
    main()
