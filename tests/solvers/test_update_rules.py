# pyright: basic, reportArgumentType=false
"""Torch's optimisers, step by step: the derivative of where they arrive, and of their settings."""

import math
from typing import Any

import pytest
import torch

import equigrad as eg
from equigrad.solvers.update_rules import UPDATE_RULES

F64 = torch.float64
O = torch.optim  # noqa: E741
STEPS = 10
CASES = [
    (O.SGD, {"lr": 0.05}),
    (O.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (O.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (O.SGD, {"lr": 0.01, "momentum": 0.5, "maximize": True}),
    (O.Adam, {"lr": 0.05, "betas": (0.8, 0.95)}),
    (O.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1, "eps": 1e-3}),
    (O.Adam, {"lr": 0.01, "maximize": True}),
    (O.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
    (O.RMSprop, {"lr": 0.02, "weight_decay": 0.1}),
    (O.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True, "alpha": 0.9}),
    (O.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2}),
    (O.Adagrad, {"lr": 0.1, "weight_decay": 0.1}),
    (O.Adamax, {"lr": 0.1, "weight_decay": 0.1}),
    (O.NAdam, {"lr": 0.1, "momentum_decay": 0.01}),
    (O.NAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (O.RAdam, {"lr": 0.1, "betas": (0.9, 0.95)}),
    (O.RAdam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]
NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "alpha", "lr_decay", "momentum_decay")

case = pytest.mark.parametrize(
    ("optimizer", "options"), CASES, ids=[f"{o.__name__}-{i}" for i, (o, _) in enumerate(CASES)]
)


@pytest.fixture(autouse=True)
def _double():
    """NAdam keeps a product in torch's default precision."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def data():
    torch.manual_seed(0)
    return torch.randn(6, 3), torch.randn(6)


def inner_loss(p, m, rows):
    a, y = data()
    fit = torch.tanh(a[rows] @ p["w"]) + p["c"] - y[rows]
    return 0.5 * fit.square().sum() + 0.5 * (m["s"].exp() * p["w"].square()).sum()


def outer_loss(p, m):
    return (data()[0] @ p["w"] - 1).square().sum() + p["c"] ** 3 + m["s"].sum()


def problem():
    return eg.Bilevel(inner_loss, outer_loss, inner_batches=[slice(0, 3), slice(3, 6)])


def start():
    return {"w": torch.full((3,), 0.1), "c": torch.zeros(())}


def strengths():
    return {"s": torch.tensor([0.3, -0.5, 0.1], requires_grad=True)}


def solver(optimizer, options, **more):
    return eg.TorchOptimizer(optimizer=optimizer, options=options, max_steps=STEPS, **more)


def gradient(rule, meta, estimator):
    return eg.meta_gradient(problem(), start(), meta, solver=rule, estimator=estimator)


def judged(optimizer, options, s):
    """The outer loss where torch's own optimiser arrives."""
    rule = solver(optimizer, options)
    end = eg.settle(problem(), start(), {"s": s}, solver=rule).params
    return outer_loss(end, {"s": s}).item()


def slope(f, step=2e-3):
    """f'(0) by central differences of order eight."""
    weights = (4 / 5, -1 / 5, 4 / 105, -1 / 280)
    return sum(w * (f(k * step) - f(-k * step)) for k, w in enumerate(weights, 1)) / step


@case
def test_the_rule_arrives_where_torch_does(optimizer, options):
    rule = solver(optimizer, options)
    there = eg.settle(problem(), start(), strengths(), solver=rule).params
    here = eg.settle(problem(), start(), strengths(), solver=rule.recorded()).params
    for name in there:
        torch.testing.assert_close(here[name], there[name], atol=1e-14, rtol=1e-13)


@case
def test_the_gradient_is_that_of_torchs_own_steps(optimizer, options):
    meta = strengths()
    found = gradient(solver(optimizer, options), meta, eg.Unrolled())
    along = torch.tensor([0.6, -0.2, 0.7])
    expected = slope(lambda t: judged(optimizer, options, meta["s"].detach() + t * along))
    assert (found.grads["s"] @ along).item() == pytest.approx(expected, rel=1e-9, abs=1e-10)
    for other in (eg.Unrolled(segment=4), eg.ForwardMode()):
        same = gradient(solver(optimizer, options), meta, other).grads["s"]
        torch.testing.assert_close(same, found.grads["s"], atol=1e-13, rtol=1e-12)


@case
def test_the_gradient_of_every_setting(optimizer, options):
    named = {n: options[n] for n in NUMBERS if options.get(n)}
    meta = strengths() | {n: torch.tensor(v, requires_grad=True) for n, v in named.items()}
    learned = {n: lambda m, step, n=n: m[n] for n in named}
    if "betas" in options:
        meta |= {
            f"b{i}": torch.tensor(b, requires_grad=True) for i, b in enumerate(options["betas"])
        }
        learned["betas"] = lambda m, step: (m["b0"], m["b1"])
    found = gradient(solver(optimizer, options | learned), meta, eg.Unrolled())
    for name, value in named.items():
        expected = slope(
            lambda t, n=name, v=value: judged(optimizer, options | {n: v + t}, meta["s"].detach()),
            step=1e-3 * value,
        )
        assert found.grads[name].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), name
    for i, b in enumerate(options.get("betas", ())):

        def moved(t, i=i):
            betas = [x + t * (i == j) for j, x in enumerate(options["betas"])]
            return judged(optimizer, options | {"betas": tuple(betas)}, meta["s"].detach())

        expected = slope(moved, step=2e-3 * (1 - b))
        assert found.grads[f"b{i}"].item() == pytest.approx(expected, rel=1e-9, abs=1e-9), i


@pytest.mark.parametrize("optimizer", UPDATE_RULES)
def test_a_gradient_of_zero_has_a_finite_derivative(optimizer):
    """Only c of two params has a gradient, and w stays where it is."""
    flat = eg.Bilevel(lambda p, m: (p["c"] - m["s"].sum()).square() + 0 * p["w"].sum(), outer_loss)
    found = eg.meta_gradient(
        flat,
        start(),
        strengths(),
        solver=eg.TorchOptimizer(optimizer=optimizer, options={"lr": 0.1}, max_steps=5),
        estimator=eg.Unrolled(),
    )
    assert found.grads["s"].isfinite().all()
    decay = (1 - 0.1 * 0.01) ** 5 if optimizer is O.AdamW else 1.0
    torch.testing.assert_close(found.params["w"], decay * start()["w"], atol=0, rtol=1e-14)


def rates():
    return strengths() | {
        "lr.w": torch.tensor([0.05, 0.03, 0.02], requires_grad=True),
        "lr.c": torch.tensor(0.04, requires_grad=True),
        "mu": torch.tensor(0.6, requires_grad=True),
    }


def each(m, step):
    """One a weight of w, one for c that decays."""
    return {"w": m["lr.w"], "c": m["lr.c"] * 0.9**step}


def unrolled_by_hand(meta, nesterov):
    p = {n: t.clone().requires_grad_() for n, t in start().items()}
    moves = {n: torch.zeros_like(t) for n, t in p.items()}
    for t in range(STEPS):
        rows = slice(0, 3) if t % 2 == 0 else slice(3, 6)
        grads = torch.autograd.grad(inner_loss(p, meta, rows), [*p.values()], create_graph=True)
        for (n, q), g in zip(p.items(), grads, strict=True):
            moves[n] = meta["mu"] * moves[n] - g
            move = meta["mu"] * moves[n] - g if nesterov else moves[n]
            p[n] = q + (meta["lr.w"] if n == "w" else meta["lr.c"] * 0.9**t) * move
    return torch.autograd.grad(outer_loss(p, meta), [*meta.values()])


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("estimator", [eg.Unrolled(), eg.Unrolled(segment=4), eg.ForwardMode()])
def test_a_rate_for_every_weight_and_step(nesterov, own, estimator):
    settings = {"lr": each, "momentum": lambda m, step: m["mu"], "nesterov": nesterov}
    descent = eg.GradientDescent(**settings, max_steps=STEPS)
    rule = descent if own else solver(O.SGD, settings)
    meta = rates()
    found = gradient(rule, meta, estimator)
    for grad, expected in zip(found.grads.values(), unrolled_by_hand(meta, nesterov), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-11)


def test_adam_with_a_rate_for_every_layer_beats_any_common_rate():
    meta = {"log": torch.full((2,), math.log(0.1), requires_grad=True), **strengths()}
    rule = solver(O.Adam, {"lr": lambda m, step: {"w": m["log"][0].exp(), "c": m["log"][1].exp()}})
    outer = torch.optim.Adam([meta["log"]], lr=0.2)
    for _ in range(30):
        result = gradient(rule, meta, eg.Unrolled())
        result.assign()
        outer.step()
    grid = [10 ** (k / 4) for k in range(-12, 1)]
    common = min(judged(O.Adam, {"lr": lr}, meta["s"].detach()) for lr in grid)
    assert result.outer_loss < common - 0.1


def test_a_schedule_is_that_of_torch_and_serves_every_estimator():
    p = [t.clone().requires_grad_() for t in start().values()]
    adam = O.Adam(p, lr=0.1)
    scheduler = O.lr_scheduler.ExponentialLR(adam, 0.9)
    for t in range(STEPS):
        adam.zero_grad()
        named = dict(zip(start(), p, strict=True))
        inner_loss(named, strengths(), slice(0, 3) if t % 2 == 0 else slice(3, 6)).backward()
        adam.step()
        scheduler.step()
    rule = solver(O.Adam, {"lr": lambda m, step: 0.1 * 0.9**step})
    there = eg.settle(problem(), start(), strengths(), solver=rule).params
    for name, expected in zip(start(), p, strict=True):
        torch.testing.assert_close(there[name], expected.detach(), atol=1e-14, rtol=1e-13)
    whole = eg.Bilevel(lambda p, m: inner_loss(p, m, slice(0, 6)), outer_loss)
    schedule = eg.GradientDescent(lr=lambda m, step: 0.1 * 0.999**step, tol=1e-11)
    contrast, exact = (
        eg.meta_gradient(whole, start(), strengths(), solver=schedule, estimator=estimator)
        for estimator in (eg.Contrastive(beta=1e-4), eg.ExactSolve())
    )
    torch.testing.assert_close(contrast.grads, exact.grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "estimator", [eg.Contrastive(), eg.ConjugateGradient(), eg.T1T2(), eg.Reptile()]
)
def test_estimators_at_equilibrium_refuse_a_rate_by_name(estimator):
    with pytest.raises(eg.ProblemError, match=r"'lr.w', 'lr.c'.*of the solver.*Unrolled\(\) or"):
        gradient(
            eg.GradientDescent(lr=each, max_steps=5),
            {n: m for n, m in rates().items() if n != "mu"},
            estimator,
        )


def test_what_a_rate_does_beside_the_loss_is_left_out_with_a_word():
    result = eg.meta_gradient(
        eg.Bilevel(lambda p, m: inner_loss(p, m, slice(0, 6)), outer_loss),
        start(),
        strengths(),
        solver=eg.GradientDescent(lr=lambda m, t: 0.05 + 1e-3 * m["s"].sum(), tol=1e-9),
    )
    assert "settings of the solver are functions of 's'; the gradient leaves out" in result.status


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (lambda m, step: m["rate"], "lr uses a meta-parameter 'rate', which does not exist"),
        (lambda m, step: m["s"], r"lr is a tensor of shape \(3,\)"),
        (lambda m, step: {"w": 0.1}, "lr lacks a value for params 'c'"),
        (lambda m, step: {"w": torch.ones(2), "c": 1.0}, r"lr for 'w' has shape \(2,\).*\(3,\)"),
    ],
)
def test_a_schedule_that_gives_no_setting_is_named(lr, message):
    for rule in (eg.GradientDescent(lr=lr, max_steps=3), solver(O.Adam, {"lr": lr})):
        with pytest.raises(eg.ConfigurationError, match=message):
            gradient(rule, strengths(), eg.Unrolled())


def test_what_cannot_be_a_schedule_is_refused_when_it_is_made():
    with pytest.raises(
        eg.ConfigurationError, match=r"compile=True.*function of \(meta_params, step\)"
    ):
        eg.GradientDescent(lr=lambda m, step: 0.1, compile=True)
    with pytest.raises(eg.ConfigurationError, match="'nesterov' of SGD cannot be a function"):
        solver(O.SGD, {"lr": 0.1, "nesterov": lambda m, step: True})
    with pytest.raises(eg.ConfigurationError, match=r"'lr' of Adadelta cannot.*SGD, Adam, AdamW"):
        solver(O.Adadelta, {"lr": lambda m, step: 0.1})
    with pytest.raises(eg.ConfigurationError, match="max_steps must be a whole number"):
        eg.GradientDescent(max_steps=lambda m, step: 3)


def test_a_rate_learned_through_an_argmin():
    meta = rates()
    descent = eg.GradientDescent(lr=each, momentum=lambda m, step: m["mu"], max_steps=STEPS)
    end = eg.argmin(
        inner_loss,
        start(),
        meta,
        solver=descent,
        estimator=eg.Unrolled(),
        batches=[slice(0, 3), slice(3, 6)],
    )
    found = torch.autograd.grad(outer_loss(end, meta), [*meta.values()])
    for grad, expected in zip(found, unrolled_by_hand(meta, nesterov=False), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (
            lambda meta: 0.1,
            r"lr is called as lr\(meta_params, step\), but its signature is \(meta\)",
        ),
        (lambda meta, step: None, "returned None. It must return a number"),
        (lambda meta, step: {"w": None}, "It must return a number"),
        (lambda meta, step: [0.1], "It must return a number"),
    ],
)
@pytest.mark.parametrize("adam", [False, True])
def test_a_schedule_that_is_none_is_a_sentence(lr, message, adam):
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["t"]).square().sum(), lambda p, m: p["w"].square().sum()
    )
    options: Any = {"lr": lr}
    solver = (
        eg.TorchOptimizer(optimizer=torch.optim.Adam, options=options, max_steps=3)
        if adam
        else eg.GradientDescent(**options, max_steps=3)
    )
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.meta_gradient(
            problem,
            {"w": torch.zeros(2)},
            {"t": torch.ones(2)},
            solver=solver,
            estimator=eg.Unrolled(),
        )
