"""Which controlled phases settle, how fast, and how right they are: the docs' table.

The feed-forward network of a run of `equigrad run equilibrium`, on 200 of the images that its
training held out, in two batches. A gradient is compared with that of dynamic inversion settled to
1e-6 in float64, which is the exact one of the same relaxed outer loss.

    python benchmarks/controlled_phases.py RUN [--strength 0.1] [--threads 1]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

import equigrad as eg
from equigrad.experiments.runs.model import load_model
from equigrad.experiments.settling.equilibrium import Equilibrium, Job
from equigrad.problems import Params

SIZE, BATCHES = 100, 2
SWEEPS = eg.Picard(tol=1e-5, max_steps=10)
EXACT = eg.Anderson(tol=1e-6, history=20, max_steps=3000)

Start = Literal["free", "params"]

SOLVERS: dict[str, tuple[eg.Solver, Sequence[Start]]] = {
    "`Anderson(tol=0.3, damping=0.5, max_steps=30)`": (
        eg.Anderson(tol=0.3, damping=0.5, max_steps=30),
        ("params", "free"),
    ),
    "`Anderson(damping=0.3)`": (
        eg.Anderson(tol=0.03, damping=0.3, max_steps=60),
        ("params", "free"),
    ),
    "`Anderson(damping=0.3, history=10)`": (
        eg.Anderson(tol=0.03, damping=0.3, history=10, max_steps=60),
        ("free",),
    ),
    "`Anderson()`": (eg.Anderson(tol=0.03, max_steps=60), ("free",)),
    "`Broyden()`": (eg.Broyden(tol=0.03, max_steps=60), ("params", "free")),
    "`GradientDescent(lr=0.1, momentum=0.8)`": (
        eg.GradientDescent(lr=0.1, momentum=0.8, tol=0.03, max_steps=60, check_every=1),
        ("params", "free"),
    ),
    "`Picard(damping=0.1)`": (eg.Picard(tol=0.03, damping=0.1, max_steps=100), ("free",)),
    "`GradientFlow(dt=0.03)`": (eg.GradientFlow(tol=0.03, dt=0.03, max_steps=300), ("free",)),
}


def gradient(
    job: Job, x: Tensor, y: Tensor, estimator: eg.Estimator, dtype: torch.dtype = torch.float32
) -> tuple[eg.MetaGradient, Tensor]:
    """The result, and its gradients as a vector."""
    network = job.network
    meta = {name: p.detach().to(dtype) for name, p in network.named_parameters()}
    start = {name: p.to(dtype) for name, p in network.start(x).items()}  # pyright: ignore
    problem = network.problem(x.to(dtype), y)  # pyright: ignore
    result = eg.meta_gradient(problem, start, meta, solver=SWEEPS, estimator=estimator)
    return result, torch.cat([g.double().flatten() for g in result.grads.values()])


def controlled(controller: eg.controllers.Controller, start: Start = "free") -> eg.LeastControl:
    """The estimator."""
    return eg.LeastControl(controller=controller, start=start)


def curvature(job: Job, x: Tensor, y: Tensor, at: Params, strength: float) -> Tensor:
    """The largest curvature of the energy for every sample, where it settled.

    The spectral radius of a gradient step is that less 1, where it is above 2.
    """
    problem = job.network.problem(x.double(), y)  # pyright: ignore
    meta = {name: p.detach().double() for name, p in job.network.named_parameters()}

    def step(params: Params, meta_params: Params) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaves = {n: p if p.requires_grad else p.requires_grad_() for n, p in params.items()}
            image = problem.map(leaves, meta_params)
            squares = torch.stack([(p - image[n]).square().sum() for n, p in leaves.items()]).sum()
            energy = 0.5 * squares + strength * problem.outer_loss(leaves, meta_params)
            moves = torch.autograd.grad(energy, list(leaves.values()), create_graph=True)
        return {n: p - m for (n, p), m in zip(leaves.items(), moves, strict=True)}

    descent = replace(problem, map=step)
    return eg.spectral_radius(descent, at, meta) + 1


def row(
    job: Job, batches: list[tuple[Tensor, Tensor]], exact: list[Tensor], estimator: eg.LeastControl
) -> str:
    """Settled samples, steps, milliseconds, and the error of the gradient."""
    settled, steps, seconds, errors = 0, [], [], []
    for (x, y), expected in zip(batches, exact, strict=True):
        began = time.perf_counter()
        result, found = gradient(job, x, y, estimator)
        seconds.append(time.perf_counter() - began)
        phase = result.phases[-1]
        settled += len(x) - len(phase.unsettled)
        steps.append(phase.steps)
        errors.append(((found - expected).norm() / expected.norm()).item())
    share = 100 * settled / (SIZE * BATCHES)
    return (
        f"{share:.1f} | {fmean(steps):.0f} | {1e3 * fmean(seconds):.0f} | {100 * fmean(errors):.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    job = Job(Equilibrium.preset(setting="feed-forward", method="energy-inversion"))
    job.network.load_state_dict(load_model(words.run).params)
    x, y = (part[: SIZE * BATCHES] for part in job.data.validation)
    batches = list(zip(x.split(SIZE), y.split(SIZE), strict=True))
    strength = words.strength
    inversion = eg.DynamicInversion(gain=strength, leak=1.0, solver=EXACT)
    tight = [gradient(job, x, y, controlled(inversion), torch.float64) for x, y in batches]
    exact = [found for _, found in tight]
    # the controlled state, which is that of the phase where it is the only one
    at, _ = gradient(job, *batches[0], controlled(inversion, "params"), torch.float64)
    largest = curvature(job, *batches[0], at.params, strength)
    norms = [
        f"{torch.linalg.matrix_norm(p, 2):.1f}" for p in job.network.parameters() if p.ndim > 1
    ]
    print(f"Spectral norms of the weights: {', '.join(norms)}.")
    print(f"Largest curvature: median {largest.median():.1f}, maximum {largest.max():.1f}.\n")
    print("| controller | solver | start | settled, % | steps | ms | error, % |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    preset = eg.Anderson(tol=0.03, max_steps=30)
    for start in ("params", "free"):
        estimator = controlled(replace(inversion, solver=preset), start)
        print(f"| dynamic | `Anderson()` | {start} | {row(job, batches, exact, estimator)} |")
    for name, (solver, starts) in SOLVERS.items():
        for start in starts:
            controller = eg.EnergyInversion(gain=strength, leak=1.0, solver=solver)
            found = row(job, batches, exact, controlled(controller, start))
            print(f"| energy | {name} | {start} | {found} |", flush=True)


if __name__ == "__main__":
    main()
