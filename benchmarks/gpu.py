"""What a GPU makes of equigrad: the same numbers as a CPU, and how fast.

Every estimator and an equilibrium layer on CUDA against the CPU in float64; CUDA graphs against
eager steps; a step of three small networks eagerly, as a graph and by torch's compiler, beside a
naive loop that is captured by hand and a `lax.scan` of JAX where it is installed; meta-steps of
Omniglot at the paper's setting (random images: only time is measured) by method, nudge, precision
and way of computing; two processes by nccl where there are two cards. Without a card it checks what
a CPU can and says so.

    python benchmarks/gpu.py [--parts correct graphs steps omniglot nccl] [--rounds 3]
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import equigrad as eg
from equigrad.errors import EquigradError
from equigrad.estimators import ESTIMATORS
from equigrad.evaluation import Evaluation
from equigrad.nn import ComplexSynapse, LearnedStart, Modulation, conv4
from equigrad.nn.side_by_side import Batching
from equigrad.tasks import FewShotLearner, TaskBatch

LR, MOMENTUM, STEPS = 0.01, 0.9, 1000
CUDA = torch.cuda.is_available()
Problem = tuple[Any, dict[str, Tensor], dict[str, Tensor], Any]


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def ridge(device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(60, 20, generator=generator).double().to(device) for _ in range(2))
    y, w = (torch.randn(60, generator=generator).double().to(device) for _ in range(2))
    problem = eg.Bilevel(
        lambda p, m: mse_loss(x @ p["w"], y) + (m["log_strength"].exp() * p["w"] ** 2).sum(),
        lambda p, m: mse_loss(v @ p["w"], w),
    )
    params = {"w": torch.zeros(20).double().to(device)}
    return (
        problem,
        params,
        {"log_strength": torch.full((20,), -1.0).double().to(device)},
        eg.GradientDescent(lr=0.1, max_steps=4000, tol=1e-13),
    )


def settling_map(device: str) -> Problem:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(12, 12, generator=generator).double().to(device) / 8 for _ in range(2))
    x = torch.randn(5, 12, generator=generator).double().to(device)
    problem = eg.FixedPoint(
        lambda p, m: {"h": torch.tanh(p["h"] @ m["a"] + x @ b)},
        lambda p, m: p["h"].square().mean(),
    )
    start = {"h": torch.zeros(5, 12).double().to(device)}
    return problem, start, {"a": a}, eg.Picard(max_steps=1000, tol=1e-13)


def learned_start(device: str) -> Problem:
    problem, params, meta, _ = ridge(device)
    start = {name: p.clone().requires_grad_() for name, p in params.items()}
    inner = eg.Bilevel(
        lambda p, m: problem.inner_loss(p, meta), lambda p, m: problem.outer_loss(p, meta)
    )
    return inner, start, start, eg.GradientDescent(lr=0.1, max_steps=5)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest relative distance of two sets of tensors."""
    return max(
        ((a.cpu() - b.cpu()).norm() / b.cpu().norm().clamp_min(1e-300)).item()
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def correct() -> None:
    print("\n## The same numbers: CUDA against the CPU, float64\n")
    print("| estimator | problem | relative distance |\n| --- | --- | ---: |")
    worst = 0.0
    for kind in ESTIMATORS:
        for make in (ridge, settling_map, learned_start):
            found = []
            for device in ("cpu", "cuda") if CUDA else ("cpu", "cpu"):
                torch.manual_seed(0)
                problem, params, meta, solver = make(device)
                try:
                    result = eg.meta_gradient(
                        problem, params, meta, solver=solver, estimator=kind()
                    )
                except EquigradError:
                    break  # says itself that it does not serve this problem
                except RuntimeError as error:
                    said = str(error).splitlines()[0][:60]
                    print(f"| {kind.__name__} | {make.__name__}, {device} | raw error: {said} |")
                    break
                found.append(result.grads)
            if len(found) == 2:
                off = apart(found[1], found[0])
                random = kind in (eg.EvolutionStrategies, eg.Nystrom)
                worst = worst if random else max(worst, off)
                said = " (draws other numbers on another device)" if random else ""
                print(f"| {kind.__name__} | {make.__name__} | {off:.1e}{said} |")
    layer = equilibrium_layer()
    print(f"| EquilibriumLayer | gradient of its weights | {layer:.1e} |")
    print(f"\nWorst: {max(worst, layer):.1e}")


def equilibrium_layer() -> float:
    found = []
    for device in ("cpu", "cuda") if CUDA else ("cpu", "cpu"):
        torch.manual_seed(0)
        cell = nn.RNNCell(8, 8).double()
        with torch.no_grad():
            for p in cell.parameters():
                p.mul_(0.5)
        layer = eg.nn.EquilibriumLayer(
            cell_of(cell), solver=eg.Picard(max_steps=500, tol=1e-13)
        ).to(device)
        x = torch.randn(4, 8, dtype=torch.float64).to(device)
        layer(x).square().sum().backward()
        found.append({n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
    return apart(found[1], found[0])


def cell_of(cell: nn.RNNCell) -> nn.Module:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, h: Tensor, x: Tensor) -> Tensor:
            return self.cell(x, h)

    return Cell()


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    def mlp(*widths: int) -> nn.Module:
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    yield "13-20-1, 354 rows", mlp(13, 20, 1), (354, 13)
    yield "784-256×5-10, batch 10", mlp(784, *[256] * 5, 10), (10, 784)
    yield "784-256×5-10, batch 500", mlp(784, *[256] * 5, 10), (500, 784)


def more_networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    yield from networks()
    yield (
        "convolutions, layer norm",
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.LayerNorm(8 * 49),
            nn.Linear(8 * 49, 10),
        ),
        (20, 1, 14, 14),
    )
    attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    yield "a transformer layer", attention, (4, 7, 16)


def learner(
    net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[eg.Bilevel, ComplexSynapse]:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    synapse = ComplexSynapse(net.to(device, dtype), strength=0.01)
    with torch.no_grad():
        outputs = net(x)
    y = torch.randn(outputs.shape, generator=generator).to(device, dtype)
    problem = eg.Bilevel(
        lambda p, m: mse_loss(synapse(p, x), y),
        lambda p, m: mse_loss(synapse(p, v), y),
        regularizer=synapse,
    )
    return problem, synapse


def graphs() -> None:
    print("\n## CUDA graphs against eager steps, float64, 95 free and 2 × 95 nudged steps\n")
    if not CUDA:
        print("No card: not checked.")
        return
    print("| learner | params | meta-gradient |\n| --- | ---: | ---: |")
    for name, net, shape in more_networks():
        torch.manual_seed(0)
        problem, synapse = learner(net, shape, torch.float64, "cuda")
        found = []
        for way in (False, "graph"):
            solver = eg.GradientDescent(
                lr=LR, momentum=MOMENTUM, nesterov=True, max_steps=95, compile=way
            )
            found.append(
                eg.meta_gradient(
                    problem,
                    synapse.params(),
                    synapse.meta_params(),
                    solver=solver,
                    estimator=eg.Contrastive(beta=0.1, scheme="symmetric"),
                )
            )
        eager, graph = found
        print(
            f"| {name} | {apart(graph.params, eager.params):.1e} "
            f"| {apart(graph.grads, eager.grads):.1e} |"
        )


def naive(net: nn.Module, shape: tuple[int, ...], device: str) -> Callable[[], float]:
    """Seconds a step of a loop written by hand: autograd, penalty, Nesterov; captured on a GPU."""
    x = torch.randn(shape, device=device)
    y = torch.randn_like(net(x))
    leaves = [p.detach().clone().requires_grad_() for p in net.parameters()]
    names = [n for n, _ in net.named_parameters()]
    momentum = [torch.zeros_like(p, requires_grad=False) for p in leaves]

    def step() -> None:
        out = torch.func.functional_call(net, dict(zip(names, leaves, strict=True)), (x,))
        grads = torch.autograd.grad(mse_loss(out, y), leaves)
        with torch.no_grad():
            grads = torch._foreach_add(grads, leaves, alpha=0.01)
            torch._foreach_mul_(momentum, MOMENTUM)
            torch._foreach_add_(momentum, grads)
            torch._foreach_add_(leaves, grads, alpha=-LR)
            torch._foreach_add_(leaves, momentum, alpha=-LR * MOMENTUM)

    run = step
    if CUDA:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay

    def seconds() -> float:
        began = now()
        for _ in range(STEPS):
            run()
        return (now() - began) / STEPS

    return seconds


def scan(net: nn.Module, shape: tuple[int, ...]) -> Callable[[], float] | None:
    """The same loop as a jitted `lax.scan`; None without JAX."""
    try:
        import jax  # pyright: ignore[reportMissingImports]
        import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    params = [jnp.asarray(p.detach().cpu().numpy()) for p in net.parameters()]
    x = jnp.asarray(torch.randn(shape).numpy())
    y = jnp.zeros((shape[0], len(params[-1])))

    def loss(params: Any) -> Any:
        h = x
        for i in range(0, len(params), 2):
            h = h @ params[i].T + params[i + 1]
            h = jnp.tanh(h) if i + 2 < len(params) else h
        return ((h - y) ** 2).mean() + 0.005 * sum((p**2).sum() for p in params)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, buffers = carry
        gradients = jax.grad(loss)(params)
        buffers = [MOMENTUM * m + g for m, g in zip(buffers, gradients, strict=True)]
        moved = [
            p - LR * (g + MOMENTUM * m) for p, g, m in zip(params, gradients, buffers, strict=True)
        ]
        return (moved, buffers), None

    loop = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=STEPS)[0])
    carry = (params, [jnp.zeros_like(p) for p in params])
    jax.block_until_ready(loop(carry))

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop(carry))
        return (time.perf_counter() - began) / STEPS

    return seconds


def ours(
    net: nn.Module, shape: tuple[int, ...], device: str, way: Any, every: int
) -> Callable[[], float]:
    problem, synapse = learner(net, shape, torch.float32, device)
    solver = eg.GradientDescent(
        lr=LR,
        momentum=MOMENTUM,
        nesterov=True,
        max_steps=STEPS,
        compile=way,
        check_every=every,
    )

    def seconds() -> float:
        with Evaluation(problem, synapse.params(), synapse.meta_params()) as evaluation:
            began = now()
            evaluation.settle(solver)
            return (now() - began) / STEPS

    return seconds


def steps(rounds: int) -> None:
    device = "cuda" if CUDA else "cpu"
    print(f"\n## A Nesterov step, µs, {STEPS} steps of a free phase, float32, least of {rounds}\n")
    ways: dict[str, tuple[Any, int]] = {"eager": (False, 10)}
    if CUDA:
        ways |= {"graph": ("graph", 10), "compiler and graph": ("inductor", 10)}
    print("| learner | way | µs | first call, s | / naive | / jax |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, net, shape in networks():
        net = net.to(device)
        contenders: dict[str, Callable[[], float]] = {
            way: ours(net, shape, device, *how) for way, how in ways.items()
        }
        contenders["naive, captured" if CUDA else "naive"] = naive(net, shape, device)
        if (jitted := scan(net, shape)) is not None:
            contenders["jax scan"] = jitted
        first: dict[str, float] = {}
        for way, run in contenders.items():
            began = now()
            run()
            first[way] = now() - began
        taken = {way: min(run() for _ in range(rounds)) for way, run in contenders.items()}
        hand = taken["naive, captured" if CUDA else "naive"]
        jax_took = taken.get("jax scan")
        for way, took in taken.items():
            beside = "–" if jax_took is None else f"{took / jax_took:.2f}"
            print(
                f"| {name} | {way} | {1e6 * took:.0f} | {first[way]:.1f} | {took / hand:.2f} "
                f"| {beside} |",
                flush=True,
            )


def omniglot(rounds: int) -> None:
    scale = (32, 15, 64, 200) if CUDA else (2, 2, 4, 10)
    tasks, queries, filters, free = scale
    device = "cuda" if CUDA else "cpu"
    print(f"\n## A meta-step of 5-way 1-shot: {tasks} tasks, {filters} filters, {free} steps\n")
    torch.manual_seed(0)
    x, v = (torch.rand(tasks, 5 * each, 1, 28, 28, device=device) for each in (1, queries))
    y = torch.arange(5, device=device)[None].expand(tasks, -1)
    batch = TaskBatch((x, y), (v, y.repeat(1, queries)))
    net = conv4(filters=filters, outputs=5, pooling=True).to(device)
    solver = eg.GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=free)
    models = {
        "modulation": Modulation(net),
        "synaptic": ComplexSynapse(net, 0.1, center="init", learn=("center",)),
        "MAML, 5 steps": LearnedStart(net),
    }
    cells: list[tuple[str, str, Batching, bool, Any]] = []
    graphed = ("graph", "inductor") if CUDA else ()
    for nudge in ("loss", "force"):
        for tf32 in (False, True):
            for way in (False, *graphed):
                cells.append(("modulation", nudge, "grouped", tf32, way))
    for nudge in ("loss", "force"):
        for way in (False, "graph") if CUDA else (False,):
            cells.append(("synaptic", nudge, "grouped", True, way))
    cells.append(("MAML, 5 steps", "–", "grouped", True, False))
    print("| model | nudge | batching | TF32 | steps | seconds | first, s | cosine to fp32 eager |")
    print("| --- | --- | --- | --- | --- | ---: | ---: | ---: |")
    reference: dict[tuple[str, str], Tensor] = {}
    ways = {False: "eager", "graph": "graph", "inductor": "compiler and graph"}
    for name, nudge, batching, tf32, way in cells:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        steps = 50 if name == "modulation" else 100
        rule: Any = eg.MAML()
        if nudge != "–":
            rule = eg.Contrastive(
                beta=0.1,
                scheme="symmetric",
                matched=False,
                nudge=nudge,  # pyright: ignore[reportArgumentType]
                nudged_solver=replace(solver, max_steps=min(steps, free), compile=way),
            )
        few = FewShotLearner(
            model=models[name],
            loss=cross_entropy,
            solver=replace(solver, max_steps=5, compile=False)
            if nudge == "–"
            else replace(solver, compile=way),
            estimator=rule,
            batching=batching,
        )
        meta = models[name].meta_params()
        times = []
        grads: dict[str, Tensor] = {}
        try:
            for _ in range(1 + rounds):
                began = now()
                grads = few.meta_gradient(meta, batch).grads
                times.append(now() - began)
        except (EquigradError, RuntimeError) as error:
            said = str(error).splitlines()[0][:80]
            print(
                f"| {name} | {nudge} | {batching} | {'yes' if tf32 else 'no'} | {ways[way]} "
                f"| {said} | | |"
            )
            continue
        flat = torch.cat([g.flatten() for g in grads.values()])
        known = reference.setdefault((name, nudge), flat)
        cosine = torch.cosine_similarity(known, flat, dim=0).item()
        print(
            f"| {name} | {nudge} | {batching} | {'yes' if tf32 else 'no'} | {ways[way]} "
            f"| {statistics.median(times[1:]):.3f} | {times[0]:.1f} | {cosine:.4f} |",
            flush=True,
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def nccl() -> None:
    print("\n## Two processes by nccl\n")
    cards = torch.cuda.device_count()
    print(f"{cards} card{'s' if cards != 1 else ''}: not run." if cards < 2 else "Not built yet.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("correct", "graphs", "steps", "omniglot", "nccl")
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    card = torch.cuda.get_device_name() if CUDA else f"no card, {os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {card}")
    began = time.perf_counter()
    if not CUDA:
        print("Without a card the CPU stands in for it: times and distances say nothing of CUDA.")
    parts: dict[str, Callable[[], None]] = {
        "correct": correct,
        "graphs": graphs,
        "steps": lambda: steps(arguments.rounds),
        "omniglot": lambda: omniglot(arguments.rounds),
        "nccl": nccl,
    }
    for part in arguments.parts:
        parts[part]()
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
