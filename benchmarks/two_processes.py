"""Examples per second of two processes over one: a small convolutional network, bound by compute.

Every process has one thread and its own batch, so that two of them see twice the examples at each
step. Measured in turn, one and two, a few times; the fastest of each counts. Nothing else should be
running, and the machine needs two cores.

    python benchmarks/two_processes.py
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.problems import Params


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 32, 32):
        layers += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def work(rank: int, size: int, meet: str, batch: int, steps: int, found: Any) -> None:
    """One process: seconds and gradient evaluations of one meta-gradient, after one to warm up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    net = network()

    def inner(params: Params, meta: Params) -> Tensor:
        decay = sum(p.square().sum() for p in params.values())
        return (
            cross_entropy(functional_call(net, dict(params), (x,)), y) + meta["decay"].exp() * decay
        )

    def outer(params: Params, meta: Params) -> Tensor:
        return cross_entropy(functional_call(net, dict(params), (x,)), y)

    problem = eg.Bilevel(inner, outer, group=dist.group.WORLD)
    params = {name: p.detach() for name, p in net.named_parameters()}
    theta = {"decay": torch.tensor(-5.0)}
    for number in (2, steps):
        solver = eg.GradientDescent(lr=0.05, momentum=0.9, max_steps=number)
        dist.barrier()
        began = time.perf_counter()
        result = eg.meta_gradient(
            problem, params, theta, solver=solver, estimator=eg.Contrastive(beta=0.1, error=False)
        )
        seconds = time.perf_counter() - began
    if rank == 0:
        found["rate"] = size * batch * result.gradient_evaluations / seconds
    dist.destroy_process_group()


def rate(size: int, batch: int, steps: int) -> float:
    """Examples per second of so many processes, each gradient of a batch counted."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        found = manager.dict()
        arguments = (size, str(Path(folder) / "meet"), batch, steps, found)
        started = [context.Process(target=work, args=(rank, *arguments)) for rank in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit("a process failed; its error is above")
        return float(found["rate"])


def main() -> None:
    """Print the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128, help="examples of each process")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    pairs = [
        (rate(1, given.batch, given.steps), rate(2, given.batch, given.steps))
        for _ in range(given.repeats)
    ]
    one, two = (max(rates) for rates in zip(*pairs, strict=True))
    print(f"one process   {one:9.0f} examples per second")
    print(f"two processes {two:9.0f} examples per second, {two / one:.2f} times as many")


if __name__ == "__main__":
    main()
