# pyright: basic, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
"""What has settled, as ordinary tensors in a graph."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import equigrad as eg
from equigrad.errors import SettlingWarning

F64 = torch.float64
TIGHT = eg.LBFGS(tol=1e-11, max_steps=500)
EXACT = [
    eg.Contrastive(beta=1e-3),
    eg.Contrastive(beta=1e-2, scheme="symmetric", points=4),
    eg.ConjugateGradient(tol=1e-13),
    eg.ConjugateGradient(tol=1e-9, products="contrast"),
    eg.ExactSolve(),
    eg.GMRES(tol=1e-13),
]


def data():
    torch.manual_seed(0)
    return torch.randn(8, 3, dtype=F64), torch.randn(8, dtype=F64)


def ridge(p, m):
    """Two params, of which one is a scalar; not quadratic."""
    a, y = data()
    fit = torch.tanh(a @ p["w"]) + p["b"] - y
    return 0.5 * fit.square().sum() + 0.5 * (m["s"].exp() * p["w"].square()).sum()


def start():
    return {"w": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}


def strengths():
    return torch.tensor([0.1, 0.5, -0.3], dtype=F64, requires_grad=True)


def settled(s, estimator=None, solver=TIGHT, **more):
    return eg.argmin(ridge, start(), {"s": s}, solver=solver, estimator=estimator, **more)


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: f"{type(e).__name__}")
def test_gradcheck(estimator):
    assert gradcheck(
        lambda s: tuple(settled(s, estimator).values()), (strengths(),), atol=3e-6, rtol=1e-5
    )


@pytest.mark.parametrize("estimator", [eg.Adjoint(), eg.GMRES(tol=1e-13), eg.ExactSolve()])
@pytest.mark.parametrize("samples", [True, False])
def test_gradcheck_of_a_fixed_point(estimator, samples):
    torch.manual_seed(1)
    w = (0.3 * torch.randn(3, 3, dtype=F64)).requires_grad_()
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)

    def rest(w, x):
        return eg.fixed_point(
            lambda p, m: {"h": torch.tanh(p["h"] @ m["w"] + m["x"])},
            {"h": torch.zeros(4, 3, dtype=F64)},
            {"w": w, "x": x},
            solver=eg.Anderson(tol=1e-12),
            estimator=estimator,
            samples=samples,
        )["h"]

    assert gradcheck(rest, (w, x), atol=2e-5)


@pytest.mark.parametrize("estimator", [eg.Contrastive(beta=1e-3), eg.ConjugateGradient(tol=1e-13)])
def test_samples_side_by_side_are_samples_one_by_one(estimator):
    torch.manual_seed(2)
    target, scale = torch.randn(5, 3, dtype=F64), torch.rand(3, dtype=F64).requires_grad_()
    force = torch.randn(5, 3, dtype=F64)

    def loss(p, m):
        return (p["h"] - m["t"]).square().sum() + (m["c"] * p["h"].cosh()).sum()

    def settle(rows):
        fit = eg.argmin(
            loss,
            {"h": torch.zeros(len(rows), 3, dtype=F64)},
            {"t": target[rows], "c": scale},
            solver=eg.GradientDescent(lr=0.1, tol=1e-12, check_every=1),
            estimator=estimator,
            samples=True,
        )
        (grad,) = torch.autograd.grad((fit["h"] * force[rows]).sum(), scale)
        return fit, grad

    fit, together = settle([*range(5)])
    assert fit.phase.residuals.shape == (5,)
    apart = [settle([i]) for i in range(5)]
    torch.testing.assert_close(fit["h"], torch.cat([f["h"] for f, _ in apart]), atol=1e-11, rtol=0)
    torch.testing.assert_close(together, sum(g for _, g in apart), atol=0, rtol=1e-5)


def test_it_is_the_meta_gradient_of_whatever_is_computed():
    s = strengths()
    for estimator in (eg.ConjugateGradient(tol=1e-13), eg.Unrolled()):
        solver = eg.GradientDescent(lr=0.05, max_steps=300)

        def outer(p, m):
            return (p["w"].exp().sum() - p["b"]).square() + m["s"].sum()

        problem = eg.Bilevel(ridge, outer)
        direct = eg.meta_gradient(problem, start(), {"s": s}, solver=solver, estimator=estimator)
        fit = settled(s, estimator, solver)
        (grad,) = torch.autograd.grad(outer(fit, {"s": s}), s)
        torch.testing.assert_close(grad, direct.grads["s"], atol=0, rtol=1e-11)
        assert fit.phase == direct.phases[0]


def test_several_uses_unused_outputs_and_a_second_backward():
    s = strengths()
    fit = settled(s, eg.ConjugateGradient(tol=1e-13))
    (once,) = torch.autograd.grad(fit["w"].sum(), s, retain_graph=True)
    (again,) = torch.autograd.grad(fit["w"].sum(), s, retain_graph=True)
    assert torch.equal(once, again)
    (both,) = torch.autograd.grad(fit["w"].sum() + 3 * fit["b"], s, retain_graph=True)
    (other,) = torch.autograd.grad(fit["b"], s)
    torch.testing.assert_close(both, once + 3 * other, atol=0, rtol=1e-10)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_scale_of_a_loss_changes_nothing(size):
    s = strengths()
    fit = settled(s)
    (grad,) = torch.autograd.grad(size * fit["w"].sum(), s)
    (unit,) = torch.autograd.grad(settled(s)["w"].sum(), s)
    torch.testing.assert_close(grad, size * unit, atol=0, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_cotangent_that_vanished_or_overflowed_passes_through(value):
    s = strengths()
    (grad,) = torch.autograd.grad(value * settled(s)["w"].sum(), s)
    assert bool(torch.isnan(grad).all()) == (value != 0)
    assert value or not grad.any()


def nested(estimator, outer_estimator):
    """An outer argmin whose loss needs an inner one; θ → u → v."""

    def below(p, m):
        return (p["v"] - torch.tanh(m["u"])).square().sum() + 0.5 * p["v"].square().sum()

    def loss(p, m):
        v = eg.argmin(
            below,
            {"v": torch.zeros(2, dtype=F64)},
            {"u": p["u"]},
            solver=TIGHT,
            estimator=estimator,
        )["v"]
        return (v - m["t"]).square().sum() + 0.1 * (p["u"] - 1).square().sum()

    return lambda t: eg.argmin(
        loss,
        {"u": torch.zeros(2, dtype=F64)},
        {"t": t},
        solver=eg.GradientDescent(lr=0.7, tol=1e-9),
        estimator=outer_estimator,
    )


@pytest.mark.parametrize(
    "inner", [eg.Contrastive(beta=1e-2, points=4), eg.ExactSolve(), eg.GMRES()]
)
def test_nested(inner):
    t = torch.tensor([0.2, -0.1], dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(nested(inner, eg.Contrastive(beta=1e-3))(t)["u"].sum(), t)

    def closed(u, t):  # the inner argmin is (2/3) tanh u
        return (2 / 3 * torch.tanh(u) - t).square().sum() + 0.1 * (u - 1).square().sum()

    exact = eg.meta_gradient(
        eg.Bilevel(lambda p, m: closed(p["u"], m["t"]), lambda p, m: p["u"].sum()),
        {"u": torch.zeros(2, dtype=F64)},
        {"t": t},
        solver=TIGHT,
        estimator=eg.ExactSolve(),
    ).grads["t"]
    torch.testing.assert_close(grad, exact, atol=0, rtol=1e-4)


def test_nested_takes_products_by_contrast_where_they_need_second_derivatives():
    t = torch.tensor([0.2, -0.1], dtype=F64, requires_grad=True)
    u = nested(eg.ExactSolve(), eg.GMRES())(t)
    (grad,) = torch.autograd.grad(u["u"].sum(), t)
    assert "products by contrast" in u.gradient.status
    other = nested(eg.ExactSolve(), eg.Contrastive(beta=1e-3))(t)
    torch.testing.assert_close(grad, *torch.autograd.grad(other["u"].sum(), t), atol=0, rtol=1e-4)


def test_a_tensor_that_nobody_handed_over_is_refused():
    encoder = nn.Linear(2, 3).double()
    features = encoder(torch.ones(4, 2, dtype=F64))

    def loss(p, m):
        return (features @ p["w"] - 1).square().sum() + m["s"] * p["w"].square().sum()

    w, s = {"w": torch.zeros(3, dtype=F64)}, torch.ones((), dtype=F64, requires_grad=True)
    with pytest.raises(eg.ProblemError, match=r"require a gradient and are not in meta_params"):
        eg.argmin(loss, w, {"s": s}, solver=TIGHT)

    def handed(p, m):
        return (m["x"] @ p["w"] - 1).square().sum() + m["s"] * p["w"].square().sum()

    eg.argmin(handed, w, {"s": s, "x": features}, solver=TIGHT)["w"].sum().backward()
    assert encoder.weight.grad.any()
    with torch.no_grad():
        eg.argmin(loss, w, {"s": s}, solver=TIGHT)


def test_data_among_the_meta_parameters():
    a, y = data()
    s = torch.zeros((), dtype=F64, requires_grad=True)
    labels = (y > 0).long()

    def loss(p, m):
        logits = m["x"] @ p["w"]
        return nn.functional.cross_entropy(logits, m["y"]) + m["s"].exp() * p["w"].square().sum()

    fit = eg.argmin(
        loss,
        {"w": torch.zeros(3, 2, dtype=F64)},
        {"x": a, "s": s, "y": labels},
        solver=TIGHT,
    )
    fit["w"].square().sum().backward()
    assert s.grad < 0


def test_a_loss_that_is_no_function_is_named():
    generator = torch.Generator().manual_seed(0)

    def noisy(p, m):
        noise = 0.1 * torch.randn(3, generator=generator, dtype=F64)
        return (p["w"] - m["t"] + noise).square().sum()

    def call():
        t = torch.ones(3, dtype=F64, requires_grad=True)
        solver = eg.GradientDescent(lr=0.1, max_steps=20)
        return eg.argmin(noisy, {"w": torch.zeros(3, dtype=F64)}, {"t": t}, solver=solver).status

    for _ in range(2):
        assert "inner_loss is not a function of params and step alone" in call()


def test_without_gradients_the_result_is_the_same():
    s = strengths()
    whole = settled(s)
    assert whole["w"].requires_grad
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            fit = settled(s)
        assert torch.equal(fit["w"], whole["w"].detach())
        assert not fit["w"].requires_grad
        assert "no graph leads to θ" in fit.status
    assert not settled(s.detach())["w"].requires_grad
    assert "no graph" not in whole.status


def test_second_derivatives_are_refused_by_name():
    s = strengths()
    (grad,) = torch.autograd.grad(settled(s)["w"].sum(), s, create_graph=True)
    with pytest.raises(eg.DoubleBackwardError, match=r"argmin\(ridge\).*create_graph=True"):
        grad.sum().backward()


class Once(torch.autograd.Function):
    """x², whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        return 2 * ctx.saved_tensors[0] * grad


def test_no_gradient_is_differentiated():
    s = strengths()
    fit = eg.argmin(
        lambda p, m: Once.apply(p["w"] - 1).sum() + (m["s"] * p["w"].square()).sum(),
        {"w": torch.zeros(3, dtype=F64)},
        {"s": s},
        solver=eg.GradientDescent(lr=0.1, tol=1e-10),
        estimator=eg.Contrastive(beta=1e-4),
    )
    (grad,) = torch.autograd.grad(fit["w"].sum(), s)
    torch.testing.assert_close(grad, -1 / (1 + s.detach()).square(), atol=0, rtol=1e-5)


def test_both_reports_are_there():
    s = strengths()
    fit = settled(s, eg.Contrastive(beta=0.01))
    assert fit.phase.outcome == "converged"
    assert fit.status.startswith("converged: residual")
    assert fit.gradient is None
    (3 * fit["w"].sum()).backward()
    report = fit.gradient
    assert torch.equal(report.grads["s"], s.grad)
    assert [phase.beta for phase in report.phases] == [0, 0.01, -0.01]
    assert report.outer_loss == pytest.approx(3 * fit["w"].sum().item())
    exact = strengths()
    (3 * settled(exact, eg.ExactSolve())["w"].sum()).backward()
    error = ((s.grad - exact.grad).norm() / exact.grad.norm()).item()
    assert error <= report.error_estimate < 1e-3


@pytest.mark.parametrize("scheme", [("symmetric", 2), ("forward", 2)])
def test_the_error_of_a_contrast_is_estimated_though_its_outer_loss_is_linear(scheme):
    s, exact = strengths(), strengths()
    fit = settled(s, eg.Contrastive(beta=0.03, scheme=scheme[0], points=scheme[1]))
    fit["w"].cumsum(0).sum().backward()
    settled(exact, eg.ExactSolve())["w"].cumsum(0).sum().backward()
    error = ((s.grad - exact.grad).norm() / exact.grad.norm()).item()
    assert 0.3 * error < fit.gradient.error_estimate < 3 * error


def test_what_does_not_settle_warns_once_with_its_name():
    def slow(p, m):
        return (p["w"] - m["t"]).square().sum()

    def call():
        fit = eg.argmin(
            slow,
            {"w": torch.zeros(2)},
            {"t": torch.ones(2, requires_grad=True)},
            solver=eg.GradientDescent(lr=1e-3, max_steps=5, tol=1e-6),
        )
        fit["w"].sum().backward()
        return fit

    with pytest.warns(SettlingWarning) as said:
        fit = call()
    names = [str(w.message) for w in said]
    assert len(names) == 2
    assert "slow) not converged: residual" in names[0]
    assert "the backward pass of argmin(" in names[1]
    assert said[0].filename == __file__
    assert "not converged" in fit.status
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_a_learner_that_diverges_is_named():
    with pytest.raises(eg.SettlingError, match=r"argmin\(ridge\): the phase.*diverged"):
        settled(strengths(), solver=eg.GradientDescent(lr=1e9, max_steps=5000))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": {}}, eg.ProblemError, "start is empty"),
        ({"start": {"w": 1.0}}, eg.ProblemError, r"start\['w'\] must be a tensor"),
        (
            {"start": torch.ones(3)},
            eg.ProblemError,
            "start must be a dictionary from names to tensors",
        ),
        (
            {"meta_params": nn.Linear(2, 2)},
            eg.ProblemError,
            "meta_params must be a dictionary from names",
        ),
        ({"meta_params": {}}, eg.ProblemError, "meta_params is empty"),
        ({"meta_params": {"s": 0.5}}, eg.ProblemError, r"meta_params\['s'\] must be a tensor"),
        (
            {"meta_params": {"s": torch.ones(3, device="meta")}},
            eg.ProblemError,
            r"meta_params\['s'\] is on .*meta",
        ),
        (
            {"meta_params": {"s": strengths(), "z": torch.ones(1, requires_grad=True)}},
            eg.ProblemError,
            "depends on meta-parameter 'z'",
        ),
        (
            {"start": {n: p.requires_grad_() for n, p in start().items()}},
            eg.ProblemError,
            "start 'w', 'b' requires a gradient.*does not depend on it.*Unrolled",
        ),
        ({"samples": True}, eg.ProblemError, r"dimension of all params.*'w' \(3,\), 'b' \(\)"),
        ({"solver": None}, eg.ConfigurationError, "solver"),
        ({"estimator": 3}, eg.ConfigurationError, "estimator"),
        ({"estimator": eg.LeastControl()}, eg.ConfigurationError, "argmin has only ∂L/∂φ"),
        ({"estimator": eg.Reptile()}, eg.ConfigurationError, "Reptile.*use FirstOrderMAML"),
        ({"estimator": eg.MAML()}, eg.ProblemError, "with respect to the initialisation"),
        ({"inner_loss": lambda p, m: p["w"] * m["s"]}, eg.ProblemError, "must return a scalar"),
        ({"inner_loss": 3}, eg.ConfigurationError, "inner_loss must be a function"),
    ],
)
def test_bad_input(arguments, error, message):
    given = {
        "inner_loss": ridge,
        "start": start(),
        "meta_params": {"s": strengths()},
        "solver": TIGHT,
    }
    with pytest.raises(error, match=message):
        eg.argmin(**(given | arguments))


@pytest.mark.parametrize("place", [{"device": "cpu"}, {"device": "meta"}])
def test_a_cotangent_of_another_shape_or_device_is_a_sentence(place):
    fit = eg.argmin(ridge, start(), {"s": strengths()}, solver=eg.LBFGS(tol=1e-9))
    shape = fit["w"].shape if place["device"] == "meta" else (7,)
    expected = "expected device cpu but got meta" if place["device"] == "meta" else "has a shape of"
    with pytest.raises(RuntimeError, match=expected):
        fit["w"].backward(torch.ones(shape, dtype=fit["w"].dtype, **place))


def test_a_map_refuses_what_needs_an_energy():
    with pytest.raises(eg.ConfigurationError, match="Contrastive needs an inner loss"):
        eg.fixed_point(
            lambda p, m: {"h": 0.5 * p["h"] + m["b"]},
            {"h": torch.zeros(2)},
            {"b": torch.ones(2, requires_grad=True)},
            solver=eg.Picard(),
            estimator=eg.Contrastive(),
        )


def test_meta_parameters_that_change_before_backward_are_noticed():
    s = strengths()
    fit = settled(s)
    with torch.no_grad():
        s.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit["w"].sum().backward()


@pytest.mark.parametrize("estimator", [eg.Unrolled(), eg.Unrolled(segment=3), eg.MAML()])
def test_a_start_that_is_learned(estimator):
    first = {n: p.add(0.1).requires_grad_() for n, p in start().items()}
    s = strengths()
    fit = settled_from(first, s, estimator)
    found = torch.autograd.grad(fit["w"].sum() + fit["b"].square(), [*first.values(), s])
    p = dict(first)
    for _ in range(8):
        slopes = torch.autograd.grad(ridge(p, {"s": s}), [*p.values()], create_graph=True)
        p = {n: t - 0.05 * g for (n, t), g in zip(p.items(), slopes, strict=True)}
    exact = torch.autograd.grad(p["w"].sum() + p["b"].square(), [*first.values(), s])
    torch.testing.assert_close(found, exact, atol=0, rtol=1e-12)


def test_a_start_that_is_among_the_meta_parameters():
    """From θ, in a valley towards θ: both paths count."""
    theta = {"w": torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)}

    def loss(p, m):
        return 0.5 * (p["w"] - 3).square().sum() + 0.5 * (p["w"] - m["w"]).square().sum()

    solver = eg.GradientDescent(lr=0.1, max_steps=2)
    fit = eg.argmin(loss, theta, theta, solver=solver, estimator=eg.Unrolled())
    (grad,) = torch.autograd.grad(fit["w"].sum(), theta["w"])
    # w ← 0.8 w + 0.1 θ + 0.3, twice from θ
    torch.testing.assert_close(grad, torch.full((2,), 0.9 * 0.8 + 0.1, dtype=F64))
    fit = eg.argmin(
        lambda p, m: loss(p, {"w": 0}), theta, theta, solver=solver, estimator=eg.MAML()
    )
    (grad,) = torch.autograd.grad(fit["w"].sum(), theta["w"])
    torch.testing.assert_close(grad, torch.full((2,), 0.64, dtype=F64))


def settled_from(first, s, estimator):
    solver = eg.GradientDescent(lr=0.05, max_steps=8)
    return eg.argmin(ridge, first, {"s": s}, solver=solver, estimator=estimator)


def test_noise_and_batch_statistics_are_those_of_the_forward_pass():
    torch.manual_seed(3)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    net.requires_grad_(False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    a, y = data()
    weights = {n: p.clone() for n, p in net.named_parameters()}
    s = torch.zeros((), dtype=F64, requires_grad=True)

    def loss(p, m):
        error = torch.func.functional_call(net, p, a).squeeze() - y
        return error.square().mean() + m["s"].exp() * sum(w.square().sum() for w in p.values())

    solver = eg.GradientDescent(lr=0.1, max_steps=20)
    fit = eg.argmin(loss, weights, {"s": s}, solver=solver, estimator=eg.T1T2())
    torch.rand(7)
    with pytest.warns(eg.SettlingWarning, match="replacing the inverse Hessian by the identity"):
        (grad,) = torch.autograd.grad(fit["2.weight"].sum(), s, retain_graph=True)
    torch.rand(7)
    (again,) = torch.autograd.grad(fit["2.weight"].sum(), s)
    assert torch.equal(grad, again)
    assert grad.abs() > 1e-4
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_autocast_lowers_the_inner_loss_alone_in_both_passes():
    seen = []

    def loss(p, m):
        product = torch.ones(4, 3) @ p["w"]
        seen.append(product.dtype)
        return (product.float() - m["t"]).square().mean()

    t = torch.ones(4, 1, requires_grad=True)
    w = {"w": torch.zeros(3, 1)}
    exact = {"estimator": eg.GMRES(tol=1e-3)}
    with torch.autocast("cpu", torch.bfloat16):
        fit = eg.argmin(loss, w, {"t": t}, solver=eg.GradientDescent(lr=0.1, max_steps=50), **exact)
    assert fit["w"].dtype == torch.float32
    fit["w"].sum().backward()
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(t.grad, torch.full((4, 1), 0.25), atol=0.02, rtol=0)
    seen.clear()
    fit = eg.argmin(loss, w, {"t": t}, solver=eg.GradientDescent(lr=0.1, max_steps=50), **exact)
    with torch.autocast("cpu", torch.bfloat16):
        fit["w"].sum().backward()
    assert set(seen) == {torch.float32}


def test_mini_batches():
    a, y = data()
    s = strengths()

    def loss(p, m, batch):
        x, t = batch
        return 0.5 * (x @ p["w"] - t).square().mean() + 0.5 * (m["s"].exp() * p["w"] ** 2).sum()

    fit = eg.argmin(
        loss,
        {"w": torch.zeros(3, dtype=F64)},
        {"s": s},
        solver=eg.GradientDescent(lr=1e-3, max_steps=20000),
        batches=[(a[:4], y[:4]), (a[4:], y[4:])],
        estimator=eg.ConjugateGradient(),
    )
    (grad,) = torch.autograd.grad(fit["w"].sum(), s)
    hessian = a.T @ a / 8 + s.detach().exp().diag()
    w = torch.linalg.solve(hessian, a.T @ y / 8)
    exact = -torch.linalg.solve(hessian, torch.ones(3, dtype=F64)) * s.detach().exp() * w
    torch.testing.assert_close(grad, exact, atol=0, rtol=1e-3)


def test_what_the_graph_keeps_is_freed_with_the_result():
    gc.disable()
    try:
        fit = settled(strengths())
        fit["w"].sum().backward()
        gone = weakref.ref(fit)
        report = weakref.ref(fit.gradient)
        del fit
        assert gone() is None
        assert report() is None
    finally:
        gc.enable()


def test_what_the_graph_keeps_does_not_grow_with_the_steps():
    def kept(steps):
        held = []
        pack = torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.append(t.numel()) or t, lambda t: t
        )
        s, solver = strengths(), eg.GradientDescent(lr=0.05, max_steps=steps)
        with pack:
            fit = settled(s, solver=solver)
        return sum(held[-3:]), fit

    few, _ = kept(10)
    assert few == kept(200)[0] == 3 + 1 + 3


class Solved(nn.Module):
    """A layer that solves for its output."""

    def __init__(self):
        super().__init__()
        self.log_strength = nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x):
        fit = eg.argmin(
            lambda p, m: (
                (p["h"] - m["x"]).square().sum() + (m["s"].exp() * p["h"].square().square()).sum()
            ),
            {"h": x.detach().clone()},
            {"x": x, "s": self.log_strength},
            solver=eg.GradientDescent(lr=0.05, tol=1e-10),
            samples=True,
        )
        return fit["h"]


def test_it_stands_in_a_network_that_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3).double(), nn.Tanh(), Solved(), nn.Linear(3, 1).double())
    x = torch.randn(6, 2, dtype=F64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(x).squeeze() - x.prod(dim=1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.any() for p in net.parameters())
    assert losses[-1] < 0.8 * losses[0]
