"""Problems with hidden pitfalls: units, symmetries, normalisation, saddles and kinks.

Each has an exact gradient, like those of `equigrad.testing.zoo`. On each of them,
`Contrastive(rtol=…)` has to reach the requested accuracy or say that it did not.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equigrad.problems import Bilevel, Params
from equigrad.solvers import LBFGS
from equigrad.testing.cases import Case
from equigrad.testing.zoo import Draw, half_squared_error, known, logistic, regression, seeded


def in_units(unit: float, draw: int = 0) -> Case:
    """Logistic regression with weights in other units, which divides curvatures by `unit²`."""
    case = logistic(draw)
    assert isinstance(case.problem, Bilevel)
    inner, outer = case.problem.function("inner"), case.problem.outer_loss
    return replace(
        case,
        name=f"logistic, weights in units of {unit:g}",
        problem=Bilevel(
            lambda p, m: inner({"w": p["w"] / unit}, m), lambda p, m: outer({"w": p["w"] / unit}, m)
        ),
    )


def mixed_units(draw: int = 0) -> Case:
    """Targets from 1e-6 to 1e6 with curvatures near one, and an outer loss in the units of each.

    The force on the small targets is 1e12 times that on the large ones, yet θ depends on all alike.
    """
    normal = Draw(21, draw)
    unit = torch.logspace(-6, 6, 7).double()
    goal, stiffness = unit * normal(7), 1 + normal(7).square()
    theta = 1 + 0.3 * normal(7)
    # φ* = unit θ, so the gradient is (θ - goal / unit) / 7
    return Case(
        "units from 1e-6 to 1e6",
        Bilevel(
            lambda p, m: 0.5 * (stiffness * (p["w"] - unit * m["theta"]).square()).sum(),
            lambda p, m: 0.5 * ((p["w"] - goal) / unit).square().mean(),
        ),
        {"w": torch.zeros(7).double()},
        {"theta": theta},
        LBFGS(tol=1e-8, max_steps=10_000),
        {"theta": (theta - goal / unit) / 7},
    )


def normalised(layer: Callable[[int], nn.Module], draw: int = 0) -> Case:
    """A network with a normalised layer under weight decay, with one strength for each tensor.

    Nothing but the decay fixes the scale of the layer before the norm, so its curvature is small.
    """
    x, y, v, w = regression(draw, features=3, examples=20, outputs=1)
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), layer(4), nn.Tanh(), nn.Linear(4, 1)))
    params = {name: p.detach() for name, p in net.named_parameters()}
    meta_params = {name.replace(".", "_"): torch.tensor(-6.0).double() for name in params}

    def misfit(p: Params, inputs: Tensor, targets: Tensor) -> Tensor:
        return half_squared_error(functional_call(net, dict(p), (inputs,)), targets)

    def decay(p: Params, m: Params) -> Tensor:
        strengths = [m[name.replace(".", "_")].exp() for name in params]
        return torch.stack(
            [s * p[n].square().sum() for s, n in zip(strengths, params, strict=True)]
        ).sum()

    problem = Bilevel(
        lambda p, m: misfit(p, x, y) + 0.5 * decay(p, m), lambda p, m: misfit(p, v, w)
    )
    return known(f"network with {layer.__name__}", problem, params, meta_params, near=1e-3)


def factors(draw: int = 0) -> Case:
    """Two factors of a matrix under one ridge; both losses are invariant under rotations.

    The product minimises the loss with a nuclear norm: it has the two largest singular values,
    reduced to `σ - 30 λ`, with the same vectors (Srebro, Rennie, Jaakkola 2004).
    """
    normal = Draw(22, draw)
    truth = normal(6, 2) @ normal(2, 5)
    seen, held_out = truth + 0.3 * normal(6, 5), truth + 0.3 * normal(6, 5)

    def misfit(p: Params, matrix: Tensor) -> Tensor:
        return 0.5 * (p["left"] @ p["right"].T - matrix).square().mean()

    def inner(p: Params, m: Params) -> Tensor:
        size = p["left"].square().sum() + p["right"].square().sum()
        return misfit(p, seen) + 0.5 * m["log_strength"].exp() * size

    strength = torch.tensor(0.01).double()
    u, sigma, vh = torch.linalg.svd(seen)
    u, vh, shrunk = u[:, :2], vh[:2], 30 * strength
    assert sigma[1] > shrunk
    product = u @ (sigma[:2] - shrunk).diag() @ vh
    exact = -shrunk * ((product - held_out) * (u @ vh)).mean()
    return Case(
        "matrix factors",
        Bilevel(inner, lambda p, m: misfit(p, held_out)),
        {"left": normal(6, 2), "right": normal(5, 2)},
        {"log_strength": strength.log()},
        LBFGS(tol=1e-8, max_steps=10_000),
        {"log_strength": exact},
    )


def saddle(draw: int = 0) -> Case:
    """A double well, with a start next to the saddle between the two minima: φ* = √θ."""
    normal = Draw(23, draw)
    start, theta = 1e-3 * normal(6).abs(), 1 + 0.5 * normal(6).tanh()
    goal = normal(6)
    return Case(
        "double well",
        Bilevel(
            lambda p, m: 0.25 * (p["b"].square() - m["theta"]).square().sum(),
            lambda p, m: 0.5 * (p["b"] - goal).square().sum(),
        ),
        {"b": start},
        {"theta": theta},
        LBFGS(tol=1e-8, max_steps=10_000),
        {"theta": 0.5 - 0.5 * goal / theta.sqrt()},
    )


def jump(draw: int = 0) -> Case:
    """A curvature that jumps from 1 to 7 at w = 1, with solutions at distances of 1e-4 to 1.

    `(w - θ) + 6 (w - 1) = 0` above 1, and w = θ below.
    """
    normal = Draw(24, draw)
    distance = torch.logspace(-4, 0, 6).double() * normal(6).sign()
    theta, goal = 1 + distance, normal(6)
    above = (distance > 0).double()
    share = 1 - above * 6 / 7  # dw/dθ
    return Case(
        "curvature that jumps",
        Bilevel(
            lambda p, m: (
                0.5 * (p["w"] - m["theta"]).square() + 3 * (p["w"] - 1).relu().square()
            ).sum(),
            lambda p, m: 0.5 * (p["w"] - goal).square().sum(),
        ),
        {"w": torch.zeros(6).double()},
        {"theta": theta},
        LBFGS(tol=1e-8, max_steps=10_000),
        {"theta": share * (1 + share * distance - goal)},
    )


def lasso(draw: int = 0) -> Case:
    """An l1 penalty with orthonormal features, where some weights settle at its kink.

    `w = sign(c) max(|c| - e^θ, 0)` for correlations c, which are not near the threshold.
    """
    normal = Draw(25, draw)
    correlation = torch.tensor([2.0, -1.5, 1.0, 0.2, -0.1, 0.05]).double()
    threshold, goal = torch.full((6,), 0.5).double(), normal(6)
    w = correlation.sign() * (correlation.abs() - threshold).relu()
    exact = -threshold * correlation.sign() * (correlation.abs() > threshold) * (w - goal)
    return Case(
        "lasso",
        Bilevel(
            lambda p, m: (
                0.5 * (p["w"] - correlation).square() + m["log_strength"].exp() * p["w"].abs()
            ).sum(),
            lambda p, m: 0.5 * (p["w"] - goal).square().sum(),
        ),
        {"w": torch.ones(6).double()},
        {"log_strength": threshold.log()},
        LBFGS(tol=1e-8, max_steps=10_000),
        {"log_strength": exact},
    )


HARD_ZOO: dict[str, Callable[..., Case]] = {
    "small-units": partial(in_units, 1e-6),
    "large-units": partial(in_units, 1e6),
    "mixed-units": mixed_units,
    "layer-norm": partial(normalised, nn.LayerNorm),
    "batch-norm": partial(normalised, nn.BatchNorm1d),
    "factors": factors,
    "saddle": saddle,
    "jump": jump,
    "lasso": lasso,
}
"""All problems by name, each a function of the number of its random draw (0 by default)."""
