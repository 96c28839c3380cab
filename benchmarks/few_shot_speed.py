"""Seconds of a meta-step of few-shot learning: equigrad beside higher, TorchOpt and learn2learn.

Four tasks, 5-way 1-shot with 15 queries a class, the network of four convolutional blocks with
max-pooling and batch statistics, T inner steps, in interleaved rounds. Everything computes the same
meta-gradient, which is checked to 1e-9 in float64 with few filters, and to 1e-2 in float32 where it
is timed; a library that is not installed is said to be missing. `bare` is the gradient evaluations
of first-order MAML alone, T on the support set and one on the query set, task after task in plain
torch. The contrastive rule, with a centre for every weight, settles T steps freely and two nudged
phases of ten.

    python benchmarks/few_shot_speed.py [--rounds 5] [--steps 1 5 20] [--filters 64] [--clock wall]

`--batchings` compares how equigrad computes tasks side by side instead.
`--clock cpu` counts the processor's time instead, for a machine that others compute on.
Freed memory is kept, for all contenders alike; `--memory returned` leaves it to the C library.
"""

import argparse
import copy
import importlib
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.estimators import Estimator
from equigrad.freed_memory import keep_freed_memory
from equigrad.nn import ComplexSynapse, LearnedStart, conv4
from equigrad.nn.side_by_side import Batching
from equigrad.tasks import FewShotLearner, TaskBatch

TASKS, WAY, QUERIES, LR, NUDGED, OUTER = 4, 5, 15, 0.1, 10, 1e-3

PEERS = "higher", "torchopt", "learn2learn"

Gradient = Callable[[], list[Tensor]]


class Job:
    """The tasks, the network, and every way to its meta-gradient.

    Args:
        filters: of each convolution.
        steps: inner steps T.
        dtype: of everything.
    """

    def __init__(self, filters: int, steps: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.steps = steps
        self.net = conv4(filters=filters, outputs=WAY).to(dtype)
        patterns = torch.rand(TASKS, WAY, 1, 28, 28)

        def examples(each: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(WAY).repeat(each).expand(TASKS, -1)
            x = torch.stack([p[labels] for p, labels in zip(patterns, y, strict=True)])
            return x + 0.3 * torch.randn_like(x), y

        self.batch = TaskBatch(examples(1), examples(QUERIES)).to(dtype=dtype)

    def _tasks(self) -> list[tuple[Tensor, ...]]:
        (x, y), (v, w) = self.batch.support, self.batch.query
        return list(zip(x, y, v, w, strict=True))

    def contenders(self, first_order: bool) -> dict[str, Gradient]:
        """By the library's name; those that are there."""
        estimator = eg.FirstOrderMAML() if first_order else eg.MAML()
        found: dict[str, Gradient] = {"equigrad": self.equigrad(estimator)}
        for name, make in (
            ("higher", self._higher),
            ("torchopt", self._torchopt),
            ("learn2learn", self._learn2learn),
        ):
            if (library := imported(name)) is not None:
                found[name] = make(library, first_order)
        if first_order:
            found["bare"] = self._bare()
        return found

    def batchings(self, first_order: bool) -> dict[str, Gradient]:
        """Its own gradients, by how tasks are computed side by side."""
        estimator = eg.FirstOrderMAML() if first_order else eg.MAML()
        return {batching: self.equigrad(estimator, batching) for batching in get_args(Batching)}

    def equigrad(
        self, estimator: Estimator, batching: Batching = "auto", chunk_size: int | None = None
    ) -> Gradient:
        """The learner of tasks, which chooses how to compute them side by side."""
        contrastive = isinstance(estimator, eg.Contrastive)
        learner = FewShotLearner(
            model=ComplexSynapse(self.net, 0.1, center="init", learn=("center",))
            if contrastive
            else LearnedStart(self.net),
            loss=cross_entropy,
            solver=eg.GradientDescent(lr=LR, max_steps=self.steps),
            estimator=estimator,
            batching=batching,
            chunk_size=chunk_size,
        )
        meta_params = learner.model.meta_params()
        return lambda: list(learner.meta_gradient(meta_params, self.batch).grads.values())

    def _higher(self, higher: Any, first_order: bool) -> Gradient:
        net = copy.deepcopy(self.net)
        params = list(net.parameters())

        def gradient() -> list[Tensor]:
            net.zero_grad()
            optimizer = torch.optim.SGD(params, lr=LR)
            for x, y, v, w in self._tasks():
                with higher.innerloop_ctx(
                    net, optimizer, copy_initial_weights=False, track_higher_grads=not first_order
                ) as (fast, inner):
                    for _ in range(self.steps):
                        inner.step(cross_entropy(fast(x), y))
                    loss = cross_entropy(fast(v), w) / TASKS
                    if first_order:  # its steps are no part of a graph: the end for the start
                        grads = torch.autograd.grad(loss, list(fast.parameters()))
                        for p, g in zip(params, grads, strict=True):
                            p.grad = g if p.grad is None else p.grad + g
                    else:
                        loss.backward()
            return [p.grad.clone() for p in params if p.grad is not None]

        return gradient

    def _torchopt(self, torchopt: Any, first_order: bool) -> Gradient:
        net = copy.deepcopy(self.net)
        params = list(net.parameters())

        def gradient() -> list[Tensor]:
            net.zero_grad()
            inner = torchopt.MetaSGD(net, lr=LR)
            start = torchopt.extract_state_dict(net, by="reference")
            inner_start = torchopt.extract_state_dict(inner, by="reference")
            for x, y, v, w in self._tasks():
                for _ in range(self.steps):
                    inner.step(cross_entropy(net(x), y))
                (cross_entropy(net(v), w) / TASKS).backward()
                torchopt.recover_state_dict(net, start)
                torchopt.recover_state_dict(inner, inner_start)
            return [p.grad.clone() for p in params if p.grad is not None]

        def first_order_gradient() -> list[Tensor]:
            start = {n: p.detach() for n, p in net.named_parameters()}
            total = [torch.zeros_like(p) for p in start.values()]
            rule = torchopt.sgd(lr=LR)
            for x, y, v, w in self._tasks():
                fast, state = [p.clone().requires_grad_() for p in start.values()], None
                state = rule.init(tuple(fast))
                for _ in range(self.steps):
                    loss = cross_entropy(call(net, start, fast, x), y)
                    grads = torch.autograd.grad(loss, fast)
                    updates, state = rule.update(grads, state)
                    moved = torchopt.apply_updates(tuple(fast), updates)
                    fast = [p.detach().requires_grad_() for p in moved]
                loss = cross_entropy(call(net, start, fast, v), w) / TASKS
                torch._foreach_add_(total, torch.autograd.grad(loss, fast))
            return total

        return first_order_gradient if first_order else gradient

    def _learn2learn(self, learn2learn: Any, first_order: bool) -> Gradient:
        net = learn2learn.algorithms.MAML(copy.deepcopy(self.net), lr=LR, first_order=first_order)

        def gradient() -> list[Tensor]:
            net.zero_grad()
            for x, y, v, w in self._tasks():
                fast = net.clone()
                for _ in range(self.steps):
                    fast.adapt(cross_entropy(fast(x), y))
                (cross_entropy(fast(v), w) / TASKS).backward()
            return [p.grad.clone() for p in net.parameters() if p.grad is not None]

        return gradient

    def _bare(self) -> Gradient:
        net = copy.deepcopy(self.net)
        params: list[Tensor] = list(net.parameters())

        def gradient() -> list[Tensor]:
            total = [torch.zeros_like(p) for p in params]
            start = [p.detach().clone() for p in params]
            for x, y, v, w in self._tasks():
                for _ in range(self.steps):
                    grads = torch.autograd.grad(cross_entropy(net(x), y), params)
                    with torch.no_grad():
                        torch._foreach_add_(params, grads, alpha=-LR)
                loss = cross_entropy(net(v), w) / TASKS
                torch._foreach_add_(total, torch.autograd.grad(loss, params))
                with torch.no_grad():
                    torch._foreach_copy_(params, start)
            return total

        return gradient


def call(net: nn.Module, names: dict[str, Tensor], values: list[Tensor], x: Tensor) -> Tensor:
    return functional_call(net, dict(zip(names, values, strict=True)), (x,))


def imported(name: str) -> Any:
    """A library, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def check(contenders: dict[str, Gradient], what: str, tolerance: float) -> None:
    """Whether all meta-gradients agree, relative to the size of the whole."""
    reference = next(iter(contenders.values()))()
    size = torch.stack([r.norm() for r in reference]).norm()
    for name, run in contenders.items():
        apart = [(f - r).norm() for f, r in zip(run(), reference, strict=True)]
        if not (error := torch.stack(apart).norm() / size) < tolerance:
            raise SystemExit(f"{name} computes another {what}: relative difference {error:.2g}")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    contenders: dict[str, Gradient], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every round, the contenders in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--batchings", action="store_true")
    parser.add_argument("--memory", choices=["kept", "returned"], default="kept")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory == "kept" and not keep_freed_memory():
        raise SystemExit("this C library keeps no freed memory on request; use --memory returned")
    rounds, clock = arguments.rounds, CLOCKS[arguments.clock]
    versions = []
    for name in PEERS:
        there = imported(name) is not None
        versions.append(f"{name} {importlib.metadata.version(name) if there else 'not installed'}")
    print(f"torch {torch.__version__}, {', '.join(versions)}")
    print(f"float32, threads: {arguments.threads}, load {os.getloadavg()[0]:.1f}", end=", ")
    print(f"freed memory {arguments.memory}", end="; ")
    print(f"best (median) of {rounds} interleaved rounds, {arguments.clock} seconds\n")
    names = ["equigrad", *PEERS, "bare"]
    if arguments.batchings:
        names = list(get_args(Batching))
    print(
        "| a meta-step | T | "
        + " | ".join(names)
        + (" |" if arguments.batchings else " | equigrad / best peer |")
    )
    print("| --- | ---: |" + " ---: |" * (len(names) + (not arguments.batchings)))
    for steps in arguments.steps:
        job = Job(arguments.filters, steps, torch.float32)
        small = Job(8, steps, torch.float64)
        for title, first_order in (("MAML", False), ("first-order MAML", True)):
            contenders = (
                job.batchings(first_order) if arguments.batchings else job.contenders(first_order)
            )
            what = f"meta-gradient, {title}, T = {steps}"
            if not arguments.batchings:
                check(small.contenders(first_order), what, 1e-9)
            check(contenders, what, 1e-2)  # rounding in float32 grows with the steps
            report(title, steps, names, measure(contenders, rounds, clock))
        if steps > 1 and not arguments.batchings:
            nudged = eg.GradientDescent(lr=LR, max_steps=NUDGED)
            rule = eg.Contrastive(beta=0.1, nudge="loss", nudged_solver=nudged, error=False)
            contrastive = {"equigrad": job.equigrad(rule)}
            contrastive["equigrad"]()
            report(
                f"contrastive, 2 × {NUDGED} nudged",
                steps,
                names,
                measure(contrastive, rounds, clock),
            )


def report(title: str, steps: int, names: list[str], seconds: dict[str, list[float]]) -> None:
    """A row of the table."""
    cells = [
        f"{min(seconds[n]):.2f} ({statistics.median(seconds[n]):.2f})" if n in seconds else "–"
        for n in names
    ]
    peers = [min(s) for n, s in seconds.items() if n in PEERS]
    if "equigrad" in seconds:
        cells.append(f"{min(seconds['equigrad']) / min(peers):.2f}" if peers else "–")
    print(f"| {title} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
