"""What an implicit estimator leaves of its linear system, and what it says about it."""

import pytest
import torch

import equigrad as eg
from equigrad.testing import zoo

TIGHT = eg.LBFGS(tol=1e-9, max_steps=2000)
STILL = eg.GradientDescent(lr=1e-300, max_steps=1)


def spread(condition, size, dtype=torch.float64, scale=1.0):
    """A quadratic of some condition at its minimum, and the gradient by its target."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).double())
    curvatures = torch.logspace(0, -float(torch.tensor(condition).log10()), size).double()
    hessian = (rotation @ curvatures.diag() @ rotation.T).to(dtype)
    goal = torch.randn(size, generator=generator).to(dtype)
    problem = eg.Bilevel(
        lambda p, m: scale * (0.5 * p["w"] @ hessian @ p["w"] - m["force"] @ p["w"]),
        lambda p, m: 0.5 * (p["w"] - goal).square().sum(),
    )
    params = {"w": torch.zeros(size, dtype=dtype)}
    exact = torch.linalg.solve(hessian.double(), -goal.double())
    return (problem, params, {"force": torch.zeros(size, dtype=dtype)}), exact


def error(found, exact):
    return ((found.grads["force"].double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("size", [3, 10, 30])
@pytest.mark.parametrize("condition", [1e5, 1e8])
def test_gmres_solves_small_systems_of_any_condition(size, condition):
    given, exact = spread(condition, size)
    found = eg.meta_gradient(*given, solver=STILL, estimator=eg.GMRES(tol=1e-10))
    assert error(found, exact) < 1e-16 * 100 * condition * size


@pytest.mark.parametrize("size", [5, 20])
def test_gmres_in_single_precision_says_what_it_leaves(size):
    given, exact = spread(1e5, size, torch.float32)
    found = eg.meta_gradient(*given, solver=STILL, estimator=eg.GMRES())
    assert error(found, exact) < 0.05
    assert found.error_estimate is not None


def test_gmres_names_what_is_singular():
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"].sum() - m["c"]).square(), lambda p, m: p["w"].square().sum()
    )
    start = {"w": torch.tensor([1.0, -2.0, 1.0]).double()}
    meta = {"c": torch.zeros(()).double()}
    with pytest.raises(eg.CurvatureError, match="singular"):
        eg.meta_gradient(problem, start, meta, solver=STILL, estimator=eg.GMRES())


ESTIMATORS = [
    eg.ConjugateGradient(),
    eg.ConjugateGradient(max_iterations=3),
    eg.ConjugateGradient(damping=0.3),
    eg.GMRES(),
    eg.GMRES(max_iterations=4),
    eg.NeumannSeries(),
    eg.NeumannSeries(terms=5),
    eg.Nystrom(),
    eg.Nystrom(rank=3),
    eg.Adjoint(solver=eg.Anderson(max_steps=200)),
    eg.ExactSolve(),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_whoever_is_wrong_says_so(estimator):
    """On a zoo of problems: no error above a hundredth goes without a word."""
    for build in (zoo.ridge, zoo.logistic, zoo.kernel_ridge, lambda: zoo.stretched(1e4)):
        case = build()
        try:
            found = eg.meta_gradient(
                case.problem, case.params, case.meta_params, solver=TIGHT, estimator=estimator
            )
        except eg.CurvatureError:  # the map does not contract
            continue
        wrong = case.relative_error(found.grads)
        assert found.error_estimate is not None
        assert wrong <= max(10 * found.error_estimate, 1e-5), case.name
        assert wrong < 1e-2 or "is wrong by about" in found.status, case.name
        assert found.error_estimate < 1e-2 or wrong > 1e-4, case.name


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e8])
@pytest.mark.parametrize("rank", [3, 8])
def test_damping_is_relative_to_the_hessian(scale, rank):
    """In other units of the inner loss Nyström is as far off, and says so alike."""
    estimator = eg.Nystrom(rank=rank)
    wrong, said = [], []
    for units in (1.0, scale):
        given, exact = spread(10.0, 8, scale=units)
        found = eg.meta_gradient(*given, solver=STILL, estimator=estimator)
        wrong.append(error(found, exact))
        said.append(found.error_estimate)
        assert "set damping well below the curvatures" in found.status
    assert wrong[1] == pytest.approx(wrong[0], rel=1e-6)
    assert said[1] == pytest.approx(said[0], rel=1e-6)
    assert rank < 8 or wrong[0] < 0.1


def test_less_damping_leaves_less_of_an_error():
    given, exact = spread(10.0, 8, scale=1e-8)
    wrong = [
        error(
            eg.meta_gradient(*given, solver=STILL, estimator=eg.Nystrom(rank=8, damping=d)), exact
        )
        for d in (1e-2, 1e-4, 1e-6)
    ]
    assert wrong[0] > 50 * wrong[1] > 2500 * wrong[2]


def rooted(p, m):
    """Its second derivative is infinite at zero, its first is not."""
    return (p["w"].abs() ** 1.5).sum() + m["c"] * p["w"].sum()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_curvature_that_is_not_finite_is_named(estimator):
    problem = eg.Bilevel(rooted, lambda p, m: p["w"].sum())
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    meta = {"c": torch.zeros((), dtype=torch.float64)}
    with pytest.raises(eg.CurvatureError, match="curvature is not finite"):
        eg.meta_gradient(problem, start, meta, solver=STILL, estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_cotangent_that_is_not_finite_gives_no_number(estimator):
    problem = eg.Bilevel(
        lambda p, m: (p["w"] - m["c"]).square().sum(), lambda p, m: p["w"].norm() * 1e200 * 1e200
    )
    start = {"w": torch.full((3,), 1e-300, dtype=torch.float64)}
    meta = {"c": torch.zeros((), dtype=torch.float64)}
    with pytest.raises(eg.SettlingError, match="not finite"):
        eg.meta_gradient(problem, start, meta, solver=STILL, estimator=estimator)


def test_t1t2_solves_no_system_and_estimates_nothing():
    given, _ = spread(10.0, 8)
    assert eg.meta_gradient(*given, solver=STILL, estimator=eg.T1T2()).error_estimate is None
