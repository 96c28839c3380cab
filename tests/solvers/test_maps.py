"""Solvers of maps: Picard, Anderson, Broyden, on one vector and sample by sample."""

import pytest
import torch

import equigrad as eg
from equigrad.evaluation import Evaluation


def affine(matrices, shifts):
    """`h ↦ A h + b`, a matrix a sample; its fixed points are `(I - A)⁻¹ b`."""
    problem = eg.FixedPoint(
        lambda p, m: {"h": torch.einsum("bij,bj->bi", matrices, p["h"]) + m["b"]},
        lambda p, m: p["h"].sum(),
        samples=True,
    )
    eye = torch.eye(matrices.shape[1]).double()
    return problem, {"b": shifts}, torch.linalg.solve(eye - matrices, shifts)


def settle(problem, meta, solver, start=None):
    start = torch.zeros_like(meta["b"]) if start is None else start
    with Evaluation(problem, {"h": start}, meta) as evaluation:
        return evaluation.settle(solver)


def random_maps(samples, units, radius, seed=0):
    """Matrices of a given spectral radius, with complex eigenvalues, and shifts."""
    torch.manual_seed(seed)
    matrices = torch.randn(samples, units, units).double()
    radii = torch.linalg.eigvals(matrices).abs().amax(1)
    return radius * matrices / radii[:, None, None], torch.randn(samples, units).double()


def test_anderson_is_a_krylov_method_on_affine_maps():
    """dim moves span the space: after dim + 1 steps it rests, where Picard has 0.9^k left."""
    matrices, shifts = random_maps(1, 6, 0.9)
    problem, meta, exact = affine(matrices, shifts)
    enough = eg.Anderson(tol=1e-9, history=6, max_steps=100, regularization=0.0)
    settled = settle(problem, meta, enough)
    assert settled.phase.steps <= 6 + 2  # one more for rounding, in the normal equations
    torch.testing.assert_close(settled.params["h"], exact, rtol=0, atol=1e-7)
    assert settle(problem, meta, eg.Picard(tol=1e-9)).phase.steps > 100


def test_damped_anderson_has_the_same_fixed_point():
    problem, meta, exact = affine(*random_maps(3, 6, 0.8))
    settled = settle(problem, meta, eg.Anderson(tol=1e-10, damping=0.4))
    assert settled.phase.outcome == "converged"
    torch.testing.assert_close(settled.params["h"], exact, rtol=0, atol=1e-8)


def test_broyden_finds_fixed_points_of_maps_that_do_not_contract():
    problem, meta, exact = affine(*random_maps(4, 5, 1.6))
    with pytest.raises(eg.SettlingError, match="diverged"):
        settle(problem, meta, eg.Picard(tol=1e-9, max_steps=5000))
    settled = settle(problem, meta, eg.Broyden(tol=1e-9, history=40, max_steps=400))
    assert settled.phase.outcome == "converged"
    torch.testing.assert_close(settled.params["h"], exact, rtol=1e-6, atol=1e-7)


def test_broyden_terminates_within_two_dim_steps_on_affine_maps():
    """Gay (1979): 2n steps in exact arithmetic."""
    problem, meta, exact = affine(*random_maps(1, 4, 1.3))
    settled = settle(problem, meta, eg.Broyden(tol=1e-7, max_steps=100))
    assert settled.phase.steps <= 2 * 4 + 1
    torch.testing.assert_close(settled.params["h"], exact, rtol=0, atol=1e-5)


def test_damping_settles_what_oscillates():
    """`h ↦ -1.5 h + 1`: damped by d its factor is `1 - 2.5 d`."""
    problem, meta, exact = affine(torch.full((1, 1, 1), -1.5).double(), torch.ones(1, 1).double())
    settled = settle(problem, meta, eg.Picard(tol=1e-9, damping=0.5))
    torch.testing.assert_close(settled.params["h"], exact, rtol=0, atol=1e-8)
    # a quarter a step, and 1e-9 to go
    assert settled.phase.steps == 15


@pytest.mark.parametrize(
    "solver", [eg.Picard(max_steps=9), eg.Anderson(max_steps=9), eg.Broyden(max_steps=9)]
)
def test_a_sample_does_not_depend_on_its_neighbours(solver):
    matrices, shifts = random_maps(5, 6, 0.9)
    shifts[0] *= 1e6  # a neighbour that is far from rest
    together = settle(*affine(matrices, shifts)[:2], solver)
    for i in range(5):
        alone = settle(*affine(matrices[i : i + 1], shifts[i : i + 1])[:2], solver)
        torch.testing.assert_close(
            alone.params["h"][0], together.params["h"][i], rtol=1e-9, atol=1e-12
        )
        assert together.phase.residuals is not None
        assert alone.phase.residual == pytest.approx(together.phase.residuals[i].item(), rel=1e-6)


def test_residuals_are_those_of_the_samples():
    matrices, shifts = random_maps(3, 4, 0.9)
    settled = settle(*affine(matrices, shifts)[:2], eg.Picard(max_steps=4))
    h = torch.zeros_like(shifts)
    for _ in range(3):  # the norm is looked at before the last step
        h = torch.einsum("bij,bj->bi", matrices, h) + shifts
    image = torch.einsum("bij,bj->bi", matrices, h) + shifts
    torch.testing.assert_close(settled.phase.residuals, (image - h).norm(dim=1))
    assert settled.phase.residuals is not None
    assert settled.phase.residual == settled.phase.residuals.max().item()


@pytest.mark.parametrize("solver", [eg.Picard, eg.Anderson, eg.Broyden])
def test_some_samples_settle_and_some_do_not(solver):
    """The second sample jumps between 1 and -1, across where a fixed point would be."""

    def relax(p, m):
        first, second = p["h"]
        return {"h": torch.stack([0.5 * first + m["b"], torch.where(second > 0.5, -1.0, 1.0)])}

    problem = eg.FixedPoint(relax, lambda p, m: p["h"].sum(), samples=True)
    meta, start = {"b": torch.tensor([0.1]).double()}, torch.zeros(2, 1).double()
    settled = settle(problem, meta, solver(tol=1e-8, max_steps=60), start)
    assert settled.phase.outcome == "not converged"
    assert settled.phase.unsettled == [1]
    assert settled.params["h"][0].item() == pytest.approx(0.2, abs=1e-7)
    assert "sample 1 of 2" in str(settled.phase)


OTHERS = [0, 2, 3]
MAP_SOLVERS = [
    eg.Picard(tol=1e-9, max_steps=400),
    eg.Picard(tol=1e-9, max_steps=400, damping=0.7),
    eg.Anderson(tol=1e-9, max_steps=400),
    eg.Broyden(tol=1e-9, max_steps=400),
    eg.GradientFlow(dt=0.5, tol=1e-9, max_steps=400),
    eg.GradientDescent(lr=0.5, tol=1e-9, max_steps=400),  # looks at every tenth step
]


def beside_a_wild_one(wild=lambda h: h.square().exp() + 9):
    """Affine maps that contract, but for the second of four samples, whose map never rests."""
    matrices, shifts = random_maps(4, 5, 0.7)

    def relax(p, m):
        image = torch.einsum("bij,bj->bi", matrices, p["h"]) + m["b"]
        return {"h": torch.where(torch.arange(4)[:, None] == 1, wild(p["h"]), image)}

    problem = eg.FixedPoint(relax, lambda p, m: p["h"].square().sum(), samples=True)
    _, _, exact = affine(matrices, shifts)
    return problem, {"b": shifts}, exact


@pytest.mark.parametrize("solver", MAP_SOLVERS)
def test_a_sample_that_diverges_leaves_the_others_alone(solver):
    """The others reach their fixed points; it is put back to where it started, and named."""
    problem, meta, exact = beside_a_wild_one()
    start = torch.full_like(meta["b"], 0.25)
    settled = settle(problem, meta, solver, start)
    torch.testing.assert_close(settled.params["h"][OTHERS], exact[OTHERS], rtol=0, atol=1e-7)
    assert settled.phase.diverged == (1,)
    assert settled.phase.unsettled == [1]
    assert settled.phase.failed
    assert settled.phase.outcome == "not converged"
    assert settled.phase.residual <= 1e-9  # of the others
    assert settled.phase.residuals is not None
    assert settled.phase.residuals[1] == torch.inf
    assert str(settled.phase).endswith("steps; sample 1 of 4 diverged")
    assert torch.equal(settled.params["h"][1], start[1])
    assert settled.params["h"][1].isfinite().all()


def test_nan_in_one_sample_leaves_the_others_alone():
    """The root of what is negative after a step; without a tolerance, too."""
    matrices, shifts = random_maps(4, 5, 0.7)
    problem, meta, _ = beside_a_wild_one(lambda h: 1 + (1 - 2 * h.abs()).sqrt())
    settled = settle(problem, meta, eg.Anderson(max_steps=9))
    expected = settle(*affine(matrices, shifts)[:2], eg.Anderson(max_steps=9))
    torch.testing.assert_close(settled.params["h"][OTHERS], expected.params["h"][OTHERS])
    assert settled.phase.outcome == "stopped"
    assert settled.phase.failed
    assert settled.phase.unsettled == [1]
    assert "sample 1 of 4 diverged" in str(settled.phase)


def test_samples_diverge_one_after_the_other_until_none_is_left():
    """`h ↦ a h + 1` overflows float64 after 308 / log₁₀ a steps: after 11, and after 39."""
    slopes = torch.tensor([[1e8], [1e30]]).double()
    problem = eg.FixedPoint(
        lambda p, m: {"h": slopes * p["h"] + m["b"]}, lambda p, m: p["h"].sum(), samples=True
    )
    meta = {"b": torch.ones(2, 1).double()}
    assert settle(problem, meta, eg.Picard(max_steps=20)).phase.diverged == (1,)
    with pytest.raises(eg.SettlingError, match=r"is (inf|nan) at step 39 in 2 samples \(0, 1\)"):
        settle(problem, meta, eg.Picard(max_steps=60))


def test_what_is_recorded_cannot_be_put_back():
    problem, meta, _ = beside_a_wild_one()
    start, solver = {"h": torch.zeros_like(meta["b"])}, eg.Picard(max_steps=20)
    with pytest.raises(eg.SettlingError, match="diverged"):
        eg.meta_gradient(problem, start, meta, solver=solver, estimator=eg.Unrolled())


def test_the_status_names_what_diverged():
    problem, meta, exact = beside_a_wild_one()
    result = eg.meta_gradient(
        problem,
        {"h": torch.zeros_like(meta["b"])},
        meta,
        solver=eg.Anderson(tol=1e-10, max_steps=200),
        estimator=eg.Adjoint(solver=eg.Anderson(tol=1e-10)),
    )
    assert "sample 1 of 4 diverged" in result.status
    matrices, _ = random_maps(4, 5, 0.7)  # the gradient of ‖h‖² by b is 2 (I - A)⁻ᵀ h
    expected = torch.linalg.solve(torch.eye(5).double() - matrices.mT, 2 * exact)
    torch.testing.assert_close(result.grads["b"][OTHERS], expected[OTHERS], rtol=1e-7, atol=1e-9)


def test_broyden_learns_nothing_from_rounding():
    """`h ↦ h + c` has no fixed point; what rounding leaves of its constant velocity is no slope."""
    problem = eg.FixedPoint(lambda p, m: {"h": p["h"] + m["c"]}, lambda p, m: p["h"].sum())
    c = torch.tensor([0.1, 0.7, 1.3])
    result = eg.meta_gradient(
        problem,
        {"h": torch.rand(3)},
        {"c": c},
        solver=eg.Broyden(tol=1e-4, max_steps=20),
        estimator=eg.T1T2(),
    )
    assert result.phases[0].outcome == "not converged"
    assert result.phases[0].residual == pytest.approx(c.norm().item(), rel=1e-4)
    assert result.params["h"].max() < 30


@pytest.mark.parametrize(
    "make",
    [
        lambda: eg.Anderson(history=2.5),  # pyright: ignore[reportArgumentType]
        lambda: eg.Broyden(history=2.5),  # pyright: ignore[reportArgumentType]
        lambda: eg.PhantomGradient(steps=2.5),  # pyright: ignore[reportArgumentType]
        lambda: eg.NeumannSeries(terms=2.5),  # pyright: ignore[reportArgumentType]
    ],
)
def test_counts_are_whole(make):
    with pytest.raises(
        eg.ConfigurationError, match=r"must be a whole number of at least 1, got 2\.5"
    ):
        make()


def test_an_adjoint_has_no_values_to_compare():
    with pytest.raises(eg.ConfigurationError, match=r"LBFGS compares values of a loss.*Anderson"):
        eg.Adjoint(solver=eg.LBFGS())


@pytest.mark.parametrize(
    "estimator", [eg.Adjoint(), eg.PhantomGradient(steps=40), eg.LeastControl()]
)
def test_a_problems_gradient_is_that_of_the_samples_that_settled(estimator):
    """Outside of a layer, too, where the outer loss is a function of all samples."""
    x = torch.tensor([[0.1], [9.0], [-0.2]]).double()

    def gradient(rows):
        return eg.meta_gradient(
            eg.FixedPoint(
                lambda p, m: {"h": p["h"].square() + m["w"] * x[rows]},
                lambda p, m: (p["h"] - 1).square().sum(),
                samples=True,
            ),
            {"h": torch.zeros(len(rows), 1).double()},
            {"w": torch.ones(1).double()},
            solver=eg.Picard(tol=1e-10, max_steps=300),
            estimator=estimator,
        )

    whole, others = gradient([0, 1, 2]), gradient([0, 2])
    assert "sample 1 of 3 diverged" in whole.status
    torch.testing.assert_close(whole.grads, others.grads, rtol=1e-6, atol=1e-8)
