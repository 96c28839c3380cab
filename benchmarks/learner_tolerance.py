"""The error of a meta-gradient against β, for learners at their defaults and at tight tolerances.

Two l2-logistic regressions: `logistic_case` of `equigrad.testing`, by the symmetric rule, for the
learners that are handed the objective; one with a weight for every training point, by the forward
rule of three points, for scikit-learn's. Relative errors are against exact gradients. A star: the
status says that the learner left more than a hundredth of the nudge.

    python benchmarks/learner_tolerance.py
"""

from collections.abc import Callable
from typing import Any

import cma
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import equigrad as eg
from equigrad.problems import Params
from equigrad.testing import logistic_case

BETAS = (0.1, 0.01, 0.001)
Learner = Callable[[Any, Any], Any]


def scipy(method: str, **options: Any) -> Learner:
    def learner(objective: Any, start: Any) -> Any:
        if method == "Nelder-Mead":
            return minimize(objective.value, start, method=method, options=options).x
        function = objective.value_and_gradient
        return minimize(function, start, jac=True, method=method, options=options).x

    return learner


def evolution(**options: float) -> Learner:
    def learner(objective: Any, start: Any) -> Any:
        return cma.fmin2(objective.value, start, 0.1, {"seed": 1, "verbose": -9, **options})[0]

    return learner


LEARNERS: dict[str, tuple[Learner, Learner]] = {
    "scipy BFGS": (scipy("BFGS"), scipy("BFGS", gtol=1e-12)),
    "scipy L-BFGS-B": (scipy("L-BFGS-B"), scipy("L-BFGS-B", ftol=0, gtol=1e-13)),
    "scipy Nelder-Mead": (
        scipy("Nelder-Mead"),
        scipy("Nelder-Mead", xatol=1e-9, fatol=1e-15, maxfev=20_000),
    ),
    "CMA-ES": (evolution(), evolution(tolx=1e-10, tolfun=1e-16, tolfunhist=1e-16)),
}


def reweighting() -> tuple[eg.Bilevel, Params, Params, Callable[..., Learner]]:
    torch.manual_seed(0)
    x = torch.randn(60, 3).double()
    y = (x.sum(1) + torch.randn(60) > 0).double()
    x, v, y, w = x[:20], x[20:], y[:20], y[20:]

    def errors(params: Params, x: Tensor, y: Tensor) -> Tensor:
        logits = x @ params["coef"] + params["intercept"]
        return binary_cross_entropy_with_logits(logits, y, reduction="none")

    def make(**options: Any) -> Learner:
        def learner(objective: Any, start: Any) -> Any:
            nudge = torch.full((len(v),), objective.beta / len(v)).double()
            weights = torch.cat([objective.meta_params["weight"], nudge])
            model = LogisticRegression(**options)
            model.fit(torch.cat([x, v]), torch.cat([y, w]), sample_weight=weights)
            return {"coef": model.coef_, "intercept": model.intercept_}

        return learner

    problem = eg.Bilevel(
        lambda p, m: (m["weight"] * errors(p, x, y)).sum() + p["coef"].square().sum() / 2,
        lambda p, m: errors(p, v, w).mean(),
    )
    start = {"coef": torch.zeros(3).double(), "intercept": torch.zeros(()).double()}
    return problem, start, {"weight": torch.ones(20).double()}, make


def row(
    name: str,
    problem: eg.Problem,
    params: Params,
    meta_params: Params,
    learner: Learner,
    **rule: Any,
) -> None:
    """One line of the table."""
    exact = eg.meta_gradient(
        problem, params, meta_params, solver=eg.LBFGS(tol=1e-12), estimator=eg.ExactSolve()
    ).grads
    cells = []
    for beta in BETAS:
        result = eg.meta_gradient(
            problem,
            params,
            meta_params,
            solver=eg.BlackBox(learner),
            estimator=eg.Contrastive(beta=beta, **rule),
        )
        off, size = (
            torch.cat([t.flatten() for t in grads]).norm().item()
            for grads in ([result.grads[n] - g for n, g in exact.items()], [*exact.values()])
        )
        cells.append(f"{off / size:.0e}" + ("*" if "learner ended" in result.status else ""))
    print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    print("| learner | " + " | ".join(f"β = {beta:g}" for beta in BETAS) + " |")
    print("| --- | " + " | ".join("---:" for _ in BETAS) + " |")
    case = logistic_case(torch.float64)
    for name, pair in LEARNERS.items():
        for kind, learner in zip(("defaults", "tight"), pair, strict=True):
            row(
                f"{name}, {kind}",
                case.problem,
                case.params,
                case.meta_params,
                learner,
                scheme="symmetric",
            )
    problem, params, meta_params, make = reweighting()
    row("scikit-learn, defaults", problem, params, meta_params, make(), scheme="forward", points=3)
    exact = make(solver="newton-cholesky", tol=1e-10)
    row("scikit-learn, tight", problem, params, meta_params, exact, scheme="forward", points=3)


if __name__ == "__main__":
    main()
