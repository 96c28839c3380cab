"""What `meta_gradient` costs beyond the gradient evaluations that it consists of.

One matched contrastive meta-gradient, against a loop written by hand that does the same gradient
evaluations on the plain module: `torch.autograd.grad`, the penalty in closed form, Nesterov steps
by `torch._foreach_*`. The two are interleaved in one process; the median ratio over rounds is
reported. Beside them the loop most people would write: `torch.optim.SGD` and a penalty that
autograd differentiates.

    python benchmarks/overhead.py [--rounds 9] [--threads 1]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import equigrad as eg

LR, MOMENTUM, BETA, STRENGTH = 0.01, 0.9, 0.1, 1e-3


@dataclass(frozen=True)
class Case:
    """A network, its batches, and the lengths of the phases."""

    name: str
    widths: Sequence[int]
    train: int
    validation: int
    free: int
    nudged: int


CASES = [
    Case("digits 64-64-64-64-10, 10 + 890 images", (64, 64, 64, 64, 10), 10, 890, 500, 100),
    Case("MLP 784-256x5-10, batches of 50", (784, *[256] * 5, 10), 50, 50, 100, 50),
]


def make(case: Case) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (wide, narrow) in enumerate(zip(case.widths, case.widths[1:], strict=False)):
        layers += [nn.Linear(wide, narrow)] + ([nn.Tanh()] if i + 2 < len(case.widths) else [])

    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, case.widths[0]), torch.randint(0, 10, (size,))

    return nn.Sequential(*layers), batch(case.train), batch(case.validation)


def library(case: Case, *, estimated: bool) -> Callable[[], dict[str, Tensor]]:
    net, (x, y), (v, w) = make(case)
    synapse = eg.nn.ComplexSynapse(net, strength=STRENGTH)
    problem = eg.Bilevel(
        lambda p, m: cross_entropy(synapse(p, x), y),
        lambda p, m: cross_entropy(synapse(p, v), w),
        regularizer=synapse,
    )
    params, meta_params = synapse.params(), synapse.meta_params()
    solver = eg.GradientDescent(lr=LR, momentum=MOMENTUM, nesterov=True, max_steps=case.free)
    nudged = eg.GradientDescent(lr=LR, momentum=MOMENTUM, nesterov=True, max_steps=case.nudged)
    estimator = eg.Contrastive(
        beta=BETA, scheme="forward", nudge="loss", nudged_solver=nudged, error=estimated
    )

    def run() -> dict[str, Tensor]:
        return eg.meta_gradient(
            problem, params, meta_params, solver=solver, estimator=estimator
        ).grads

    return run


def by_hand(case: Case) -> Callable[[], dict[str, Tensor]]:
    net, (x, y), (v, w) = make(case)
    start = [p.detach().clone() for p in net.parameters()]
    strength = [torch.full_like(p, STRENGTH) for p in start]
    params: list[Tensor] = list(net.parameters())

    def phase(begin: list[Tensor], momentum: list[Tensor], steps: int, beta: float) -> None:
        with torch.no_grad():
            torch._foreach_copy_(params, begin)
        for _ in range(steps):
            loss = cross_entropy(net(x), y)
            if beta:
                loss = loss + beta * cross_entropy(net(v), w)
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                grads = torch._foreach_addcmul(grads, params, strength)
                torch._foreach_mul_(momentum, MOMENTUM)
                torch._foreach_add_(momentum, grads)
                torch._foreach_add_(params, grads, alpha=-LR)
                torch._foreach_add_(params, momentum, alpha=-LR * MOMENTUM)

    def run() -> dict[str, Tensor]:
        momentum = [torch.zeros_like(p) for p in start]
        phase(start, momentum, case.free, 0.0)
        free = [p.detach().clone() for p in params]
        ends = []
        for beta in (BETA, 0.0):
            phase(free, [m.clone() for m in momentum], case.nudged, beta)
            ends.append([p.detach().clone() for p in params])
        return {
            f"strength.{name}": 0.5 * (a - b) * (a + b) / BETA
            for (name, _), a, b in zip(net.named_parameters(), *ends, strict=True)
        }

    return run


def by_optimizer(case: Case) -> Callable[[], dict[str, Tensor]]:
    net, (x, y), (v, w) = make(case)
    strength = [torch.full_like(p, STRENGTH) for p in net.parameters()]

    def phase(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, beta: float) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            penalty = sum(
                (s * p.square()).sum() for s, p in zip(strength, model.parameters(), strict=True)
            )
            loss = cross_entropy(model(x), y) + 0.5 * penalty
            if beta:
                loss = loss + beta * cross_entropy(model(v), w)
            loss.backward()
            optimizer.step()

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)

    def run() -> dict[str, Tensor]:
        free = copy.deepcopy(net)
        optimizer = sgd(free)
        phase(free, optimizer, case.free, 0.0)
        ends = []
        for beta in (BETA, 0.0):
            model = copy.deepcopy(free)
            own = sgd(model)
            own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            phase(model, own, case.nudged, beta)
            ends.append([p.detach() for p in model.parameters()])
        return {
            f"strength.{name}": 0.5 * (a.square() - b.square()) / BETA
            for (name, _), a, b in zip(net.named_parameters(), *ends, strict=True)
        }

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds\n")
    print("| case | by hand, ms | equigrad / by hand | with its error | torch.optim / by hand |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for case in CASES:
        contenders = [
            by_hand(case),
            library(case, estimated=False),
            library(case, estimated=True),
            by_optimizer(case),
        ]
        reference, *others = [run() for run in contenders]  # a warm-up, and the same numbers
        for other in others:
            for name, grad in reference.items():
                torch.testing.assert_close(other[name], grad, rtol=1e-2, atol=1e-4)
        seconds: list[list[float]] = []
        for _ in range(arguments.rounds):
            row = []
            for run in contenders:
                began = time.perf_counter()
                run()
                row.append(time.perf_counter() - began)
            seconds.append(row)
        hand = statistics.median(row[0] for row in seconds)
        ratios = [statistics.median(row[i] / row[0] for row in seconds) for i in (1, 2, 3)]
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {case.name} | {1e3 * hand:.0f} | {cells} |")


if __name__ == "__main__":
    main()
