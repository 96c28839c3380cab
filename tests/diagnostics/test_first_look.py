"""An inner loss whose gradient is that of no function is named, and no other is."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, relu, softmax

import equigrad as eg
from equigrad.testing import CASES

X, V = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).double().unbind()
Y, W = torch.randn(2, 30, generator=torch.Generator().manual_seed(1)).double().unbind()
DESCENT = eg.GradientDescent(lr=0.1, max_steps=300)
ESTIMATORS = [eg.Contrastive(beta=0.01, scheme="symmetric"), eg.GMRES(), eg.T1T2()]


def temporal_difference(p, m):
    """A target that follows the prediction, held constant."""
    target = (Y + m["bonus"] + 0.9 * V @ p["w"]).detach()
    return (X @ p["w"] - target).square().mean() + 0.1 * (m["bonus"] * p["w"].sum()).mean()


def pseudo_labels(p, m):
    logits = X @ p["w"].reshape(4, 1) @ torch.ones(1, 3).double().cumsum(1) + p["b"]
    labels = softmax(2 * logits, 1).detach()
    pull = (p["w"] - 0.3).square().sum() + (p["b"] - torch.arange(3)).square().sum()
    return cross_entropy(logits, labels) + 0.1 * m["bonus"].exp().mean() * pull


def normalised_without_graph(p, m):
    """Weights over their own norm, which is taken for a constant."""
    with torch.no_grad():
        size = p["w"].norm() + 1
    return (X @ p["w"] / size - Y - m["bonus"]).square().mean() + 0.1 * p["w"].square().sum()


class Doubled(torch.autograd.Function):
    """A custom backward that is wrong by a factor that depends on the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return grads[0] * (1 + 2 * x)


def custom_backward(p, m):
    return (Doubled.apply(X @ p["w"]) - Y - m["bonus"]).square().mean() + p["w"].square().sum()


def semi_gradients(loss):
    params = {"w": torch.zeros(4, dtype=torch.float64)}
    if loss is pseudo_labels:
        params["b"] = torch.zeros(3, dtype=torch.float64)
    problem = eg.Bilevel(loss, lambda p, m: torch.cat([q - 1 for q in p.values()]).square().sum())
    return problem, params, {"bonus": torch.zeros(30, dtype=torch.float64)}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", [temporal_difference, normalised_without_graph, custom_backward])
def test_what_is_hidden_from_autograd_is_refused(loss, estimator):
    with pytest.raises(eg.ProblemError, match=r"hidden from autograd.*FixedPoint"):
        eg.meta_gradient(*semi_gradients(loss), solver=DESCENT, estimator=estimator)


def test_a_gradient_whose_derivative_is_symmetric_serves_the_contrast_alone():
    """`softmax(z) - softmax(2z)` is the gradient of a function, which autograd does not see."""
    problem, params, meta = semi_gradients(pseudo_labels)
    solver = eg.GradientDescent(lr=0.1, max_steps=20000, tol=1e-10)

    def settled(bonus):
        end = eg.settle(problem, params, {"bonus": meta["bonus"] + bonus}, solver=solver)
        return problem.outer_loss(end.params, {}).item()

    found = eg.meta_gradient(
        problem, params, meta, solver=solver, estimator=eg.Contrastive(rtol=1e-4)
    )
    central = (settled(1e-3) - settled(-1e-3)) / 2e-3
    assert found.grads["bonus"].sum().item() == pytest.approx(central, rel=1e-4)
    fresh = eg.Bilevel(lambda p, m: problem.inner_loss(p, m), problem.outer_loss)
    with pytest.raises(eg.ProblemError, match=r"hidden from autograd.*FixedPoint"):
        eg.meta_gradient(fresh, params, meta, solver=solver, estimator=eg.GMRES())


def test_under_a_tolerance_and_in_a_check_too():
    solver = eg.GradientDescent(lr=0.1, max_steps=3000, tol=1e-9)
    problem, params, meta = semi_gradients(normalised_without_graph)
    with pytest.raises(eg.ProblemError, match="FixedPoint"):
        eg.meta_gradient(problem, params, meta, solver=solver, estimator=eg.Contrastive(rtol=1e-3))
    with pytest.raises(eg.ProblemError, match="FixedPoint"):
        eg.check_meta_gradient(problem, params, meta, solver=solver)


def test_evolution_strategies_serve_it():
    result = eg.meta_gradient(
        *semi_gradients(temporal_difference), solver=DESCENT, estimator=eg.EvolutionStrategies()
    )
    assert "hidden from autograd" in result.status


def smooth(m):
    torch.manual_seed(0)
    net = eg.nn.Functional(m)
    x, y = X.to(net.params().popitem()[1].dtype), Y[:, None].to(net.params().popitem()[1].dtype)
    return net, x, y


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Hardtanh(), nn.Linear(8, 1)),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.MaxPool1d(2), nn.Linear(4, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalty", [torch.square, torch.abs])
def test_networks_are_not_accused(make, dtype, penalty):
    net, x, y = smooth(make().to(dtype))
    problem = eg.Bilevel(
        lambda p, m: (
            mse_loss(net(p, x), y) + m["l"].exp() * sum(penalty(q).sum() for q in p.values())
        ),
        lambda p, m: mse_loss(net(p, x + 1), y),
    )
    meta = {"l": torch.tensor(-3.0, dtype=dtype)}
    result = eg.meta_gradient(problem, net.params(), meta, solver=DESCENT)
    assert "autograd" not in result.status
    assert "function of" not in result.status


@pytest.mark.parametrize("case", CASES, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_problems_with_known_answers_are_not_accused(case, dtype):
    known = case(dtype)
    result = eg.meta_gradient(known.problem, known.params, known.meta_params, solver=known.solver)
    assert "autograd" not in result.status
    assert "function of" not in result.status


def test_one_parameter_at_a_kink_is_not_accused():
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - 0.1).square().sum() + m["l"] * relu(p["w"]).sum(),
        lambda p, m: (p["w"] - 1).square().sum(),
    )
    params = {"w": torch.zeros(3, dtype=torch.float64)}
    meta = {"l": torch.ones((), dtype=torch.float64)}
    still = eg.GradientDescent(lr=1e-300, max_steps=1)
    result = eg.meta_gradient(problem, params, meta, solver=still, estimator=eg.T1T2())
    assert "hidden" not in result.status


@pytest.mark.parametrize("estimator", [eg.Contrastive(), eg.GMRES()])
def test_it_costs_four_gradients_once(estimator):
    calls = []

    def loss(p, m):
        calls.append(1)
        return (X @ p["w"] - Y - m["bonus"]).square().mean()

    problem, params, meta = semi_gradients(loss)

    def spent():
        calls.clear()
        result = eg.meta_gradient(problem, params, meta, solver=DESCENT, estimator=estimator)
        return len(calls), result.gradient_evaluations

    (first, counted), (second, counted_again) = spent(), spent()
    # a product with the Hessian that the first gradient has left is a backward alone, and where
    # there is one, two values along a direction are looked at
    assert first - second == (3 + 2 if estimator.traits.double_backward else 4)
    assert counted == counted_again
    problem = eg.Bilevel(loss, problem.outer_loss)
    assert spent() == (second, counted)


@pytest.mark.parametrize("estimator", [ESTIMATORS[0], ESTIMATORS[2]])
@pytest.mark.parametrize(("margin", "size", "seed"), [(11, 64, 2), (13, 64, 0), (14, 512, 1)])
def test_a_softmax_that_is_nearly_sure_is_smooth(margin, size, seed, estimator):
    """In float32 `softmax - 1` moves by whole rounding errors there, or not at all."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(size, generator=generator), torch.randn(10, size, generator=generator)
    w = 0.01 * w
    w[3] += margin * x / x.square().sum()

    def loss(p, m):
        return cross_entropy((p["w"] @ x)[None], torch.tensor([3])) + 0.0 * m["bonus"].sum()

    eg.meta_gradient(
        eg.Bilevel(loss, lambda p, m: p["w"].square().sum()),
        {"w": w},
        {"bonus": torch.zeros(2)},
        solver=eg.GradientDescent(lr=1e-6, max_steps=1),
        estimator=estimator,
    )


def test_a_new_outer_loss_is_looked_at_though_the_inner_one_is_known():
    """The second has its scale hidden from autograd, the third draws random numbers of its own."""
    start = {"w": torch.zeros(4).double()}
    meta = {"l": torch.zeros(()).double()}
    generator = torch.Generator()

    def inner(p, m):
        return (X @ p["w"] - Y).square().mean() + m["l"].exp() * p["w"].square().sum()

    def sound(p, m):
        return (V @ p["w"] - W).square().mean()

    def hiding(p, m):
        return sound(p, m) * p["w"].square().sum().detach()

    def drawing(p, m):
        return sound(p, m) + torch.randn((), generator=generator)

    def said(outer, estimator=None):
        found = eg.meta_gradient(
            eg.Bilevel(inner, outer), start, meta, solver=eg.LBFGS(tol=1e-8), estimator=estimator
        )
        return found.status

    for estimator in (None, eg.ConjugateGradient()):
        assert "outer_loss" not in said(sound, estimator)
        assert "outer_loss does not change as autograd predicts" in said(hiding, estimator)
        assert "outer_loss is not a function of params and step alone" in said(drawing, estimator)
        assert "outer_loss does not change as autograd predicts" in said(hiding, estimator)


def test_an_outer_loss_that_is_known_is_not_looked_at_again():
    calls = []

    def outer(p, m):
        calls.append(1)
        return (V @ p["w"] - W).square().mean()

    def inner(strength):
        return lambda p, m: (
            (X @ p["w"] - Y).square().mean() + strength * m["l"].exp() * p["w"].square().sum()
        )

    def counted(loss):
        calls.clear()
        eg.meta_gradient(
            eg.Bilevel(loss, outer),
            {"w": torch.zeros(4).double()},
            {"l": torch.zeros(()).double()},
            solver=eg.LBFGS(tol=1e-8),
            estimator=eg.ConjugateGradient(),
        )
        return len(calls)

    known = inner(1.0)
    first, again, other = counted(known), counted(known), counted(inner(1.0))
    assert first == again + 4  # two equal calls, and two along a direction
    assert other == again


PENALTIES = {
    "half": lambda s, c, w: (s.exp() + s.exp().detach()) / 2 * w.square().sum(),
    "item": lambda s, c, w: (torch.tensor(s.item()).exp().to(w) + 0 * s) * w.square().sum(),
    "one of two": lambda s, c, w: (
        s.exp() * w.square().sum() + c.detach().exp() * w.pow(4).sum() + 0.01 * c * w.sum()
    ),
}


def of_penalty(penalty, estimator):
    return eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (X @ p["w"] - Y).square().mean() + penalty(m["l"], m["c"], p["w"]),
            lambda p, m: (V @ p["w"] - W).square().mean() + 0 * m["c"],
        ),
        {"w": torch.zeros(4).double()},
        {"l": torch.tensor(-1.0).double(), "c": torch.tensor(-1.0).double()},
        solver=DESCENT,
        estimator=estimator,
    )


@pytest.mark.parametrize(
    "estimator",
    [eg.GMRES(), eg.ConjugateGradient(), eg.ExactSolve(), eg.T1T2(), eg.Unrolled()],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
def test_theta_that_an_inner_loss_hides_is_named(penalty, estimator):
    """Its derivative is hidden with it: second derivatives agree, and the gradient is wrong."""
    said = of_penalty(penalty, estimator).status
    assert "inner_loss does not change as autograd predicts" in said


@pytest.mark.parametrize("estimator", [eg.GMRES(), eg.Unrolled(), eg.ForwardMode()], ids=repr)
def test_and_no_theta_that_is_seen_by_either_loss(estimator):
    """`Unrolled` adds to the outer loss's own gradient, which is looked at afterwards."""

    def penalty(strength, center, w):
        return strength.exp() * (w - center).square().sum()

    assert "does not change" not in of_penalty(penalty, estimator).status
