"""Does the check find a fault that was planted, and name its cause?"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import equigrad as eg
from equigrad.estimators.estimator import Estimate, Estimator, Traits

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X, V = (torch.randn(30, 5, generator=GENERATOR, dtype=F64) for _ in range(2))
Y, W = X.sum(1).tanh(), V.sum(1).tanh() + 0.5


def inner(p, m):
    return (X @ p["w"] - Y).square().mean() + (m["log"].exp() * p["w"].square()).sum()


def outer(p, m):
    return (V @ p["w"] - W).square().mean() + 0.1 * (m["log"] + 1).square().sum()


START = {"w": torch.zeros(5, dtype=F64)}
META = {"log": torch.linspace(-3, -1, 5, dtype=F64)}
SOLVER = eg.LBFGS(tol=1e-9, max_steps=500)


def check(
    inner: Any = inner,
    outer: Any = outer,
    start: Any = START,
    meta: Any = META,
    solver: eg.Solver = SOLVER,
    estimator: eg.Estimator | None = None,
    **options: Any,
) -> eg.Check:
    problem = eg.Bilevel(inner, outer, regularizer=options.pop("regularizer", None))
    return eg.check_meta_gradient(
        problem,
        start,
        meta,
        solver=solver,
        estimator=estimator or eg.ConjugateGradient(),
        **options,
    )


def says(found, sentence):
    assert not found.passed, found
    assert any(sentence in said for said in found.advice), found
    return True


@dataclass(frozen=True, kw_only=True)
class Spoilt(Estimator):
    """The right gradient, spoilt: `direct` times the direct term plus `implicit` times the rest."""

    traits: ClassVar[Traits] = Traits(
        idea="spoilt", cost="-", error="planted", double_backward=True
    )
    direct: float = 1.0
    implicit: float = 1.0

    def estimate(self, evaluation, solver):
        right = eg.ConjugateGradient().estimate(evaluation, solver)
        _, direct = evaluation.outer_gradients(right.phases[0])
        grads = {
            n: self.direct * direct[n] + self.implicit * (g - direct[n])
            for n, g in right.grads.items()
        }
        return Estimate(grads=grads, phases=right.phases)


def test_nothing_is_found_where_nothing_is_wrong():
    found = check()
    assert found.passed, found
    assert found.advice == ()


@pytest.mark.parametrize(
    ("spoilt", "cause"),
    [
        (Spoilt(direct=0.0), "The direct term ∂L_out/∂θ is missing"),
        (Spoilt(direct=-1.0, implicit=-1.0), "The sign is wrong"),
        (Spoilt(direct=2.0, implicit=2.0), "2 times the gradient"),
        (Spoilt(implicit=-1.0), "The implicit part is -1 times what it should be"),
        (Spoilt(implicit=0.5), "The implicit part is 0.5 times what it should be"),
    ],
)
def test_an_estimate_of_the_wrong_form(spoilt, cause):
    assert says(check(estimator=spoilt), cause)


def test_params_detached_in_the_inner_loss_are_refused_or_named():
    """Half of a square is hidden: what settles is not where the estimators take it to be."""

    def cut(p, m):
        return (X @ p["w"] - Y).square().mean() + (m["log"].exp() * p["w"] * p["w"].detach()).sum()

    with pytest.raises(eg.ProblemError, match=r"hidden from autograd.*FixedPoint"):
        check(cut)
    found = check(cut, estimator=eg.Contrastive())
    assert says(found, "inner_loss depends on params by a path that autograd does not see")


def test_params_detached_with_a_symmetric_derivative_are_judged_by_differences():
    """What the contrastive rule can serve: a weight of each sample by its detached output."""

    def cut(p, m):
        z = X @ p["w"] - Y
        weight = z.detach().abs() + 1
        return (weight * z.square()).mean() + (m["log"].exp() * p["w"].square()).sum()

    found = check(cut, estimator=eg.Contrastive(beta=1e-3))
    assert "exact" not in found.reference
    assert found.passed or says(found, "inner_loss depends on params by a path")


def test_meta_params_detached_in_the_inner_loss():
    def cut(p, m):
        return inner(p, m) + (m["log"].detach().exp() * p["w"].square()).sum()

    found = check(cut)
    assert says(found, "inner_loss depends on meta_params by a path that autograd does not see")


@pytest.mark.parametrize("argument", ["params", "meta_params"])
def test_what_is_cut_in_the_outer_loss(argument):
    def cut(p, m):
        if argument == "params":
            return outer(p, m) + (V @ p["w"].detach()).square().mean()
        return outer(p, m) + 2 * m["log"].detach().exp().sum()

    found = check(outer=cut)
    assert says(found, f"outer_loss depends on {argument} by a path that autograd does not see")


def test_a_number_taken_out_by_item():
    def cut(p, m):
        return inner(p, m) + m["log"][0].exp().item() * p["w"].square().sum()

    assert says(check(cut), "inner_loss depends on meta_params by a path")


def test_unsettled():
    found = check(solver=eg.GradientDescent(lr=0.05, max_steps=10), estimator=eg.Contrastive())
    assert says(found, "Settle longer")


def test_beta_too_small_in_single_precision():
    to32 = {"w": START["w"].float()}, {"log": META["log"].float()}
    x, y, v, w = (t.float() for t in (X, Y, V, W))
    found = check(
        lambda p, m: (x @ p["w"] - y).square().mean() + (m["log"].exp() * p["w"].square()).sum(),
        lambda p, m: (v @ p["w"] - w).square().mean() + 0.1 * (m["log"] + 1).square().sum(),
        *to32,
        solver=eg.LBFGS(tol=1e-6, max_steps=200),
        estimator=eg.Contrastive(beta=1e-7),
    )
    assert says(found, "is too small for torch.float32")
    assert not any("Lower beta" in said for said in found.advice)


def test_beta_too_large():
    found = check(estimator=eg.Contrastive(beta=1.0, scheme="forward", nudge="loss"))
    assert says(found, "is too large for the curvature")


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_random_loss(where):
    noise = torch.Generator().manual_seed(1)  # not one that equigrad seeds

    def noisy(loss):
        return lambda p, m: (
            loss(p, m) + 1e-2 * (p["w"] * torch.randn(5, generator=noise, dtype=F64)).sum()
        )

    spoilt: dict[str, Any] = {where: noisy(inner if where == "inner" else outer)}
    solver = eg.GradientDescent(lr=0.2, max_steps=300)
    assert says(check(solver=solver, **spoilt), f"{where}_loss is random")


def test_a_kink_at_the_solution():
    def lasso(p, m):
        return (X @ p["w"] - Y).square().mean() + (m["log"].exp() * p["w"].abs()).sum()

    meta = {"log": torch.linspace(-2, 0.5, 5, dtype=F64)}
    found = check(lasso, meta=meta, solver=eg.LBFGS(tol=1e-9, max_steps=200))
    assert says(found, "there is a kink")


@pytest.mark.parametrize("estimator", [eg.ExactSolve(), eg.GMRES(), eg.T1T2()])
def test_a_saddle(estimator):
    """φ starts at b = 0, a maximum in b of ¼ (b² - 1)², by symmetry."""
    found = eg.check_meta_gradient(
        eg.Bilevel(
            lambda p, m: (
                0.25 * (p["b"].square() - 1).square().sum() + 0.5 * (p["a"] - m["c"]).square().sum()
            ),
            lambda p, m: (p["a"] - 1).square().sum() + (p["b"] - m["c"]).square().sum(),
        ),
        {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(2, dtype=F64)},
        {"c": torch.tensor([0.3, -0.7], dtype=F64)},
        solver=eg.GradientDescent(lr=0.3, tol=1e-10, max_steps=500),
        estimator=estimator,
    )
    assert says(found, "a saddle point or a maximum")


@dataclass
class Ridge:
    """`½ Σ λ φ²`, with closed forms that may be off by a factor."""

    velocity: float = 1.0
    contrasted: float = 1.0
    meta_names: frozenset[str] = frozenset({"log"})

    def penalty(self, params, meta_params):
        return 0.5 * (meta_params["log"].exp() * params["w"].square()).sum()

    def bind(self, meta_params):
        ridge, strength = self, meta_params["log"].exp()

        class Pull:
            def add_velocity(self, velocity, params):
                return tuple(v - ridge.velocity * strength * params["w"] for v in velocity)

            def contrast(self, states, weights):
                total = sum(w * s["w"].square() for s, w in zip(states, weights, strict=True))
                return {"log": ridge.contrasted * 0.5 * strength * total}

        return Pull()


@pytest.mark.parametrize(
    ("ridge", "cause"),
    [
        (Ridge(velocity=2.0), "velocity is not minus the derivative of its penalty"),
        (Ridge(contrasted=2.0), "contrast is not the difference of its penalty's derivatives"),
        (Ridge(velocity=-1.0), "velocity is not minus the derivative of its penalty"),
    ],
)
def test_a_wrong_regularizer(ridge, cause):
    found = check(
        lambda p, m: (X @ p["w"] - Y).square().mean() + p["w"].square().sum(),
        regularizer=ridge,
        estimator=eg.Contrastive(),
    )
    assert says(found, cause)


def test_a_right_regularizer_passes():
    found = check(
        lambda p, m: (X @ p["w"] - Y).square().mean(),
        regularizer=Ridge(),
        estimator=eg.Contrastive(beta=1e-3),
    )
    assert found.passed, found


def test_a_gradient_that_is_truly_zero_passes():
    """w settles on a circle on which the outer loss is constant."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - torch.stack([m["t"].cos(), m["t"].sin()])).square().sum(),
        lambda p, m: p["w"].square().sum(),
    )
    found = eg.check_meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=F64)},
        {"t": torch.tensor(0.5, dtype=F64)},
        solver=SOLVER,
        estimator=eg.ConjugateGradient(),
    )
    assert found.passed, found
    assert "zero up to rounding" in found.reference


def test_the_cost_is_said_before_and_capped():
    said = []
    found = check(estimator=eg.Contrastive(), budget=40, directions=5, progress=said.append)
    assert "up to 40 more" in said[0]
    assert len(found.directions) < 5
    assert "exact" not in found.reference
    assert found.spent >= 40
    assert "the budget is spent" in found.reference
    assert f"{found.spent} for the references" in str(found)
