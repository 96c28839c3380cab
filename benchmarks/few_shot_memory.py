"""Peak memory of a meta-gradient of few-shot learning, by its inner steps T.

One task of 5 ways with 15 queries a class, the network of four convolutional blocks with
max-pooling and batch statistics, float32. The most megabytes that a process held while it computed
one meta-gradient, each in a process of its own, beyond what the same took with one filter and one
step, which is Python, torch and its kernels: the contrastive rule with a centre for
every weight, and MAML, which unrolls, with the graph of all steps or of about √T at a time.

    python benchmarks/few_shot_memory.py [--steps 50 200 800] [--unrolled 50 200] [--shot 1]

`--beside 1 5 20` is MAML on the four tasks of `few_shot_speed.py` instead, in so many steps: all at
once, two or one at a time (`chunk_size`), and beside the libraries that are installed, which take
one task after the other.
"""

import argparse
import math
import os
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.estimators import Estimator
from equigrad.experiments.theory.accuracy import peak_memory
from equigrad.nn import ComplexSynapse, LearnedStart, conv4
from equigrad.tasks import FewShotLearner, TaskBatch
from few_shot_speed import PEERS, Job, imported

WAY, QUERIES, LR, NUDGED = 5, 15, 0.01, 10


def contrastive(steps: int) -> Estimator:
    nudged = eg.GradientDescent(lr=LR, max_steps=NUDGED)
    return eg.Contrastive(beta=0.1, nudge="loss", nudged_solver=nudged, error=False)


def whole(steps: int) -> Estimator:
    return eg.MAML()


def segments(steps: int) -> Estimator:
    return eg.MAML(segment=math.isqrt(steps))


METHODS: dict[str, Callable[[int], Estimator]] = {
    f"contrastive, 2 × {NUDGED} nudged": contrastive,
    "MAML": whole,
    "MAML in segments": segments,
}


def meta_gradient(filters: int, shot: int, steps: int, estimator: Estimator) -> None:
    torch.manual_seed(0)
    net = conv4(filters=filters, outputs=WAY)
    y = torch.arange(WAY)[None]
    x, v = (torch.rand(1, WAY * each, 1, 28, 28) for each in (shot, QUERIES))
    learns_start = estimator.traits.needs_start
    learner = FewShotLearner(
        model=LearnedStart(net)
        if learns_start
        else ComplexSynapse(net, 0.1, center="init", learn=("center",)),
        loss=cross_entropy,
        solver=eg.GradientDescent(lr=LR, max_steps=steps),
        estimator=estimator,
        batching="loop",  # one task: nothing to choose, and measuring would take memory of its own
    )
    learner.meta_gradient(
        learner.model.meta_params(), TaskBatch((x, y.repeat(1, shot)), (v, y.repeat(1, QUERIES)))
    )


def beside(steps: list[int], rounds: int) -> None:
    """A table of MAML's memory for four tasks, here and in other libraries."""
    peers = [name for name in PEERS if imported(name) is not None]
    chunks = {"equigrad": None, "chunk_size=2": 2, "chunk_size=1": 1}
    print(f"| T | {' | '.join((*chunks, *peers))} |")
    print("| ---: |" + " ---: |" * len((*chunks, *peers)))

    def twice(filters: int, steps: int, name: str) -> None:
        job = Job(filters, steps, torch.float32)
        if name in chunks:
            gradient = job.equigrad(eg.MAML(), chunk_size=chunks[name])
        else:
            gradient = job.contenders(first_order=False)[name]
        for _ in range(2):  # the first also measures how tasks are computed side by side
            gradient()

    for number in steps:
        cells = []
        for name in (*chunks, *peers):
            found = [
                peak_memory(lambda: twice(64, number, name))  # noqa: B023
                - peak_memory(lambda: twice(1, 1, name))  # noqa: B023
                for _ in range(rounds)
            ]
            cells.append(f"{min(found):.0f}")
        print(f"| {number} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--unrolled", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--shot", type=int, default=1)
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--beside", type=int, nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.beside is not None:
        beside(arguments.beside, arguments.rounds)
        return
    filters, shot = arguments.filters, arguments.shot
    print(f"torch {torch.__version__}, {filters} filters, {shot}-shot, one thread, load", end=" ")
    print(f"{os.getloadavg()[0]:.1f}; least of {arguments.rounds} rounds\n")
    print("| a meta-gradient | T | memory, MB | seconds |\n| --- | ---: | ---: | ---: |")
    for name, make in METHODS.items():
        for steps in arguments.steps if make is contrastive else arguments.unrolled:
            beyond, seconds = [], []
            for _ in range(arguments.rounds):
                least = peak_memory(lambda: meta_gradient(1, shot, 1, make(1)))  # noqa: B023
                began = time.perf_counter()
                peak = peak_memory(lambda: meta_gradient(filters, shot, steps, make(steps)))  # noqa: B023
                seconds.append(time.perf_counter() - began)
                beyond.append(peak - least)
            print(f"| {name} | {steps} | {min(beyond):.0f} | {min(seconds):.1f} |", flush=True)


if __name__ == "__main__":
    main()
