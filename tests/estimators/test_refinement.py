"""Accuracy on request: the true error is what was asked for, and the estimate says so."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import equigrad as eg
from equigrad.estimators.krylov_levels import KrylovLevels
from equigrad.estimators.refinement_pairs import Answer
from equigrad.testing import CASES, quadratic_case
from equigrad.testing.hard_zoo import HARD_ZOO
from equigrad.testing.zoo import ZOO

QUICK = [name for name in ZOO if name not in ("transformer", "deep-tanh", "lstm")]


def stated(result: eg.MetaGradient) -> float:
    """The error that the estimator states."""
    assert result.error_estimate is not None
    return result.error_estimate


made = functools.cache(lambda name, draw=0: {**ZOO, **HARD_ZOO}[name](draw))


@functools.cache
def measured(name, rtol, draw=0):
    case = made(name, draw)
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=rtol),
    )
    return case.relative_error(result.grads), result


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", QUICK)
def test_the_error_is_the_one_asked_for(name, rtol):
    error, result = measured(name, rtol)
    assert error <= rtol
    assert stated(result) <= rtol
    assert "not reached" not in result.status


@pytest.mark.parametrize("name", [name for name in ZOO if name not in QUICK])
def test_networks_whose_phases_take_long(name):
    """The transformer has no double backward: nothing here asks for one."""
    error, result = measured(name, 1e-2)
    assert error <= 1e-2
    assert "not reached" not in result.status


@pytest.mark.parametrize("draw", [0, 1])
def test_the_estimate_is_an_estimate_of_the_error(draw):
    """No constant was chosen on the second draw."""
    ratios = []
    for name in QUICK:
        for rtol in (1e-1, 1e-2, 1e-3, 1e-5) if draw == 0 else (1e-3,):
            error, result = measured(name, rtol, draw)
            assert error <= rtol
            ratios.append(stated(result) / error)
    within = sum(1 <= ratio <= 10 for ratio in ratios)
    assert within >= 0.9 * len(ratios), sorted(ratios)
    assert min(ratios) > 1


@pytest.mark.parametrize("name", QUICK)
def test_a_stricter_tolerance_goes_on_along_the_same_way(name):
    """So it is never worse, and where both end at the same answer, that has the same bits."""
    runs = [measured(name, rtol) for rtol in (1e-1, 1e-2, 1e-3, 1e-5)]
    for (loose, before), (strict, after) in itertools.pairwise(runs):
        assert strict <= loose
        assert after.gradient_evaluations >= before.gradient_evaluations
        if after.gradient_evaluations == before.gradient_evaluations:
            assert all(torch.equal(after.grads[n], before.grads[n]) for n in before.grads)


# Problems on which an error is easily missed

MET = ("small-units", "large-units", "factors", "saddle", "jump", "batch-norm", "layer-norm")


@pytest.mark.parametrize("name", MET)
def test_hard_problems_are_met(name):
    """And a stricter tolerance is no worse."""
    errors = []
    for rtol in (1e-2, 1e-5):
        error, result = measured(name, rtol)
        assert "not reached" not in result.status
        assert error <= stated(result) <= rtol
        errors.append(error)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["mixed-units", "lasso"])
def test_hard_problems_are_named(name):
    """Of parameters from 1e-6 to 1e6 rounding leaves no digit; at a kink L-BFGS does not settle."""
    for rtol in (1e-2, 1e-3):
        error, result = measured(name, rtol)
        assert error > rtol
        assert "not reached" in result.status
        assert stated(result) > 0.3 * error


def test_a_symmetry_that_turns_the_answer_to_a_force(monkeypatch):
    """The learner's own steps: by the force at one β after another, then by the loss."""
    krylov = asked(made("factors"), 1e-3).gradient_evaluations
    monkeypatch.setattr(KrylovLevels, "_pair", lambda levels, level: None)
    case = made("factors")
    result = asked(case, 1e-3)
    assert case.relative_error(result.grads) < 1e-3
    straight = asked(made("saddle"), 1e-3).gradient_evaluations
    assert result.gradient_evaluations > 3 * straight
    assert result.gradient_evaluations > 10 * krylov  # a response has no part along the symmetry


CONJUGATE = {"quadratic-0.01": 50, "stretched-10000": 144, "ridge": 35, "softmax": 55}
"""Gradients of the cheapest settings for an error of 1e-2, chosen by the true error."""


@pytest.mark.parametrize("name", CONJUGATE)
def test_an_error_costs_about_what_conjugate_gradients_at_their_best_do(name):
    """`python benchmarks/rtol.py --costs`; the error is found out, by first order alone."""
    _, result = measured(name, 1e-2)
    assert result.gradient_evaluations <= 1.3 * CONJUGATE[name]


def test_a_start_on_a_saddle_is_named():
    """Where nothing pushes, the free phase rests on the saddle, and the nudged ones leave it."""
    case = made("saddle")
    start = dataclasses.replace(case, params={"b": torch.zeros(6, dtype=torch.float64)})
    result = asked(start, 1e-2)
    assert "not reached" in result.status
    assert stated(result) > 0.1


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("name", ["ridge", "tanh"])
def test_the_scale_of_the_outer_loss_does_not_matter(name, scale):
    """The first β is only a guess: what counts is how much it changes the outer force."""
    case = made(name)
    problem = eg.Bilevel(
        case.problem.function("inner"),
        lambda p, m: scale * case.problem.outer_loss(p, m),
        case.problem.regularizer,
    )
    result = eg.meta_gradient(
        problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3),
    )
    grads = {n: g / scale for n, g in result.grads.items()}
    assert case.relative_error(grads) <= 1e-3
    assert stated(result) <= 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_gradient_descent_the_tolerances_are_tightened(momentum):
    case = made("logistic")
    solver = eg.GradientDescent(lr=1.0, momentum=momentum, max_steps=5)  # gives way to rtol
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=solver,
        estimator=eg.Contrastive(rtol=1e-4),
    )
    assert case.relative_error(result.grads) <= 1e-4
    assert all(phase.outcome == "converged" for phase in result.phases)
    assert result.phases[0].steps > 5


def test_a_first_guess_of_beta_that_is_far_too_large():
    """Against the outer loss the phase at -β has no equilibrium there: β is lowered."""
    case = made("ridge")
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3, beta=1e3),
    )
    assert case.relative_error(result.grads) <= 1e-3
    assert 0 < result.phases[1].beta.real < 1


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_float32_to_a_thousandth(build):
    case = build(torch.float32)
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3),
    )
    assert case.relative_error(result.grads) <= 1e-3
    assert stated(result) <= 1e-3


# What stands in the way is named


def asked(case, rtol, solver=None, **options):
    return eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=solver or eg.LBFGS(),
        estimator=eg.Contrastive(rtol=rtol, **options),
    )


def test_the_floor_of_float32():
    case = quadratic_case(torch.float32)
    result = asked(case, 1e-7)
    assert "rtol=1e-07 was not reached" in result.status
    assert "in torch.float32 the contrast has no more correct digits" in result.status
    assert "use torch.float64" in result.status
    assert 1e-7 < case.relative_error(result.grads) <= stated(result)


def test_more_points_reach_what_two_do_not_in_float32():
    """Two points are at best where β² = ε/β, at some 1e-4; four where β⁴ = ε/β."""
    case = quadratic_case(torch.float32)
    result = asked(case, 1e-4, solver=case.solver)
    assert len(result.phases) == 5
    assert case.relative_error(result.grads) <= stated(result) <= 1e-4
    assert "not reached" not in result.status


def test_the_budget():
    case = made("tanh")
    result = asked(case, 1e-3, budget=120)
    assert "the budget of 120 gradient evaluations is spent" in result.status
    assert stated(result) > 1e-3
    assert result.gradient_evaluations < 160
    assert case.relative_error(result.grads) <= stated(result)
    enough = asked(case, 1e-3, budget=10_000)
    assert "budget" not in enough.status


def test_no_equilibrium():
    """A saddle: the inner loss has no minimum."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"][0] - m["c"]).square() - 0.1 * p["w"][1].square(),
        lambda p, m: p["w"].sum(),
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.ones(2, dtype=torch.float64)},
        {"c": torch.tensor(1.0, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1),
        estimator=eg.Contrastive(rtol=1e-2),
    )
    assert "does not converge" in result.status
    assert "There may be no equilibrium near" in result.status
    assert stated(result) > 1e-2


def test_an_outer_loss_at_its_minimum_leaves_the_direct_term():
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum(),
        lambda p, m: (0 * p["w"]).sum() + 3 * m["c"].sum(),
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"c": torch.ones(2, dtype=torch.float64)},
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3),
    )
    torch.testing.assert_close(result.grads["c"], torch.full((2,), 3.0, dtype=torch.float64))
    assert "direct term ∂L_out/∂θ alone" in result.status


@pytest.mark.parametrize("force", [1.0, 30.0])
def test_a_force_that_no_phase_can_stand_against(force):
    """The inner loss pulls with a force of at most one: at β = 0.1 the larger nudge wins."""
    problem = eg.Bilevel(
        lambda p, m: (1 + (p["w"] - m["c"]).square()).sqrt().sum(),
        lambda p, m: force * p["w"].sum(),
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"c": torch.ones(2, dtype=torch.float64)},
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3),
    )
    torch.testing.assert_close(
        result.grads["c"], torch.full((2,), force, dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert result.gradient_evaluations < 1000


def test_phases_that_keep_what_the_free_one_learned_take_fewer_gradients():
    case = made("convolution")
    kept = asked(case, 1e-3).gradient_evaluations
    assert 1.1 * kept < asked(case, 1e-3, momentum="reset").gradient_evaluations


def test_phases_on_both_sides_of_a_kink():
    """The free phase rests at 1.0014, above a kink at 1 that the phase at -β crosses."""
    problem = eg.Bilevel(
        lambda p, m: (
            0.5 * (p["w"] - m["t"]).square().sum() + 3 * torch.relu(p["w"] - 1).square().sum()
        ),
        lambda p, m: 0.5 * (p["w"] + p["w"] ** 2).sum(),
    )
    meta = {"t": torch.full((1,), 1.01, dtype=torch.float64)}
    for rtol in (1e-1, 1e-2):
        result = eg.meta_gradient(
            problem,
            {"w": torch.zeros(1, dtype=torch.float64)},
            meta,
            solver=eg.GradientDescent(lr=0.1),
            estimator=eg.Contrastive(rtol=rtol),
        )
        w = 1 + 0.01 / 7  # (w - t) + 6 (w - 1) = 0, and dw/dt = 1/7
        assert result.grads["t"].item() == pytest.approx((0.5 + w) / 7, rel=rtol)


@pytest.mark.parametrize(("inner", "outer"), [(1.0, 1e-6), (1e6, 1.0), (1e-3, 1e3)])
def test_the_scale_of_losses_in_float32(inner, outer):
    case = quadratic_case(torch.float32)
    problem = eg.Bilevel(
        lambda p, m: inner * case.problem.function("inner")(p, m),
        lambda p, m: outer * case.problem.outer_loss(p, m),
    )
    result = eg.meta_gradient(
        problem,
        case.params,
        case.meta_params,
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-2),
    )
    grads = {n: g / outer for n, g in result.grads.items()}
    assert case.relative_error(grads) <= 1e-2
    assert stated(result) <= 1e-2
    assert result.gradient_evaluations < 2000


def test_params_of_two_dtypes():
    """The coarser one decides what rounding allows."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum() + p["z"].square().float(),
        lambda p, m: (p["w"] ** 3).sum(),
    )
    params = {"z": torch.zeros((), dtype=torch.float64), "w": torch.zeros(4)}
    c = torch.tensor([1.0, 2.0, -1.0, 0.5])
    result = eg.meta_gradient(
        problem, params, {"c": c}, solver=eg.LBFGS(), estimator=eg.Contrastive(rtol=1e-3)
    )
    torch.testing.assert_close(result.grads["c"], 3 * c**2, rtol=1e-3, atol=1e-3)
    assert result.gradient_evaluations < 1000


def test_a_force_that_is_nothing_but_rounding():
    """Inner and outer loss have the same minimum."""
    problem = eg.Bilevel(
        lambda p, m: (p["a"] - m["t"]).square().sum(), lambda p, m: (p["a"] - 1).square().sum()
    )
    result = eg.meta_gradient(
        problem,
        {"a": torch.zeros(1, dtype=torch.float64)},
        {"t": torch.ones(1, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1),
        estimator=eg.Contrastive(rtol=1e-2),
    )
    assert result.grads["t"].abs() < 1e-6


def test_a_budget_that_ends_before_anything_is_known():
    problem = eg.Bilevel(
        lambda p, m: (p["a"] - m["t"]).square().sum(),
        lambda p, m: torch.relu(p["a"] - 0.9).sum(),  # no force where the phase was stopped
    )
    result = eg.meta_gradient(
        problem,
        {"a": torch.zeros(1, dtype=torch.float64)},
        {"t": torch.ones(1, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1),
        estimator=eg.Contrastive(rtol=1e-2, budget=8),
    )
    assert stated(result) == math.inf


@pytest.mark.parametrize("budget", [150, 400, 1000])
def test_line_searches_keep_to_the_budget(budget):
    result = asked(made("deep-tanh"), 1e-9, budget=budget)
    assert result.gradient_evaluations <= budget + 100


def test_a_learner_that_ignores_the_nudge():
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: p["w"].square().sum()
    )
    c = torch.ones(2, dtype=torch.float64)
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"c": c},
        solver=eg.BlackBox(lambda objective, start: c.numpy()),
        estimator=eg.Contrastive(rtol=1e-2),
    )
    assert "did not respond to the nudge" in result.status
    assert stated(result) > 1


def test_mini_batches_are_refused():
    problem = eg.Bilevel(
        lambda p, m, batch: (p["w"] - m["c"] * batch).square().sum(),
        lambda p, m: p["w"].square().sum(),
        inner_batches=[torch.tensor(1.0), torch.tensor(2.0)],
    )
    with pytest.raises(
        eg.ConfigurationError, match=r"2 mini-batches.*Average over the mini-batches in inner_loss"
    ):
        eg.meta_gradient(
            problem,
            {"w": torch.zeros(2)},
            {"c": torch.ones(2)},
            solver=eg.GradientDescent(lr=0.1),
            estimator=eg.Contrastive(rtol=1e-2),
        )


@pytest.mark.parametrize("beta", [1e-2, 1e-3])
def test_a_gradient_that_is_zero(beta):
    """θ turns the settled params around a circle on which the outer loss is constant."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - torch.stack([m["t"].cos(), m["t"].sin()])).square().sum(),
        lambda p, m: p["w"].square().sum(),
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"t": torch.tensor(0.5, dtype=torch.float64)},
        solver=eg.LBFGS(),
        estimator=eg.Contrastive(rtol=1e-3, beta=beta, budget=5000),
    )
    assert result.grads["t"].abs() < 1e-3
    # no relative error can be had for what is zero
    assert stated(result) > 1e-3
    assert "rtol=0.001 was not reached" in result.status


def test_a_derivative_by_theta_that_is_not_finite():
    problem = eg.Bilevel(
        lambda p, m: (
            (p["w"] - m["c"]).square().sum() + 0 * m["c"].sum().abs().sqrt() * p["w"].sum()
        ),
        lambda p, m: p["w"].sum(),
    )
    with pytest.raises(eg.SettlingError, match="not finite"):
        eg.meta_gradient(
            problem,
            {"w": torch.ones(2, dtype=torch.float64)},
            {"c": torch.zeros(2, dtype=torch.float64)},
            solver=eg.LBFGS(),
            estimator=eg.Contrastive(rtol=1e-3),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, r"rtol must be a finite number in \(0, 1\), or None, got 0.0"),
        ({"rtol": 2.0}, "rtol must be a finite number in"),
        ({"rtol": math.nan}, "rtol must be a finite number in"),
        ({"rtol": 1e-2, "points": 4}, "rtol chooses points"),
        ({"rtol": 1e-2, "scheme": "forward"}, "rtol chooses scheme"),
        ({"rtol": 1e-2, "budget": 0}, "budget must be a whole number of at least 1"),
    ],
)
def test_knobs_that_cannot_work(options, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.Contrastive(**options)


def test_two_sides_that_do_not_come_together_are_named(monkeypatch):
    """A normalised layer under weight decay: at ±β the phases settle on two sides of a ridge.

    The response at rest is far from it, and right.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    generator = torch.Generator().manual_seed(1)

    def data(rows):
        x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        return x, x[:, :1].sin() + x[:, 1:2]

    (x, y), (v, w) = data(40), data(30)
    params = {name: p.detach() for name, p in network.named_parameters()}
    meta = {name: torch.tensor(-2.0).double() for name in params}

    def misfit(p, x, y):
        return 0.5 * (functional_call(network, p, (x,)) - y).square().mean()

    problem = eg.Bilevel(
        lambda p, m: (
            misfit(p, x, y) + 0.5 * sum(m[n].exp() * q.square().sum() for n, q in p.items())
        ),
        lambda p, m: misfit(p, v, w),
    )
    solve = functools.partial(eg.meta_gradient, problem, params, meta)
    exact = solve(
        solver=eg.LBFGS(tol=1e-11, max_steps=20_000),  # the Hessian is nearly singular there
        estimator=eg.ConjugateGradient(tol=1e-10, max_iterations=2000, products="autograd"),
    )
    result = solve(solver=eg.LBFGS(), estimator=eg.Contrastive(rtol=1e-2))
    found, true = (torch.stack([r.grads[n] for n in meta]) for r in (result, exact))
    assert (found - true).norm() / true.norm() < stated(result) <= 1e-2

    monkeypatch.setattr(KrylovLevels, "_pair", lambda levels, level: None)
    result = solve(solver=eg.LBFGS(), estimator=eg.Contrastive(rtol=1e-2))
    assert "rtol=0.01 was not reached" in result.status
    assert stated(result) > 0.05


def test_an_answer_of_unknown_error_is_that_of_phases_where_there_are_any():
    """Both are named; but the direct term alone, here zero, says nothing of the response."""
    grads = {"l": torch.zeros(())}
    pair: Any = object()
    direct, tried = Answer(math.inf, grads, ()), Answer(math.inf, grads, (pair,))
    assert min(direct, tried, key=Answer.by_error) is tried
    assert min(dataclasses.replace(direct, error=0.1), tried, key=Answer.by_error).error == 0.1
