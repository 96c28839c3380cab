"""A deep equilibrium layer, forward and backward, against torchdeq's.

The same cells, tolerances (of the norm of `f(h, x) - h` of a sample; for the adjoint, 1e-4 of the
norm of its right-hand side) and Anderson history, in interleaved rounds of one process, with
gradients compared; then the peak memory of forward and backward over the solver's steps. torchdeq
keeps the last six iterates, which are five moves. It regularises by 1e-4, whatever the scale of
what it solves: `∂L/∂h` has a norm of 100 here, so that this does not slow it down.

    pip install torchdeq
    python benchmarks/equilibrium_layer.py [--rounds 9] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import equigrad as eg

BACKWARD_TOLERANCE, STEPS, SCALE = 1e-4, 60, 100.0


class Dense(nn.Module):
    """`tanh(W h + b + x)`, ‖W‖ = 0.9."""

    def __init__(self, units: int = 256) -> None:
        super().__init__()
        self.linear = nn.Linear(units, units)
        with torch.no_grad():
            self.linear.weight.mul_(0.9 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """One step."""
        return torch.tanh(self.linear(h) + x)


class Convolutional(nn.Module):
    """A residual block with GroupNorm and small weights, fed with x."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(3))
        for conv in (self.one, self.two):
            nn.init.normal_(conv.weight, std=0.01)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """One step."""
        inner = self.norms[0](self.one(h).relu())
        return self.norms[2]((h + self.norms[1](x + self.two(inner))).relu())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "tanh, 256 units, batch 128": (Dense, (128, 256), 1e-4),
    "conv, 32 channels of 16 x 16, batch 32": (Convolutional, (32, 32, 16, 16), 1e-2),
}


class Ours:
    """This library's layer."""

    def __init__(
        self,
        cell: nn.Module,
        tol: float | None,
        steps: int = STEPS,
        adjoint_tol: float = BACKWARD_TOLERANCE,
    ) -> None:
        self.layer = eg.nn.EquilibriumLayer(
            cell,
            solver=eg.Anderson(tol=tol, max_steps=steps),
            estimator=eg.Adjoint(solver=eg.Anderson(tol=adjoint_tol, max_steps=steps)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Where the cell settles."""
        return self.layer(x)

    def report(self) -> str:
        """How the last pass settled."""
        return str(self.layer.phase)


class Theirs:
    """torchdeq's."""

    def __init__(self, cell: nn.Module, tol: float) -> None:
        from torchdeq import get_deq  # pyright: ignore[reportMissingImports]

        self.cell, self.info = cell, {}
        self.deq: Any = get_deq(
            ift=True,
            f_solver="anderson",
            b_solver="anderson",
            f_tol=tol,
            b_tol=SCALE * BACKWARD_TOLERANCE,
            f_stop_mode="abs",
            b_stop_mode="abs",
            f_max_iter=STEPS,
            b_max_iter=STEPS,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Where the cell settles."""
        states, self.info = self.deq(lambda h: self.cell(h, x), torch.zeros_like(x))
        return states[-1]

    def report(self) -> str:
        """How the last pass settled."""
        residual, steps = self.info["abs_lowest"].max().item(), int(self.info["nstep"].max())
        return f"residual {residual:.2g} after {steps} evaluations"


def run(layer: Any, x: Tensor, pressure: Tensor) -> dict[str, float]:
    """Wall and processor time of a forward and a backward pass, in milliseconds."""
    began = time.perf_counter(), time.process_time()
    h = layer(x)
    between = time.perf_counter(), time.process_time()
    h.backward(pressure)
    ended = time.perf_counter(), time.process_time()
    return {
        "forward": 1e3 * (between[1] - began[1]),
        "backward": 1e3 * (ended[1] - between[1]),
        "both": 1e3 * (ended[1] - began[1]),
        "wall": 1e3 * (ended[0] - began[0]),
    }


def gradient(layer: Any, cell: nn.Module, x: Tensor, pressure: Tensor) -> Tensor:
    """By the cell's weights, as a vector."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(layer(x), list(cell.parameters()), pressure)]
    )


def compare(name: str, rounds: int) -> None:
    build, shape, tol = CASES[name]
    torch.manual_seed(0)
    cell = build()
    x, pressure = torch.randn(shape), torch.randn(shape)
    pressure *= SCALE / pressure.flatten(1).norm(dim=1).max()
    layers = {"equigrad": Ours(cell, tol), "torchdeq": Theirs(cell, tol)}
    times: dict[str, list[dict[str, float]]] = {who: [] for who in layers}
    for i in range(rounds + 2):
        for who, layer in layers.items():
            taken = run(layer, x, pressure)
            if i >= 2:
                times[who].append(taken)
    grads = {who: gradient(layer, cell, x, pressure) for who, layer in layers.items()}
    exact = gradient(Ours(cell, tol / 100, 10 * STEPS, 1e-6), cell, x, pressure)
    print(f"{name}, tolerance {tol:g}")
    for who, layer in layers.items():
        off = ((grads[who] - exact).norm() / exact.norm()).item()
        print(f"  {who}: {layer.report()}; gradient off by {off:.1e}")
    for what in ("forward", "backward", "both", "wall"):
        ours, theirs = ([t[what] for t in times[who]] for who in layers)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"  {what:8s} equigrad {statistics.median(ours):7.1f} ms, torchdeq "
            f"{statistics.median(theirs):7.1f} ms, ratio {ratio:.2f}"
        )


def peak(steps: int) -> float:
    """Most memory in use, in MiB beyond what there was, of a forward and a backward pass."""
    torch.manual_seed(0)
    layer, x = Ours(Convolutional(), None, steps), torch.randn(32, 32, 16, 16)
    layer(x).sum().backward()  # .grad is there, and whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).sum().backward()
    used = most = 0
    events = profiler.profiler.kineto_results.events()  # pyright: ignore
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, used)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    for name in CASES:
        compare(name, words.rounds)
    for steps in (10, 40, 160):
        print(f"peak memory of the conv cell, {steps} steps: {peak(steps):.1f} MiB")


if __name__ == "__main__":
    main()
