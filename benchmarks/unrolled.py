"""Exact gradients through an optimiser: `Unrolled` beside a bare loop, and beside TorchOpt.

    python benchmarks/unrolled.py [--rounds 15] [--steps 50]

A network of 32-64-64-1 units on 64 examples takes 50 steps; θ is the log-strength of a ridge. The
bare loop is what anyone would write: the losses, `torch.autograd.grad(create_graph=True)` and the
optimiser's formula, no checks. All take turns; printed are the least milliseconds of each, and the
median over rounds of the ratio to the bare loop. TorchOpt (`pip install torchopt`) takes part
where it is installed, by its `MetaAdam` and `MetaSGD`. About a minute on one core.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import equigrad as eg
from equigrad.problems import Params

try:
    import torchopt  # pyright: ignore[reportMissingImports]
except ImportError:
    torchopt: Any = None

LR, MOMENTUM = 1e-3, 0.9
Loop = Callable[[], Tensor]


class Task:
    """The network, its data, and one gradient of θ by each way."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        sizes = (32, 64, 64, 1)
        layers = [(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise(sizes)]
        self.net = nn.Sequential(*[part for pair in layers for part in pair][:-1])
        self.x, self.y = torch.randn(64, 32), torch.randn(64, 1)
        self.start = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.theta = {"s": torch.zeros((), requires_grad=True)}
        self.problem = eg.Bilevel(self.inner, self.outer)
        self.steps = steps

    def outer(self, params: Params, meta: Params) -> Tensor:
        return (functional_call(self.net, dict(params), self.x) - self.y).square().mean()

    def inner(self, params: Params, meta: Params) -> Tensor:
        return self.outer(params, meta) + self.ridge(params.values(), meta)

    def ridge(self, params: Any, meta: Params) -> Tensor:
        return meta["s"].exp() * 1e-3 * sum(p.square().sum() for p in params)

    def bare(self, move: Callable[..., list[Tensor]]) -> Tensor:
        """A loop by hand; `move` is the optimiser's step."""
        names = list(self.start)
        params = [p.clone().requires_grad_() for p in self.start.values()]
        memory = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        for t in range(1, self.steps + 1):
            loss = self.inner(dict(zip(names, params, strict=True)), self.theta)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            params = move(params, grads, memory, t)
        outer = self.outer(dict(zip(names, params, strict=True)), self.theta)
        return torch.autograd.grad(outer, self.theta["s"])[0]

    def ours(self, solver: eg.Solver) -> Tensor:
        """By `Unrolled`."""
        return eg.meta_gradient(
            self.problem, self.start, self.theta, solver=solver, estimator=eg.Unrolled()
        ).grads["s"]

    def torchopt(self, make: Callable[[nn.Module], Any]) -> Tensor:
        """By TorchOpt: the module's parameters are replaced by tensors with a graph."""
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(self.start[name])
        begin = torchopt.extract_state_dict(self.net, by="reference")
        optimizer = make(self.net)
        for _ in range(self.steps):
            loss = (self.net(self.x) - self.y).square().mean()
            optimizer.step(loss + self.ridge(self.net.parameters(), self.theta))
        outer = (self.net(self.x) - self.y).square().mean()
        grad = torch.autograd.grad(outer, self.theta["s"])[0]
        torchopt.recover_state_dict(self.net, begin)
        return grad


def adam(params: list[Tensor], grads: Any, memory: list[list[Tensor]], t: int) -> list[Tensor]:
    """Adam's step (Kingma and Ba 2015)."""
    means, squares = memory
    after = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        means[i] = 0.9 * means[i] + 0.1 * g
        squares[i] = 0.999 * squares[i] + 0.001 * g * g
        size = squares[i].sqrt() / (1 - 0.999**t) ** 0.5 + 1e-8
        after.append(p - LR / (1 - 0.9**t) * means[i] / size)
    return after


def sgd(params: list[Tensor], grads: Any, memory: list[list[Tensor]], t: int) -> list[Tensor]:
    """SGD with momentum."""
    memory[0] = [MOMENTUM * m + g for m, g in zip(memory[0], grads, strict=True)]
    return [p - LR * m for p, m in zip(params, memory[0], strict=True)]


def ways(task: Task) -> dict[str, dict[str, Loop]]:
    """Who takes part, by optimiser; the bare loop first."""
    by_torch = partial(eg.TorchOptimizer, max_steps=task.steps)
    momentum: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM}
    adams = by_torch(optimizer=torch.optim.Adam, options={"lr": LR})
    sgds = by_torch(optimizer=torch.optim.SGD, options=momentum)
    descent = eg.GradientDescent(lr=LR, momentum=MOMENTUM, max_steps=task.steps)
    found = {
        "Adam": {
            "bare loop": lambda: task.bare(adam),
            "Unrolled, TorchOptimizer": lambda: task.ours(adams),
        },
        "SGD, momentum 0.9": {
            "bare loop": lambda: task.bare(sgd),
            "Unrolled, TorchOptimizer": lambda: task.ours(sgds),
            "Unrolled, GradientDescent": lambda: task.ours(descent),
        },
    }
    if torchopt is not None:
        found["Adam"]["TorchOpt, MetaAdam"] = lambda: task.torchopt(
            lambda net: torchopt.MetaAdam(net, lr=LR)
        )
        found["SGD, momentum 0.9"]["TorchOpt, MetaSGD"] = lambda: task.torchopt(
            lambda net: torchopt.MetaSGD(net, lr=LR, momentum=MOMENTUM)
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(1)
    task = Task(options.steps)
    print("| optimiser | by | least ms | ratio to the bare loop | gradient off by |")
    print("| --- | --- | ---: | ---: | ---: |")
    for optimizer, loops in ways(task).items():
        found = {by: loop() for by, loop in loops.items()}
        seconds: dict[str, list[float]] = {by: [] for by in loops}
        for _ in range(options.rounds):
            for by, loop in loops.items():
                began = clock()
                loop()
                seconds[by].append(clock() - began)
        right, base = found["bare loop"], seconds["bare loop"]
        for by, own in seconds.items():
            ratio = median(s / b for s, b in zip(own, base, strict=True))
            off = ((found[by] - right) / right).abs().item()
            print(f"| {optimizer} | {by} | {1e3 * min(own):.1f} | {ratio:.3f} | {off:.0e} |")
    if torchopt is None:
        print("\nTorchOpt is not installed and was left out.")


if __name__ == "__main__":
    main()
