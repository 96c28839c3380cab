"""Problems with known gradients, on which any estimator is tested."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as logistic_loss

from equigrad.estimators import Traits
from equigrad.nn import ComplexSynapse
from equigrad.problems import Bilevel, EnergyBased, FixedPoint, Params, Problem
from equigrad.solvers import GradientDescent, Picard, Solver
from equigrad.testing.quadratic import Quadratic


@dataclass(frozen=True)
class Case:
    """A problem with initial params, a solver, and its exact gradient.

    Attributes:
        name: name of the case.
        problem: the problem.
        params: initial φ.
        meta_params: θ.
        solver: settles it to nearly machine precision, or takes a few steps if `start`.
        exact: `dL_out/dθ`, computed by means that no estimator uses.
        identity_hessian: whether `∂²L_in/∂φ² = I`, so that estimators which assume this are exact.
        start: whether θ is the start of φ, and `exact` the gradient of the solver's few steps.
    """

    name: str
    problem: Problem
    params: Params
    meta_params: Params
    solver: Solver
    exact: Params
    identity_hessian: bool = False
    start: bool = False

    def suits(self, traits: Traits) -> bool:
        """Whether the case fits an estimator with these traits."""
        if self.start:
            return traits.sees_start
        return not traits.needs_start and traits.fit(self.problem)

    def relative_error(self, grads: Params) -> float:
        """`‖grads - exact‖ / ‖exact‖` over all meta-parameters."""
        names = list(self.exact)
        exact = torch.cat([self.exact[n].double().flatten() for n in names])
        found = torch.cat([grads[n].double().flatten() for n in names])
        return ((found - exact).norm() / exact.norm()).item()


def quadratic_case(dtype: torch.dtype) -> Case:
    """The quadratic of Appendix E, whose gradient is known in closed form."""
    quadratic = Quadratic(dim=12, strength=0.2, dtype=dtype)
    return Case(
        "quadratic",
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        settling(0.5, dtype),
        {"theta": quadratic.meta_gradient},
    )


def isotropic_case(dtype: torch.dtype) -> Case:
    """`L_in = ½‖φ - A θ‖²`, `L_out = Σ log cosh φ + ½‖θ‖²`: gradient `Aᵀ tanh(Aθ) + θ`."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    theta = torch.randn(3, generator=generator, dtype=torch.float64).to(dtype)
    problem = Bilevel(
        lambda p, m: 0.5 * (p["phi"] - a @ m["theta"]).square().sum(),
        lambda p, m: p["phi"].cosh().log().sum() + 0.5 * m["theta"].square().sum(),
    )
    return Case(
        "identity Hessian, direct term",
        problem,
        {"phi": torch.zeros(5, dtype=dtype)},
        {"theta": theta},
        settling(0.5, dtype),
        {"theta": a.T @ (a @ theta).tanh() + theta},
        identity_hessian=True,
    )


def scalar_case(dtype: torch.dtype) -> Case:
    """`L_in = ½ e^θ φ² - φ`, `L_out = ½ φ²`: φ* = e^{-θ}, gradient `-e^{-2θ}`; 0-d tensors."""
    theta = torch.tensor(0.3, dtype=dtype)
    problem = Bilevel(
        lambda p, m: 0.5 * m["theta"].exp() * p["phi"].square() - p["phi"],
        lambda p, m: 0.5 * p["phi"].square(),
    )
    return Case(
        "scalars",
        problem,
        {"phi": torch.tensor(0.0, dtype=dtype)},
        {"theta": theta},
        settling(0.3, dtype),
        {"theta": -(-2 * theta).exp()},
    )


def ridge_case(dtype: torch.dtype) -> Case:
    """Ridge regression with one strength a weight; by autograd through the normal equations."""
    x, y, v, w = _regression_data()

    def solution(rho: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x / len(x) + torch.diag(rho.exp()), x.T @ y / len(x))

    def validation(weights: Tensor) -> Tensor:
        return 0.5 * (v @ weights - w).square().mean()

    rho = torch.linspace(-2, 0, 4, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(validation(solution(rho)), rho)
    xs, ys, vs, ws = (t.to(dtype) for t in (x, y, v, w))
    problem = Bilevel(
        lambda p, m: (
            0.5 * (xs @ p["w"] - ys).square().mean()
            + 0.5 * (m["rho"].exp() * p["w"].square()).sum()
        ),
        lambda p, m: 0.5 * (vs @ p["w"] - ws).square().mean(),
    )
    return Case(
        "ridge",
        problem,
        {"w": torch.zeros(4, dtype=dtype)},
        {"rho": rho.detach().to(dtype)},
        settling(0.2, dtype),
        {"rho": exact},
    )


def logistic_case(dtype: torch.dtype) -> Case:
    """l2-logistic regression; Newton's method and the implicit function theorem by hand."""
    x, y, v, w = _regression_data()
    y, w = (y > 0).double(), (w > 0).double()
    rho = torch.tensor(-1.5, dtype=torch.float64)

    def newton(weights: Tensor) -> tuple[Tensor, Tensor]:
        p = (x @ weights).sigmoid()
        gradient = x.T @ (p - y) / len(x) + rho.exp() * weights
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + rho.exp() * torch.eye(4).double()
        return weights - torch.linalg.solve(hessian, gradient), hessian

    weights, hessian = newton(torch.zeros(4, dtype=torch.float64))
    for _ in range(30):
        weights, hessian = newton(weights)
    pressure = v.T @ ((v @ weights).sigmoid() - w) / len(v)
    exact = -(rho.exp() * weights) @ torch.linalg.solve(hessian, pressure)
    xs, ys, vs, ws = (t.to(dtype) for t in (x, y, v, w))
    problem = Bilevel(
        lambda p, m: logistic_loss(xs @ p["w"], ys) + 0.5 * m["rho"].exp() * p["w"].square().sum(),
        lambda p, m: logistic_loss(vs @ p["w"], ws),
    )
    return Case(
        "logistic",
        problem,
        {"w": torch.zeros(4, dtype=dtype)},
        {"rho": rho.to(dtype)},
        settling(0.5, dtype),
        {"rho": exact},
    )


def proximal_case(dtype: torch.dtype) -> Case:
    """Regression with a learned proximal centre; by autograd through the normal equations."""
    x, y, v, w = _regression_data()
    strength = 0.5
    center = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    gram = x.T @ x / len(x) + strength * torch.eye(4, dtype=torch.float64)
    solution = torch.linalg.solve(gram, x.T @ y / len(x) + strength * center)
    (exact,) = torch.autograd.grad(0.5 * (v @ solution - w).square().mean(), center)
    model = torch.nn.Linear(4, 1, bias=False, dtype=dtype)
    synapse = ComplexSynapse(
        model, strength, {"weight": center.detach().unsqueeze(0)}, learn=("center",)
    )
    xs, ys, vs, ws = (t.to(dtype) for t in (x, y, v, w))
    problem = Bilevel(
        lambda p, m: 0.5 * (synapse(p, xs).squeeze(1) - ys).square().mean(),
        lambda p, m: 0.5 * (synapse(p, vs).squeeze(1) - ws).square().mean(),
        regularizer=synapse,
    )
    return Case(
        "learned center",
        problem,
        {"weight": torch.zeros(1, 4, dtype=dtype)},
        synapse.meta_params(),
        settling(0.2, dtype),
        {"center.weight": exact.unsqueeze(0)},
    )


def affine_map_case(dtype: torch.dtype) -> Case:
    """`F = Wφ + Uθ`, W far from symmetric: `φ* = (I - W)⁻¹ Uθ`, gradient `Uᵀ(I - W)⁻ᵀ(φ* - t)`."""
    w, u, target, theta = _map_data()
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - w)
    exact = u.T @ inverse.T @ (inverse @ u @ theta - target)
    ws, us, ts, thetas = (t.to(dtype) for t in (w, u, target, theta))
    problem = FixedPoint(
        lambda p, m: {"h": ws @ p["h"] + us @ m["theta"]},
        lambda p, m: 0.5 * (p["h"] - ts).square().sum(),
    )
    return Case(
        "affine map",
        problem,
        {"h": torch.zeros(5, dtype=dtype)},
        {"theta": thetas},
        picard(dtype),
        {"theta": exact},
    )


def tanh_map_case(dtype: torch.dtype) -> Case:
    """`F = tanh(Wφ + Uθ)` in two parts, with a direct term; Newton's method, then by hand."""
    w, u, target, theta = _map_data()
    w = 1.5 * w
    exact = _through_tanh(w, u, target, theta) + theta
    ws, us, ts, thetas = (t.to(dtype) for t in (w, u, target, theta))

    def relax(p: Params, m: Params) -> Params:
        image = (ws @ torch.cat([p["a"], p["b"]]) + us @ m["theta"]).tanh()
        return {"b": image[2:], "a": image[:2]}

    problem = FixedPoint(
        relax,
        lambda p, m: (
            0.5 * (torch.cat([p["a"], p["b"]]) - ts).square().sum()
            + 0.5 * m["theta"].square().sum()
        ),
    )
    return Case(
        "tanh map",
        problem,
        {"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(3, dtype=dtype)},
        {"theta": thetas},
        picard(dtype),
        {"theta": exact},
    )


def hopfield_case(dtype: torch.dtype) -> Case:
    """Two layers with symmetric weights, `Φ = ½ sᵀWs + sᵀUθ`: the tanh map of a symmetric W."""
    w, u, target, theta = _map_data()
    w = w + w.T
    w[:2, :2], w[2:, 2:] = 0, 0  # no weights within a layer
    exact = _through_tanh(w, u, target, theta)
    between, us, ts, thetas = (t.to(dtype) for t in (w[:2, 2:], u, target, theta))

    def primitive(p: Params, m: Params) -> Tensor:
        drive = us.to(m["theta"].dtype) @ m["theta"]  # complex in a holomorphic scheme
        return p["a"] @ between.to(drive.dtype) @ p["b"] + p["a"] @ drive[:2] + p["b"] @ drive[2:]

    problem = EnergyBased(
        primitive,
        lambda p, m: 0.5 * (torch.cat([p["a"], p["b"]]) - ts).square().sum(),
        activation=torch.tanh,
    )
    return Case(
        "Hopfield network",
        problem,
        {"a": torch.zeros(2, dtype=dtype), "b": torch.zeros(3, dtype=dtype)},
        {"theta": thetas},
        picard(dtype),
        {"theta": exact},
    )


def start_case(dtype: torch.dtype) -> Case:
    """T steps from θ on a quadratic: `φ_T = c + (I - ηH)^T (θ - c)`, `∇ = (I - ηH)^T (φ_T - t)`."""
    generator = torch.Generator().manual_seed(4)
    root, center, target, theta = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 4), (4,), (4,), (4,))
    )
    hessian, eta, steps = root @ root.T / 4, 0.1, 6
    contraction = torch.linalg.matrix_power(torch.eye(4).double() - eta * hessian, steps)
    exact = contraction @ (center + contraction @ (theta - center) - target)
    hs, cs, ts = (t.to(dtype) for t in (hessian, center, target))
    problem = Bilevel(
        lambda p, m: 0.5 * (p["phi"] - cs) @ hs @ (p["phi"] - cs),
        lambda p, m: 0.5 * (p["phi"] - ts).square().sum(),
    )
    start = {"phi": theta.to(dtype).requires_grad_()}
    solver = GradientDescent(lr=eta, max_steps=steps)
    return Case("start", problem, start, start, solver, {"phi": exact}, start=True)


CASES: tuple[Callable[[torch.dtype], Case], ...] = (
    quadratic_case,
    isotropic_case,
    scalar_case,
    ridge_case,
    logistic_case,
    proximal_case,
)
"""Problems with an inner loss, each a function of the dtype."""

MAP_CASES: tuple[Callable[[torch.dtype], Case], ...] = (affine_map_case, tanh_map_case)
"""Fixed points of maps."""

ENERGY_CASES: tuple[Callable[[torch.dtype], Case], ...] = (hopfield_case,)
"""Energy-based networks."""

START_CASES: tuple[Callable[[torch.dtype], Case], ...] = (start_case,)
"""A few steps from a learned start."""

ALL_CASES = (*CASES, *MAP_CASES, *ENERGY_CASES, *START_CASES)
"""All cases; `Case.suits` says which ones fit an estimator's traits."""


def settling(lr: float, dtype: torch.dtype) -> GradientDescent:
    """Gradient descent that settles a case to the limit of its dtype."""
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    return GradientDescent(lr=lr, momentum=0.9, nesterov=True, tol=tol, max_steps=5000)


def picard(dtype: torch.dtype) -> Picard:
    """Picard's iteration to the limit of the dtype."""
    tol = 1e-13 if dtype == torch.float64 else 2e-6
    return Picard(tol=tol, max_steps=5000)


def _map_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A contraction far from symmetric, input weights, a target and θ."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = normal(5, 5)
    return 0.6 * weights / torch.linalg.matrix_norm(weights, 2), normal(5, 3), normal(5), normal(3)


def _through_tanh(w: Tensor, u: Tensor, target: Tensor, theta: Tensor) -> Tensor:
    """`d/dθ ½‖φ* - t‖²` for `φ* = tanh(Wφ* + Uθ)`: Newton, then `Uᵀ D (I - DW)⁻ᵀ (φ* - t)`."""
    eye, h = torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        image = (w @ h + u @ theta).tanh()
        jacobian = torch.diag(1 - image.square()) @ w
        h = h - torch.linalg.solve(eye - jacobian, h - image)
    gain = torch.diag(1 - h.square())
    return u.T @ gain @ torch.linalg.solve((eye - gain @ w).T, h - target)


def _regression_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten training and ten validation points of a noisy linear function of four features."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, generator=generator, dtype=torch.float64)
    y = y + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)
    return x[:10], y[:10], x[10:], y[10:]
