"""The table of the README's first screen: what a meta-gradient costs, how wrong it is, what serves.

    python benchmarks/first_screen.py

The problem is the README's: a weight for each of 500 digits, half of them mislabelled. Errors are
relative to an exact solve in float64, times to a training without a meta-gradient by the same
solver. What serves a model without double backward is tried on a small attention network.
"""

import dataclasses
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.utils import shuffle
from torch.nn import functional

import equigrad as eg

STEPS = 2000
DESCENT = eg.GradientDescent(lr=2.0, momentum=0.9, nesterov=True, tol=1e-6, max_steps=STEPS)
RULES: dict[str, tuple[eg.Solver, eg.Estimator]] = {
    "unrolled (as higher, TorchOpt)": (
        dataclasses.replace(DESCENT, tol=None, max_steps=300),
        eg.Unrolled(),
    ),
    "conjugate gradients (as iMAML)": (DESCENT, eg.ConjugateGradient(products="autograd")),
    "T1–T2": (DESCENT, eg.T1T2(products="autograd")),
    "contrastive": (DESCENT, eg.Contrastive()),
    "contrastive, rtol=1e-3": (eg.LBFGS(), eg.Contrastive(rtol=1e-3)),
}


def digits(dtype: torch.dtype) -> tuple[eg.Bilevel, dict, dict]:
    """The problem of the README, its start and its weights, in a dtype."""
    torch.manual_seed(0)
    images: Any = shuffle(*load_digits(return_X_y=True), random_state=0)
    x, y = map(torch.tensor, images)
    x = x.to(dtype) / 16
    noisy = torch.where(torch.rand(500) < 0.5, torch.randint(10, (500,)), y[:500])
    net = eg.nn.Functional(torch.nn.Linear(64, 10).to(dtype))

    def inner(params, meta):
        losses = functional.cross_entropy(net(params, x[:500]), noisy, reduction="none")
        return (meta["w"].sigmoid() * losses).mean() + 1e-3 * params["weight"].square().sum()

    def outer(params, meta):
        return functional.cross_entropy(net(params, x[500:700]), y[500:700])

    weights = {"w": torch.zeros(500, dtype=dtype, requires_grad=True)}
    return eg.Bilevel(inner, outer), net.params(), weights


class Attention(torch.nn.Module):
    """A sequence classifier by fused attention, which has no double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = torch.nn.Linear(4, 24), torch.nn.Linear(8, 2)

    def forward(self, x):
        """Logits of sequences of shape `(batch, length, 4)`."""
        q, k, v = self.embed(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        return self.read(functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def serves(estimator: eg.Estimator, kind: str) -> bool:
    """Whether a meta-gradient of a small attention network comes out, and not an error."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 6, 4), torch.arange(16) % 2
    net = eg.nn.Functional(Attention())

    def logits(params, inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            return net(params, inputs).float()

    if kind == "compile":
        logits = torch.compile(logits, backend="aot_eager")

    def inner(params, meta):
        losses = functional.cross_entropy(logits(params, x), y, reduction="none")
        return (meta["w"].sigmoid() * losses).mean() + 1e-2 * sum(
            p.square().sum() for p in params.values()
        )

    problem = eg.Bilevel(inner, lambda params, meta: functional.cross_entropy(logits(params, x), y))
    solver = eg.GradientDescent(lr=0.3, max_steps=50)
    weights = {"w": torch.zeros(16, requires_grad=True)}
    if isinstance(estimator, eg.Contrastive) and estimator.rtol is not None:
        solver = eg.LBFGS()
    try:
        result = eg.meta_gradient(
            problem, net.params(), weights, solver=solver, estimator=estimator
        )
    except (eg.EquigradError, RuntimeError):
        return False
    return bool(result.grads["w"].isfinite().all())


def main() -> None:
    """Print the table."""
    problem, params, weights = digits(torch.float64)
    exact = eg.meta_gradient(
        problem,
        params,
        weights,
        solver=eg.LBFGS(tol=1e-10),
        estimator=eg.ConjugateGradient(tol=1e-12, max_iterations=2000),
    ).grads["w"]
    problem, params, weights = digits(torch.float32)

    def clock(run) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    print("| rule | error | estimated | time | fused attention | compiled | bf16 |")
    print("| --- | ---: | ---: | ---: | --- | --- | --- |")
    for name, (solver, estimator) in RULES.items():

        def call(solver=solver, estimator=estimator) -> eg.MetaGradient:
            return eg.meta_gradient(problem, params, weights, solver=solver, estimator=estimator)

        result = call()
        error = ((result.grads["w"] - exact).norm() / exact.norm()).item()
        alone = clock(lambda: eg.settle(problem, params, weights, solver=DESCENT))
        ticks = ["yes" if serves(estimator, k) else "no" for k in ("fused", "compile", "bf16")]
        estimate = "–" if result.error_estimate is None else f"{result.error_estimate:.1e}"
        cost = f"{clock(call) / alone:.1f}"
        print("| " + " | ".join([name, f"{error:.1e}", estimate, cost, *ticks]) + " |", flush=True)
        print(f"<!-- {result.status} -->")


if __name__ == "__main__":
    main()
