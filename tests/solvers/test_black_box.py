"""Learners that know nothing of torch: their meta-gradients against exact ones."""

import re

import cma
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn.functional import binary_cross_entropy_with_logits as logistic_loss

import equigrad as eg
from equigrad.testing import logistic_case, quadratic_case, ridge_case, scalar_case
from helpers import small_network

F64 = torch.float64


def lbfgsb(objective, start):
    options = {"ftol": 0, "gtol": 1e-13, "maxcor": 30}
    return minimize(
        objective.value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
    ).x


def bfgs(objective, start):
    return minimize(
        objective.value, start, jac=objective.gradient, method="BFGS", options={"gtol": 1e-12}
    ).x


def nelder_mead(objective, start):
    options = {"xatol": 1e-9, "fatol": 1e-15, "adaptive": True, "maxfev": 20_000}
    return minimize(objective.value, start, method="Nelder-Mead", options=options).x


def powell(objective, start):
    options = {"xtol": 1e-11, "ftol": 1e-16}
    return minimize(objective.value, start, method="Powell", options=options).x


def evolution(objective, start):
    options = {
        "seed": 1,
        "verbose": -9,
        "tolx": 1e-10,
        "tolfun": 1e-16,
        "tolfunhist": 1e-16,
        "tolstagnation": 0,
    }
    return cma.fmin2(objective.value, start, 0.1, options)[0]


def settled(case, learner, solver_options=None, **options):
    rule = {"beta": 1e-3, "scheme": "symmetric", "error": False} | options
    return eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.BlackBox(learner, **(solver_options or {})),
        estimator=eg.Contrastive(**rule),
    )


# Against exact gradients


@pytest.mark.parametrize("learner", [lbfgsb, bfgs])
@pytest.mark.parametrize("build", [ridge_case, logistic_case, quadratic_case, scalar_case])
def test_scipy_with_gradients(build, learner):
    """The rule's own error is about β² = 1e-6; residuals of up to 1e-8 are divided by β."""
    case = build(F64)
    result = settled(case, learner)
    assert case.relative_error(result.grads) < 5e-5
    assert result.status.startswith("stopped: residual")
    assert "learner" not in result.status


@pytest.mark.parametrize("learner", [nelder_mead, powell, evolution])
@pytest.mark.parametrize("build", [ridge_case, logistic_case])
def test_learners_that_see_values_only(build, learner):
    """Values resolve the minimum to √ε, about 1e-8 of it; divided by β that is 1e-6."""
    case = build(F64)
    result = settled(case, learner, beta=1e-2)
    assert case.relative_error(result.grads) < 1e-3
    # two checks, each of three phases looked at before and after its call (a nudged one takes two
    # gradients), ∂L_in/∂θ at both nudged ends: no learner took a gradient
    assert result.gradient_evaluations == 2 + 2 * (1 + 2 + 2) + 2


def test_a_network():
    """Against gradients of our own L-BFGS and an implicit solve."""
    problem, synapse = small_network()
    params, meta = synapse.params(), synapse.meta_params()
    exact = eg.meta_gradient(
        problem, params, meta, solver=eg.LBFGS(tol=1e-11), estimator=eg.ExactSolve()
    )
    result = eg.meta_gradient(
        problem,
        params,
        meta,
        solver=eg.BlackBox(lbfgsb, tol=1e-6, max_steps=3),
        estimator=eg.Contrastive(beta=1e-4, scheme="symmetric"),
    )
    assert result.phases[0].outcome == "converged"
    for name, grad in exact.grads.items():
        torch.testing.assert_close(result.grads[name], grad, rtol=1e-4, atol=1e-7)


def test_float32_params_are_spoken_to_in_float64():
    seen = []

    def learner(objective, start):
        seen.append((start.dtype, objective.gradient(start).dtype))
        return bfgs(objective, start)

    case = ridge_case(torch.float32)
    result = settled(case, learner, beta=0.1)
    assert set(seen) == {(np.dtype("float64"), np.dtype("float64"))}
    assert result.params["w"].dtype == torch.float32
    assert case.relative_error(result.grads) < 3e-2


# scikit-learn: the training points' weights, and the regularisation


def regression(classes):
    """Twelve training points, two of them spoilt, and thirty validation points."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(42, 3, generator=generator, dtype=F64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=F64) + 0.7
    y = y + 0.3 * torch.randn(42, generator=generator, dtype=F64)
    y[:2] = -y[:2]
    y = (y > 0).to(F64) if classes else y
    return x[:12], y[:12], x[12:], y[12:]


META = {
    "weight": torch.linspace(0.5, 1.5, 12, dtype=F64),
    "log_strength": torch.tensor(-0.5, dtype=F64),
}
START = {"coef": torch.zeros(3, dtype=F64), "intercept": torch.zeros((), dtype=F64)}


def ridge_problem():
    x, y, v, w = regression(classes=False)

    def errors(params, x, y):
        return (x @ params["coef"] + params["intercept"] - y).square()

    problem = eg.Bilevel(
        inner_loss=lambda p, m: (
            (m["weight"] * errors(p, x, y)).sum()
            + m["log_strength"].exp() * p["coef"].square().sum()
        ),
        outer_loss=lambda p, m: errors(p, v, w).mean(),
    )

    def learner(objective, start):
        meta = objective.meta_params
        pushed = torch.full((len(v),), objective.beta / len(v), dtype=F64)
        model = Ridge(alpha=meta["log_strength"].exp().item(), solver="cholesky")
        model.fit(torch.cat([x, v]), torch.cat([y, w]), torch.cat([meta["weight"], pushed]))
        return {"coef": model.coef_, "intercept": model.intercept_}

    return problem, learner


def logistic_problem():
    x, y, v, w = regression(classes=True)

    def errors(params, x, y):
        return logistic_loss(x @ params["coef"] + params["intercept"], y, reduction="none")

    problem = eg.Bilevel(
        inner_loss=lambda p, m: (
            (m["weight"] * errors(p, x, y)).sum()
            + 0.5 * m["log_strength"].exp() * p["coef"].square().sum()
        ),
        outer_loss=lambda p, m: errors(p, v, w).mean(),
    )

    def learner(objective, start):
        meta = objective.meta_params
        pushed = torch.full((len(v),), objective.beta / len(v), dtype=F64)
        strength = meta["log_strength"].exp().item()
        model = LogisticRegression(C=1 / strength, tol=1e-12, solver="newton-cholesky")
        model.fit(torch.cat([x, v]), torch.cat([y, w]), torch.cat([meta["weight"], pushed]))
        return {"coef": model.coef_, "intercept": model.intercept_}

    return problem, learner


@pytest.mark.parametrize("build", [ridge_problem, logistic_problem])
def test_scikit_learn(build):
    """Weights may not be negative, so forward: three points leave an error of about β²."""
    problem, learner = build()
    exact = eg.meta_gradient(
        problem, START, META, solver=eg.LBFGS(tol=1e-12), estimator=eg.ExactSolve()
    )
    result = eg.meta_gradient(
        problem,
        START,
        META,
        solver=eg.BlackBox(learner, tol=1e-8),
        estimator=eg.Contrastive(beta=1e-2, points=3, scheme="forward"),
    )
    assert {phase.outcome for phase in result.phases} <= {"converged", "stopped"}
    assert result.phases[0].residual < 1e-8  # it minimised the very loss of the problem
    for name, grad in exact.grads.items():
        torch.testing.assert_close(result.grads[name], grad, rtol=1e-4, atol=1e-8)
    assert (result.grads["weight"][:2] > 0).all()  # the spoilt points are to weigh less


def test_the_exact_solve_of_ridge_is_the_normal_equations():
    """What scikit-learn is held to above, by autograd through a closed form."""
    x, y, v, w = regression(classes=False)
    weight = META["weight"].clone().requires_grad_()
    ones, target = torch.ones(12, 1, dtype=F64), torch.ones(30, 1, dtype=F64)
    design, judged = torch.cat([x, ones], 1), torch.cat([v, target], 1)
    strength = META["log_strength"].exp() * torch.tensor([1, 1, 1, 0], dtype=F64)
    normal = design.T @ (weight[:, None] * design) + torch.diag(strength)
    coefficients = torch.linalg.solve(normal, design.T @ (weight * y))
    (exact,) = torch.autograd.grad((judged @ coefficients - w).square().mean(), weight)
    problem, learner = ridge_problem()
    grads = eg.meta_gradient(
        problem,
        START,
        META,
        solver=eg.BlackBox(learner),
        estimator=eg.Contrastive(beta=1e-2, points=3, scheme="forward"),
    ).grads
    torch.testing.assert_close(grads["weight"], exact, rtol=1e-4, atol=1e-8)


def test_learning_the_weights_takes_the_spoilt_points_out():
    """What remains is the noise of the targets, of variance 0.09, and twelve points' worth."""
    problem, learner = ridge_problem()
    meta = {name: m.clone().requires_grad_() for name, m in META.items()}

    def project(meta_params):
        meta_params["weight"].data.clamp_(min=0)

    state = eg.training.learn(
        problem,
        START,
        meta,
        solver=eg.BlackBox(learner),
        estimator=eg.Contrastive(beta=1e-2, points=3, scheme="forward"),
        optimizer=torch.optim.Adam(list(meta.values()), lr=0.1),
        steps=30,
        project=project,
    )
    assert meta["weight"][:2].tolist() == [0, 0]
    losses = [float(row["outer_loss"]) for row in state.history]
    assert losses[0] > 10
    assert losses[-1] < 2 * 0.09


def test_negative_weights_are_refused_with_a_remedy():
    problem, learner = ridge_problem()
    with pytest.raises(eg.SettlingError, match=r"β = -0\.01.*scheme='forward' with beta > 0"):
        eg.meta_gradient(
            problem,
            START,
            META,
            solver=eg.BlackBox(learner),
            estimator=eg.Contrastive(beta=1e-2, scheme="symmetric"),
        )


def test_a_check_re_solves_at_other_meta_parameters():
    """It needs θ from the objective: a learner that has θ built in would be found wrong."""
    problem, learner = logistic_problem()
    check = eg.check_meta_gradient(
        problem,
        START,
        META,
        solver=eg.BlackBox(learner),
        estimator=eg.Contrastive(beta=1e-2, points=3, scheme="forward"),
        rtol=1e-3,
    )
    assert check.passed, str(check)


# Phases


def newton(calls):
    """One exact step on the quadratic in flat coordinates, by two gradients a coordinate."""

    def learner(objective, start):
        calls.append(objective.beta)
        gradient = objective.gradient(start)
        columns = [objective.gradient(start + row) - gradient for row in np.eye(len(start))]
        return start - np.linalg.solve(np.array(columns).T, gradient)

    return learner


def test_matched_phases_call_the_learner_once_more():
    case, calls = quadratic_case(F64), []
    matched = settled(case, newton(calls), scheme="forward")
    assert calls == [0, 1e-3, 0]
    plain = settled(case, newton(calls := []), scheme="forward", matched=False)
    assert calls == [0, 1e-3]
    # a learner of one exact step has no drift to cancel: both have the rule's own error, about β/2
    for result in (matched, plain):
        assert 1e-5 < case.relative_error(result.grads) < 1e-3
    # the matched phase costs two looks and the learner's own 13 gradients, of one loss each
    assert matched.gradient_evaluations - plain.gradient_evaluations == 2 + 13


def test_matched_phases_cancel_what_a_loose_learner_leaves():
    """Twenty gradient steps leave 0.6 % of the slowest mode; plain phases divide that by β."""

    def loose(objective, x):
        for _ in range(20):
            x = x - 0.8 * objective.gradient(x)
        return x

    case = quadratic_case(F64)
    matched, plain = (
        case.relative_error(settled(case, loose, scheme="forward", matched=on).grads)
        for on in (True, False)
    )
    assert matched < 0.01
    assert plain > 100 * matched


def test_a_learner_equals_the_solver_that_it_copies():
    """Ten gradient steps in one call, against ten steps of gradient descent."""

    def ten(objective, x):
        for _ in range(10):
            x = x - 0.5 * objective.gradient(x)
        return x

    case = quadratic_case(F64)
    ours = settled(case, ten)
    steps = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.GradientDescent(lr=0.5, max_steps=10),
        estimator=eg.Contrastive(beta=1e-3, scheme="symmetric", nudge="loss"),
    )
    torch.testing.assert_close(ours.grads["theta"], steps.grads["theta"], rtol=1e-9, atol=1e-12)


def test_the_residual_is_that_of_the_place_where_the_learner_ended():
    case = quadratic_case(F64)

    def halfway(objective, start):
        return start + 0.5

    result = settled(case, halfway)
    velocity = case.problem.velocity(result.params, case.meta_params)["phi"]
    assert result.phases[0].residual == pytest.approx(velocity.norm().item(), rel=1e-12)


def short(objective, x):
    """Twenty steps: each call takes about five sixths off the slowest residual of the ridge."""
    for _ in range(20):
        x = x - 0.2 * objective.gradient(x)
    return x


def test_calls_go_on_to_the_tolerance_while_they_help():
    case = ridge_case(F64)
    result = settled(case, short, solver_options={"max_steps": 50, "tol": 1e-8})
    free = result.phases[0]
    assert free.outcome == "converged"
    assert 2 <= free.steps <= 20
    assert case.relative_error(result.grads) < 0.02  # a hundredth of the nudge is left

    called = []

    def deaf(objective, start):  # returns the same place whatever the start
        called.append(objective.beta)
        return np.ones(4)

    result = settled(case, deaf, solver_options={"max_steps": 50, "tol": 1e-8})
    assert called == [0, 1e-3, -1e-3]
    assert result.status.startswith("stalled: residual")


def test_too_few_calls_are_named():
    result = settled(ridge_case(F64), short, solver_options={"tol": 1e-10})
    assert result.phases[0].outcome == "not converged"
    assert "after 1 step (tol 1e-10)" in result.status


def test_kept_momentum_has_nothing_to_keep():
    case = ridge_case(F64)
    result = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=eg.GradientDescent(lr=0.2, momentum=0.9, tol=1e-10, max_steps=3000),
        estimator=eg.Contrastive(
            beta=1e-3, scheme="symmetric", nudged_solver=eg.BlackBox(bfgs), momentum="keep"
        ),
    )
    assert case.relative_error(result.grads) < 1e-5


# What the learner is handed


def test_gradients_and_values_belong_together():
    """A central difference of value is gradient, with the nudge in both."""
    case, seen = logistic_case(F64), []

    def learner(objective, start):
        x, step = start + 0.3, 1e-5
        differences = [
            (objective.value(x + step * row) - objective.value(x - step * row)) / (2 * step)
            for row in np.eye(len(x))
        ]
        value, gradient = objective.value_and_gradient(x)
        np.testing.assert_allclose(differences, gradient, rtol=1e-6)
        np.testing.assert_array_equal(gradient, objective.gradient(x))
        params = {"w": torch.as_tensor(x)}
        inner = case.problem.evaluate("inner", params, case.meta_params)
        outer = case.problem.outer_loss(params, case.meta_params)
        assert value == objective.value(params) == (inner + objective.beta * outer).item()
        seen.append(objective.beta)
        return start

    settled(case, learner)
    assert seen == [0, 1e-3, -1e-3]


def test_names_and_vectors():
    """Named params come in the order, shapes and dtypes of the params, and go back."""
    seen = []

    def learner(objective, start):
        named = objective.named(np.arange(5.0))
        assert {n: t.tolist() for n, t in named.items()} == {"a": 0.0, "b": [[1.0, 2], [3, 4]]}
        assert named["b"].dtype == torch.float32
        assert objective.flat(named).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert objective.meta_params["c"].item() == 3
        seen.append(start)
        return named

    params = {"a": torch.zeros((), dtype=F64), "b": torch.ones(2, 2)}
    result = eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (p["a"] - m["c"]).square() + p["b"].square().sum(),
            lambda p, m: p["a"] + p["b"].sum(),
        ),
        params,
        {"c": torch.tensor(3.0)},
        solver=eg.BlackBox(learner),
        estimator=eg.Contrastive(matched=False, scheme="forward"),
    )
    assert seen[0].tolist() == [0, 1, 1, 1, 1]
    assert result.params["b"].tolist() == [[1, 2], [3, 4]]
    assert params["b"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.tolist(),
        lambda x: tuple(x),
        lambda x: x[None, ::-1][:, ::-1],
        lambda x: x.astype(">f8"),
        lambda x: torch.as_tensor(x).requires_grad_(),
        lambda x: {"w": x},
        lambda x: {"w": torch.as_tensor(x, dtype=torch.float32)[:, None]},
    ],
)
def test_whatever_form_the_vector_has(form):
    result = settled(ridge_case(F64), lambda objective, start: form(np.array([1.0, 2.0, 3.0, 4.5])))
    assert result.params["w"].tolist() == [1, 2, 3, 4.5]


def test_vectors_are_tensors_without_numpy(monkeypatch):
    def without(tensor):
        raise RuntimeError("Numpy is not available")

    def learner(objective, x):
        for _ in range(300):
            x = x - 0.3 * objective.gradient(x)
        assert type(x) is torch.Tensor
        return x

    monkeypatch.setattr(torch.Tensor, "numpy", without)
    case = ridge_case(F64)
    assert case.relative_error(settled(case, learner).grads) < 1e-5


def test_autograd_works_inside_the_learner():
    def learner(objective, start):
        w = objective.named(start)["w"].requires_grad_()
        loss = case.problem.evaluate("inner", {"w": w}, objective.meta_params)
        loss = loss + objective.beta * case.problem.outer_loss({"w": w}, objective.meta_params)
        gradient = torch.autograd.grad(loss, w)[0].numpy()
        np.testing.assert_allclose(gradient, objective.gradient(start), rtol=1e-12)
        return bfgs(objective, start)

    case = ridge_case(F64)
    assert case.relative_error(settled(case, learner).grads) < 1e-5


def test_torch_draws_are_the_same_in_every_phase_and_go_on_within_one():
    draws = {}

    def learner(objective, start):
        drawn = draws.setdefault(objective.beta, [])
        for _ in range(3):
            objective.gradient(start)
            drawn.append(torch.rand(()).item())
        return start

    torch.manual_seed(5)
    settled(ridge_case(F64), learner, matched=False)
    after = torch.rand(())
    assert draws[0] == draws[1e-3] == draws[-1e-3]
    assert len(set(draws[0])) == 3  # evaluating a loss seeds generators, but not the learner's
    torch.manual_seed(5)
    torch.randint(2**62, ())  # the one draw that a meta-gradient takes
    assert after == torch.rand(())


# What cannot work is named


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, eg.ProblemError, "β = 0 the learner returned NoneType.*Give an array"),
        (np.ones(3), eg.ProblemError, r"the learner returned shape \(3,\), but \(4,\) is needed"),
        (np.ones((2, 2)), eg.ProblemError, r"shape \(2, 2\), but \(4,\) is needed"),
        ({"v": np.ones(4)}, eg.ProblemError, "returned 'v', but the params are 'w'"),
        ({"w": np.ones(5)}, eg.ProblemError, r"for 'w' shape \(5,\), but \(4,\) is needed"),
        ({"w": None}, eg.ProblemError, "for 'w' NoneType, which cannot be read as numbers"),
        (np.array([1, 2, 3, np.nan]), eg.SettlingError, "NaN or infinite values for 'w'.*Limit"),
        ([1, 2, 3, float("inf")], eg.SettlingError, "NaN or infinite"),
        ((np.ones(4), "done"), eg.ProblemError, "returned tuple, which cannot be read as numbers"),
        ("best", eg.ProblemError, "returned str, which cannot be read as numbers"),
        (minimize(lambda x: x @ x, [1.0]), eg.ProblemError, r"return result\.x"),
    ],
)
def test_what_a_learner_must_not_return(returned, error, message):
    with pytest.raises(error, match=message):
        settled(ridge_case(F64), lambda objective, start: returned)


def test_a_vector_that_does_not_fit_the_objective():
    with pytest.raises(eg.ProblemError, match=r"the objective got shape \(2,\), but \(4,\)"):
        settled(ridge_case(F64), lambda objective, start: objective.value([1.0, 2.0]))


def test_a_learner_that_raises_is_named_with_its_phase():
    def learner(objective, start):
        if objective.beta:
            raise ZeroDivisionError("no more steps")
        return start

    with pytest.raises(
        eg.SettlingError, match=r"ZeroDivisionError in the phase with β = 0\.001: no more steps$"
    ) as caught:
        settled(ridge_case(F64), learner)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_interrupt_passes():
    def learner(objective, start):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settled(ridge_case(F64), learner)


@pytest.mark.parametrize("scheme", ["forward", "symmetric"])
def test_a_learner_that_ignores_the_nudge(scheme):
    result = settled(ridge_case(F64), lambda objective, start: np.ones(4), scheme=scheme)
    assert "the learner did not respond to the nudge" in result.status
    assert "weigh the outer loss by objective.beta in its own" in result.status
    assert "too small for torch" not in result.status


def test_a_learner_that_answers_half_the_nudge():
    """From the exact solution, one step of half the curvature leaves half of it."""
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - m["c"]).square().sum(), lambda p, m: p["w"].sum()
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.ones(2, dtype=F64)},
        {"c": torch.ones(2, dtype=F64)},
        solver=eg.BlackBox(lambda objective, x: x - 0.5 * objective.gradient(x)),
    )
    assert re.search(
        "with β=-?0.01 the learner ended with a residual of 50% of the nudge", result.status
    )
    torch.testing.assert_close(result.grads["c"], torch.full((2,), 0.5, dtype=F64))


def test_an_outer_loss_that_does_not_push():
    """Both losses are minimal at the same place: the learner rests, and is not blamed for it."""
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: (p["w"] - 1).square().sum()
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=F64)},
        {"c": torch.ones(2, dtype=F64)},
        solver=eg.BlackBox(lambda objective, x: np.ones(2)),
    )
    assert result.grads["c"].tolist() == [0, 0]
    assert "the learner" not in result.status


def test_mini_batches_are_refused():
    problem = eg.Bilevel(
        lambda p, m, b: (p["w"] - m["c"] - b).square().sum(),
        lambda p, m: p["w"].sum(),
        inner_batches=[0.0, 1.0],
    )
    with pytest.raises(
        eg.ConfigurationError, match="BlackBox needs the same loss at every evaluation"
    ):
        eg.meta_gradient(
            problem, {"w": torch.ones(1)}, {"c": torch.ones(1)}, solver=eg.BlackBox(bfgs)
        )


@pytest.mark.parametrize("learner", [None, "BFGS", Ridge])
def test_a_learner_that_is_no_function(learner):
    with pytest.raises(eg.ConfigurationError, match="minimize must be a function"):
        eg.BlackBox(learner)


def test_the_limits_of_any_solver_hold():
    with pytest.raises(
        eg.ConfigurationError, match="max_steps must be a whole number of at least 1"
    ):
        eg.BlackBox(bfgs, max_steps=0)
    assert eg.BlackBox(bfgs).max_steps == 1


def test_a_learner_cannot_change_the_users_theta():
    def spoil(objective, start):
        objective.meta_params["c"].add_(1)
        return objective.flat({"w": objective.meta_params["c"]})

    c = torch.ones(2, dtype=F64)
    eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: p["w"].square().sum()
        ),
        {"w": torch.zeros(2, dtype=F64)},
        {"c": c},
        solver=eg.BlackBox(spoil),
        estimator=eg.Contrastive(),
    )
    assert torch.equal(c, torch.ones(2, dtype=F64))
