"""Every wrong argument of the core gets a clear error that names the value and the remedy."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import equigrad as eg

SOLVER = eg.GradientDescent(lr=0.1, max_steps=5)
W, C = {"w": torch.ones(2)}, {"c": torch.ones(2)}


def inner(p, m):
    return (p["w"] - m["c"]).square().sum()


def outer(p, m):
    return p["w"].square().sum()


def call(inner=inner, outer=outer, params=W, meta_params=C, solver=SOLVER, **kwargs):
    return eg.meta_gradient(eg.Bilevel(inner, outer), params, meta_params, solver=solver, **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": [torch.ones(2)]},
            "params must be a dictionary from names to tensors.*got list",
        ),
        ({"params": {}}, "params is empty"),
        (
            {"params": {"v": torch.ones(2)}},
            "inner_loss uses the name 'w', which does not exist: params has 'v'",
        ),
        ({"params": {"w": 1.0}}, r"params\['w'\] must be a tensor, got float"),
        ({"params": {"w": torch.ones(2, dtype=torch.int64)}}, "dtype torch.int64"),
        ({"params": {"w": torch.tensor([1.0, float("nan")])}}, r"params\['w'\] holds NaN"),
        ({"meta_params": {}}, "meta_params is empty"),
        ({"inner": lambda p, m: p["w"] - m["c"]}, r"inner_loss must return a scalar.*\(2,\)"),
        ({"outer": lambda p, m: 1.0}, "outer_loss must return a scalar tensor, got float"),
        ({"outer": lambda p, m: p["w"].sum() * float("nan")}, "outer_loss is nan at the initial"),
        (
            {"outer": lambda p, m: torch.tensor(1.0)},
            "outer_loss returned a tensor that does not require a grad",
        ),
        ({"outer": lambda p, m: m["c"].sum()}, "outer_loss does not depend on any of params 'w'"),
        (
            {"meta_params": {**C, "lost": torch.ones(1)}},
            "neither inner_loss nor outer_loss depends on meta-parameter 'lost'.*initialisation.*"
            "ComplexSynapse",
        ),
    ],
)
def test_problem(change, message):
    with pytest.raises(eg.ProblemError, match=message):
        call(**change)


def test_wrong_shape_names_the_parameter():
    net = nn.Linear(3, 1)
    synapse = eg.nn.ComplexSynapse(net)
    problem = eg.Bilevel(
        lambda p, m: synapse(p, torch.ones(2, 3)).square().mean(),
        lambda p, m: synapse(p, torch.ones(2, 3)).square().mean(),
        regularizer=synapse,
    )
    bad = synapse.params() | {"weight": torch.ones(1, 4)}
    with pytest.raises(eg.ProblemError, match=r"params\['weight'\] has shape \(1, 4\).*\(1, 3\)"):
        eg.meta_gradient(problem, bad, synapse.meta_params(), solver=SOLVER)
    lacking = {"bias": torch.ones(1)}
    with pytest.raises(eg.ProblemError, match="params has no 'weight'"):
        eg.meta_gradient(problem, lacking, synapse.meta_params(), solver=SOLVER)


@pytest.mark.parametrize("batches", [iter([1]), (b for b in [1]), map(abs, [1]), [], "ab", 3])
def test_batches_that_cannot_be_seen_again(batches):
    with pytest.raises(eg.ProblemError, match=r"begun again.*an iterator|another iterator"):
        eg.Bilevel(inner, outer, inner_batches=batches)


def test_loss_that_is_not_a_function():
    with pytest.raises(eg.ProblemError, match="inner_loss must be a function"):
        eg.Bilevel(torch.tensor(1.0), outer)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1"),
        ({"lr": float("nan")}, "lr must be a finite number above 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be a finite number in \[0, 1\), got 1"),
        ({"nesterov": True}, "nesterov=True needs momentum > 0"),
        ({"tol": 0.0, "max_steps": None}, "tol must be a finite number above 0, or None, got 0"),
        ({"tol": -1e-3}, "tol must be a finite number above 0, or None, got -0.001"),
        ({"max_steps": None}, "needs max_steps, tol > 0, or both"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"max_steps": 5.5}, "a whole number of at least 1, or None, got 5.5"),
        ({"check_every": 0}, "check_every must be a whole number of at least 1"),
    ],
)
def test_solver(knobs, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.GradientDescent(**knobs)


def test_torch_optimizer():
    with pytest.raises(eg.ConfigurationError, match=r"Adam cannot be made with options.*speed"):
        eg.TorchOptimizer(optimizer=torch.optim.Adam, options={"speed": 1})
    optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)])
    with pytest.raises(eg.ConfigurationError, match=r"must be a class such as torch\.optim\.Adam"):
        eg.TorchOptimizer(optimizer=optimizer)  # pyright: ignore[reportArgumentType]


def test_a_class_in_place_of_an_object():
    with pytest.raises(eg.ConfigurationError, match=r"estimator must be .* got the class T1T2"):
        call(estimator=eg.T1T2)


@pytest.mark.parametrize("max_steps", [7, 500])
def test_divergence_names_phase_step_and_remedy(max_steps):
    with pytest.raises(eg.SettlingError, match=r"β = 0 diverged.* at step \d+.*step size"):
        call(
            inner=lambda p, m: (p["w"] - m["c"]).pow(4).sum(),
            params={"w": torch.full((2,), 30.0)},
            solver=eg.GradientDescent(lr=1.0, max_steps=max_steps),
        )


def test_a_phase_that_did_not_settle_is_named():
    result = call(solver=eg.GradientDescent(lr=1e-3, max_steps=20, tol=1e-8), params={"w": -W["w"]})
    assert result.status.startswith("not converged: residual")
    assert "phase β=0.01 not converged" in result.status


def test_a_gradient_that_is_exactly_zero_is_named():
    result = call(
        inner=lambda p, m: p["w"].square().sum() + 0 * m["c"].sum(),
        params={"w": torch.zeros(2)},
    )
    assert "the gradient of 'c' is exactly zero" in result.status


def test_params_that_no_loss_uses_are_named():
    result = call(params={**W, "idle": torch.ones(1)})
    assert "neither loss depends on params 'idle'" in result.status


def loss_of(net):
    x = torch.linspace(-1, 1, 12).view(4, 3).double()
    inner = lambda p, m: net(p, x).square().mean() + m["c"] * p["a.weight"].square().sum()  # noqa: E731
    return eg.Bilevel(inner, lambda p, m: (net(p, x) - 1).square().mean())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3, bias=False).double()

    def forward(self, x):
        return self.b(self.a(x).tanh())


C64 = {"c": torch.tensor(0.1).double()}


@pytest.mark.parametrize("tie", [True, False])
def test_a_parameter_under_two_names_is_refused(tie):
    net = Two()
    net.b.weight = net.a.weight
    problem = loss_of(lambda p, x: functional_call(net, p, (x,), tie_weights=tie))
    both = dict(net.named_parameters(remove_duplicate=False))
    with pytest.raises(eg.ProblemError, match=r"'a.weight' and 'b.weight' are one parameter"):
        eg.meta_gradient(problem, both, C64, solver=SOLVER)
    values = {n: p.detach() for n, p in both.items()}  # a start that several params have in common
    if not tie:
        eg.meta_gradient(problem, values, C64, solver=SOLVER)


@pytest.mark.parametrize(
    "within",
    [
        lambda f: torch.func.vmap(f)(torch.tensor([0.1, 0.2])),
        lambda f: torch.func.grad(f)(torch.tensor(0.1)),
        lambda f: torch.func.jvp(f, (torch.tensor(0.1),), (torch.tensor(1.0),)),
    ],
)
@pytest.mark.parametrize("call", [eg.meta_gradient, eg.settle])
def test_transforms_of_torch_func_around_a_call_are_refused(within, call):
    problem = eg.Bilevel(inner, outer)
    with pytest.raises(eg.ProblemError, match=r"inside of a transform of torch.func"):
        within(lambda c: call(problem, W, {"c": c.expand(2)}, solver=SOLVER))


@pytest.mark.parametrize("where", ["params", "meta_params"])
def test_a_tangent_is_refused(where):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        given: Any = {"params": W, "meta_params": C, where: {"w": dual, "c": dual}}
        with pytest.raises(eg.ProblemError, match=r"has a tangent"):
            call(**given)


@pytest.mark.parametrize("given", ["parameters", "copies"])
def test_hooks_on_params_are_named(given):
    net = Two()
    plain = loss_of(lambda p, x: functional_call(net, p, (x,)))
    params = dict(net.named_parameters())
    if given == "copies":
        params = {n: p.detach().clone() for n, p in params.items()}
    assert "hooks" not in eg.meta_gradient(plain, params, C64, solver=SOLVER).status
    net.a.weight.register_hook(torch.zeros_like)
    found = eg.meta_gradient(plain, params, C64, solver=SOLVER)
    assert "params 'a.weight' have backward hooks (register_hook), which are not" in found.status


def test_a_graph_that_is_kept_from_call_to_call_is_named():
    class Mean(Two):
        mean = torch.zeros(3).double()

        def forward(self, x):
            h = super().forward(x)
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
            return h - self.mean

    net = eg.nn.Functional(Mean())
    with pytest.raises(eg.ProblemError, match=r"graph of an earlier call.*the .detach\(\) of it"):
        eg.meta_gradient(loss_of(net), net.params(), C64, solver=SOLVER)
