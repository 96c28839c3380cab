"""What an implicit estimator leaves of its linear system, and what it says about it."""

import pytest
import torch

import equigrad as eg
from equigrad.testing import zoo
from equigrad.testing.hard_zoo import HARD_ZOO

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


@pytest.mark.parametrize("estimator", [eg.ConjugateGradient(tol=1e-12), eg.GMRES(tol=1e-12)])
def test_params_of_several_shapes_and_precisions_are_one_vector(estimator):
    """The least of `Σ k_i ‖φ_i - θ‖² / 2 + Σφ_i / 10` is at `φ_i = θ - 1 / (10 k_i)`."""
    curvatures = {"wide": 0.5, "point": 2.0, "unused": 1.0, "single": 3.0}
    start = {
        "wide": torch.zeros(2, 3).double().mT,  # not contiguous
        "point": torch.zeros(()).double(),
        "unused": torch.ones(2).double(),
        "single": torch.zeros(4),
    }

    def inner(params, meta):
        pulls = [
            0.5 * k * (params[n].double() - meta["t"]).square().sum()
            + 0.1 * params[n].double().sum()
            for n, k in curvatures.items()
        ]
        return torch.stack(pulls).sum()

    def outer(params, meta):
        squares = [p.double().square().sum() for n, p in params.items() if n != "unused"]
        return torch.stack(squares).sum()

    problem = eg.Bilevel(inner, outer)
    meta = {"t": torch.tensor(0.7).double()}
    solver = eg.GradientDescent(lr=0.3, tol=1e-7, max_steps=500)
    found = eg.meta_gradient(problem, start, meta, solver=solver, estimator=estimator)
    exact = sum(
        2 * start[n].numel() * (0.7 - 0.1 / k) for n, k in curvatures.items() if n != "unused"
    )
    assert found.grads["t"].item() == pytest.approx(exact, rel=2e-6)


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
    eg.Adjoint(),
    eg.Adjoint(solver=eg.Broyden(max_steps=100, tol=1e-6)),
    eg.ExactSolve(),
]


ONE_PRODUCT = [eg.T1T2(), eg.FiniteDifferenceT1T2()]
ZOOS = {
    **{n: b for n, b in zoo.ZOO.items() if n not in ("convolution", "lstm")},
    **{n: b for n, b in HARD_ZOO.items() if n not in ("lasso", "large-units")},
}
"""All but those that take long, and two on which L-BFGS does not come near enough to rest."""


@pytest.fixture(scope="module")
def settled():
    """The zoo at rest, for all estimators."""
    cases = {name: build() for name, build in ZOOS.items()}
    return {
        name: (case, eg.settle(case.problem, case.params, case.meta_params, solver=TIGHT))
        for name, case in cases.items()
    }


@pytest.mark.parametrize("estimator", [*ESTIMATORS, *ONE_PRODUCT], ids=repr)
def test_whoever_is_wrong_says_so(estimator, settled):
    """On both zoos: no error above a hundredth goes without a word, and the estimate is honest."""
    band = 100 if estimator in ONE_PRODUCT else 10
    for name, (case, rest) in settled.items():
        try:
            found = eg.meta_gradient(
                case.problem,
                case.params,
                case.meta_params,
                solver=TIGHT,
                estimator=estimator,
                settled=rest,
            )
        except eg.CurvatureError:  # the map does not contract
            continue
        wrong = case.relative_error(found.grads)
        assert found.error_estimate is not None
        assert min(wrong, 1) <= max(10 * found.error_estimate, 1e-4), name
        assert wrong < 1e-2 or "the gradient is wrong by" in found.status, name
        assert found.error_estimate < 1e-2 or wrong > 1e-2 / band, name


def test_an_adjoint_that_stops_along_flat_directions_knows_it(settled):
    """Its residual lies along small curvatures, which the products along it do not show at once."""
    case, rest = settled["deep-tanh"]
    found = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=TIGHT,
        estimator=eg.Adjoint(),
        settled=rest,
    )
    assert found.error_estimate is not None
    assert 0.01 < case.relative_error(found.grads) < 3 * found.error_estimate


def test_a_residual_is_judged_by_what_it_is_worth_to_theta(settled):
    """In units from 1e-6 to 1e6, a part in 1e10 of the pressure is a quarter of the gradient."""
    case, rest = settled["mixed-units"]
    found = eg.meta_gradient(
        case.problem,
        case.params,
        case.meta_params,
        solver=TIGHT,
        estimator=eg.GMRES(),
        settled=rest,
    )
    assert case.relative_error(found.grads) > 0.1
    assert found.error_estimate is not None
    assert found.error_estimate > 0.1


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
        assert "lower damping well below the curvatures" in found.status
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
    with pytest.raises(
        eg.CurvatureError, match=r"derivative .* is NaN or infinite at the settled params"
    ):
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


@pytest.mark.parametrize("estimator", ONE_PRODUCT, ids=repr)
@pytest.mark.parametrize("stiffness", [0.2, 0.95, 1.0, 4.0])
def test_the_identity_is_wrong_by_its_distance_from_the_curvature(estimator, stiffness):
    problem = eg.Bilevel(
        lambda p, m: 0.5 * stiffness * (p["w"] - m["c"]).square().sum(),
        lambda p, m: 0.5 * (p["w"] - 1).square().sum(),
    )
    zero = {"w": torch.zeros(3).double()}, {"c": torch.zeros(3).double()}
    found = eg.meta_gradient(problem, *zero, solver=STILL, estimator=estimator)
    # dw/dc is 1, and the estimate stiffness
    assert found.error_estimate == pytest.approx(abs(stiffness - 1), abs=1e-6)
    assert ("the gradient is wrong by" in found.status) == (abs(stiffness - 1) > 0.01)


def test_the_error_of_the_identity_costs_a_product():
    given, _ = spread(10.0, 8)
    twice = eg.meta_gradient(*given, solver=STILL, estimator=eg.T1T2())
    once = eg.meta_gradient(*given, solver=STILL, estimator=eg.FiniteDifferenceT1T2())
    # the check of the problem, a step, the outer gradient, the mixed derivative, the product
    assert twice.gradient_evaluations == once.gradient_evaluations == 2 + 1 + 1 + 2 + 2


def test_the_error_of_the_identity_without_second_derivatives_is_had_by_contrast():
    """θ acts through the regulariser alone, so that T1-T2 needs no second derivative of a loss."""

    class Never(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):  # pyright: ignore
            raise RuntimeError("the second derivative of this is not implemented")

    class Once(Never):
        @staticmethod
        def backward(ctx, *grads):  # pyright: ignore
            return Never.apply(grads[0])

    net = torch.nn.Linear(3, 1, bias=False).double()
    synapse = eg.nn.ComplexSynapse(net, strength=0.5, learn=("strength",))
    problem = eg.Bilevel(
        lambda p, m: Once.apply(p["weight"] - 1).square().sum(),
        lambda p, m: (p["weight"] - 2).square().sum(),
        regularizer=synapse,
    )
    found = eg.meta_gradient(
        problem,
        synapse.params(),
        synapse.meta_params(),
        solver=eg.GradientDescent(lr=0.3, tol=1e-9, max_steps=500),
        estimator=eg.T1T2(),
    )
    # the curvature is 2 + 0.5 everywhere
    assert found.error_estimate == pytest.approx(1.5, rel=1e-5)
