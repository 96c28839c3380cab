import pytest
import torch
from torch import nn

import equigrad as eg


def synapse(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return eg.nn.ComplexSynapse(net, **options)


def random_like(params):
    return {n: torch.randn_like(p) for n, p in params.items()}


VARIANTS = [
    {"learn": learn, "positivity": positivity, "center": center, "strength": 0.3}
    for learn in (("strength",), ("center",), ("strength", "center"))
    for positivity in ("projection", "log")
    for center in (0.0, "init")
]
SHARED = {
    "0.weight": torch.tensor([[0.1, 0.2, 0.3]]),
    "0.bias": torch.tensor([0.4]),
    "2.weight": torch.tensor([[0.5], [0.6]]),
    "2.bias": 0.7,
}
"""Strengths that the weights of an input share, all biases of a layer, the weights of a unit."""

VARIANTS += [{"strength": SHARED, "positivity": how} for how in ("projection", "log")]


@pytest.mark.parametrize("options", VARIANTS)
def test_closed_forms_agree_with_autograd(options):
    """Velocity and contrast against the derivatives of the penalty itself."""
    s = synapse(**options)
    meta = {n: (m + 0.1 * torch.rand_like(m)).detach() for n, m in s.meta_params().items()}
    params = {n: p.requires_grad_() for n, p in random_like(s.params()).items()}
    pull = s.bind(meta)

    gradient = torch.autograd.grad(s.penalty(params, meta), list(params.values()))
    velocity = pull.add_velocity(tuple(torch.ones_like(p) for p in params.values()), params)
    for v, g in zip(velocity, gradient, strict=True):
        torch.testing.assert_close(v, 1 - g)

    states, weights = [random_like(params) for _ in range(3)], [-1.5, 2.0, -0.5]
    leaves = {n: m.clone().requires_grad_() for n, m in meta.items()}
    total = [w * s.penalty(state, leaves) for w, state in zip(weights, states, strict=True)]
    reference = torch.autograd.grad(torch.stack(total).sum(), list(leaves.values()))
    ours = pull.contrast(states, weights)
    for name, expected in zip(leaves, reference, strict=True):
        torch.testing.assert_close(ours[name], expected)


def test_value_by_hand():
    s = eg.nn.ComplexSynapse(
        nn.Linear(2, 1, bias=False),
        strength={"weight": torch.tensor([[2.0, 4.0]])},
        center={"weight": 1.0},
    )
    weight = torch.tensor([[3.0, 0.0]])
    value = s.penalty({"weight": weight}, s.meta_params())
    assert value.item() == 0.5 * (2 * 2**2 + 4 * 1**2)


@pytest.mark.parametrize("beta", [1e-2, 1e-4])
def test_float32_keeps_three_digits_at_small_beta(beta):
    """Numbers near 100, moved by β: squares lose what the factored form keeps."""
    s = eg.nn.ComplexSynapse(nn.Linear(500, 1, bias=False), strength=0.1, center=99.0)
    base = 100 + torch.rand(1, 500)
    moved = base + beta * (1 + torch.rand(1, 500))
    pull = s.bind(s.meta_params())
    ours = pull.contrast([{"weight": base}, {"weight": moved}], [-1 / beta, 1 / beta])
    a, b = moved.double() - 99, base.double() - 99
    exact = 0.5 * (a.square() - b.square()) / beta  # of the same float32 states, in float64
    error = (ours["strength.weight"].double() - exact).norm() / exact.norm()
    assert error < 1e-5
    squares = 0.5 * ((moved - 99).square() - (base - 99).square()) / beta
    naive = (squares.double() - exact).norm() / exact.norm()
    assert naive > 10 * error


def test_estimate_in_float32_at_small_beta_agrees_with_float64():
    def estimate(dtype):
        torch.manual_seed(2)
        net = nn.Linear(4, 3).to(dtype)
        x, y = torch.randn(6, 4).to(dtype), torch.randn(6, 3).to(dtype)
        s = eg.nn.ComplexSynapse(net, strength=0.2)
        problem = eg.Bilevel(
            lambda p, m: (s(p, x) - y).square().mean(),
            lambda p, m: (s(p, -x) - y).square().mean(),
            regularizer=s,
        )
        grads = eg.meta_gradient(
            problem,
            s.params(),
            s.meta_params(),
            solver=eg.GradientDescent(lr=0.3, max_steps=300),
            estimator=eg.Contrastive(beta=1e-4),
        ).grads
        return torch.cat([g.flatten().double() for g in grads.values()])

    single, double = estimate(torch.float32), estimate(torch.float64)
    assert ((single - double).norm() / double.norm()).item() < 1e-2


def test_params_beyond_the_synapse_and_in_another_order():
    s = synapse(strength=0.5)
    params = dict(reversed(list(random_like(s.params()).items()))) | {"other": torch.ones(2)}
    zero = tuple(torch.zeros_like(p) for p in params.values())
    velocity = dict(zip(params, s.bind(s.meta_params()).add_velocity(zero, params), strict=True))
    assert torch.equal(velocity["other"], torch.zeros(2))
    for name in s.params():
        torch.testing.assert_close(velocity[name], -0.5 * params[name])


def test_projection_keeps_strengths_nonnegative():
    s = synapse(strength=0.01, learn=("strength", "center"))
    meta = s.meta_params()
    with torch.no_grad():
        for m in meta.values():
            m.sub_(1.0)
    s.project_(meta)
    assert all((m >= 0).all() for n, m in meta.items() if n.startswith("strength."))
    assert all((m < 0).any() for n, m in meta.items() if n.startswith("center."))


def test_log_strengths_cannot_become_negative():
    s = synapse(strength=0.01, positivity="log")
    meta = {n: m - 50 for n, m in s.meta_params().items()}
    assert all((v > 0).all() for v in s.strengths(meta).values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"strength": -1.0},
            eg.ConfigurationError,
            "strength must be at least 0 and finite, got -1",
        ),
        ({"strength": float("inf")}, eg.ConfigurationError, "finite, got inf for '0.weight'"),
        ({"center": float("nan")}, eg.ConfigurationError, "center must be finite"),
        ({"strength": float("nan")}, eg.ConfigurationError, "strength must be"),
        ({"strength": 0.0, "positivity": "log"}, eg.ConfigurationError, "positive for log"),
        ({"learn": ()}, eg.ConfigurationError, "learn must contain"),
        ({"learn": ("speed",)}, eg.ConfigurationError, "learn must contain .* got .*speed"),
        ({"positivity": "abs"}, eg.ConfigurationError, "positivity must be"),
        ({"center": "zero"}, eg.ConfigurationError, "center must be a number, .* or 'init'"),
        ({"strength": {"weight": 1.0}}, eg.ProblemError, "strength has entries for .*weight"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        synapse(**options)


def test_shared_strengths_have_their_own_shapes():
    """And weights that share one are held back as if each had it."""
    s = synapse(strength=SHARED)
    assert {n: tuple(m.shape) for n, m in s.meta_params().items()} == {
        "strength.0.weight": (1, 3),
        "strength.0.bias": (1,),
        "strength.2.weight": (2, 1),
        "strength.2.bias": (2,),
    }
    spread = {n: torch.as_tensor(SHARED[n]).expand(p.shape) for n, p in s.params().items()}
    each, params = synapse(strength=spread), random_like(s.params())
    torch.testing.assert_close(
        s.penalty(params, s.meta_params()), each.penalty(params, each.meta_params())
    )
    with pytest.raises(
        eg.ProblemError, match=r"has shape \(1, 2\), but the weight has shape \(4, 3\)"
    ):
        synapse(strength={**SHARED, "0.weight": torch.ones(1, 2)})


def test_shape_by_name():
    names = dict.fromkeys(synapse().params(), 1.0)
    with pytest.raises(eg.ProblemError, match=r"strength\['0.weight'\] has shape \(2,\)"):
        synapse(strength={**names, "0.weight": torch.ones(2)})


def test_meta_params_of_another_synapse():
    with pytest.raises(eg.ProblemError, match=r"meta_params has no 'strength\.0\.weight'"):
        synapse().strengths({})
