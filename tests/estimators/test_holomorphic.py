"""Functions that cannot be followed into the complex plane, and what is said of them."""

import pytest
import torch

import equigrad as eg
from equigrad.testing import hopfield_case

X = torch.linspace(-1, 1, 6).double().reshape(2, 3)
HOLOMORPHIC = eg.Contrastive(beta=0.1, scheme="holomorphic", points=4)


def gradient(inner, outer, estimator=HOLOMORPHIC):
    return eg.meta_gradient(
        eg.Bilevel(inner, outer),
        {"w": torch.zeros(3).double()},
        {"c": torch.tensor([0.5, -1.0, 2.0]).double()},
        solver=eg.GradientDescent(lr=0.2, tol=1e-10),
        estimator=estimator,
    )


def near(p, m):
    return (p["w"] - m["c"]).square().sum()


def fourth(p, m):
    return p["w"].pow(4).sum()


def test_a_smooth_loss_has_the_gradient_of_its_closed_form():
    """φ* = c, so that the gradient of `Σ φ⁴` is `4c³`; with 8 points, β⁸ is left of the error."""
    grads = gradient(near, fourth, eg.Contrastive(beta=1e-3, scheme="holomorphic", points=8)).grads
    expected = 4 * torch.tensor([0.5, -1.0, 2.0]).double().pow(3)
    torch.testing.assert_close(grads["c"], expected, rtol=1e-7, atol=0)


def test_the_look_at_holomorphic_functions_is_counted():
    """Two gradients of each function, and of the activation where there is one."""
    case = hopfield_case(torch.float64)

    def evaluations(estimator, solver):
        return eg.meta_gradient(
            case.problem, case.params, case.meta_params, solver=solver, estimator=estimator
        ).gradient_evaluations

    solver = eg.Picard(max_steps=5)
    symmetric = evaluations(eg.Contrastive(scheme="symmetric"), solver)
    assert evaluations(eg.Contrastive(scheme="holomorphic"), solver) == symmetric + 3 * 2


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        (lambda p, m: (X @ p["w"]).square().sum(), r"real tensors, convert those by \.to\(dtype\)"),
        (
            lambda p, m: torch.nn.functional.mse_loss(p["w"], m["c"]),
            "evaluates outer_loss with complex numbers.*not implemented",
        ),
        (
            lambda p, m: p["w"].relu().sum(),
            r"evaluates outer_loss .*\(clamp.*it is not holomorphic",
        ),
        (lambda p, m: p["w"].abs().sum(), "outer_loss is not holomorphic: it uses absolute values"),
        (lambda p, m: (p["w"] * p["w"].conj()).sum(), "outer_loss is not holomorphic.*conjugates"),
        (lambda p, m: p["w"].real.sum(), "outer_loss is not holomorphic.*real parts"),
    ],
)
def test_losses_that_are_not_holomorphic_or_not_complex(outer, message):
    with pytest.raises(eg.ConfigurationError, match=message) as refused:
        gradient(near, outer)
    assert "scheme='symmetric' and scheme='forward' work" in str(refused.value)
    gradient(near, outer, eg.Contrastive(scheme="symmetric"))  # as it says


def test_an_inner_loss_that_is_not_holomorphic_is_named():
    with pytest.raises(eg.ConfigurationError, match="inner_loss is not holomorphic"):
        gradient(lambda p, m: near(p, m) + 0.1 * p["w"].abs().sum(), fourth)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.relu, "evaluates activation .*: it is not holomorphic.*torch.tanh"),
        (lambda d: d.clamp(0, 1), r"evaluates activation .*\(clamp is not supported for complex"),
        (lambda d: d.real.tanh(), "activation is not holomorphic: it uses .*real parts"),
        (
            lambda d: d.tanh().conj(),
            "activation is not holomorphic: it uses absolute values, conjugates",
        ),
    ],
)
def test_activations_that_are_not_holomorphic(activation, message):
    case = hopfield_case(torch.float64)
    assert isinstance(case.problem, eg.EnergyBased)
    problem = eg.EnergyBased(case.problem.primitive, case.problem.outer_loss, activation)
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.meta_gradient(
            problem,
            case.params,
            case.meta_params,
            solver=eg.Picard(max_steps=20),
            estimator=HOLOMORPHIC,
        )
