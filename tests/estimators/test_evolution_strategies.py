import math

import pytest
import torch

import equigrad as eg
from equigrad.testing import Quadratic


def estimate(quadratic, estimator, steps=200):
    return eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=eg.GradientDescent(lr=quadratic.step_size, max_steps=steps, tol=1e-9),
        estimator=estimator,
    )


@pytest.fixture(scope="module")
def small():
    return Quadratic(dim=3, strength=1.0)


def samples(small, pairs, count):
    """Estimates from seeds of their own."""
    return torch.stack(
        [
            estimate(small, eg.EvolutionStrategies(pairs=pairs, sigma=0.1, seed=seed)).grads[
                "theta"
            ]
            for seed in range(count)
        ]
    )


def test_unbiased_and_of_variance_one_over_pairs(small):
    """On a quadratic antithetic pairs are unbiased for any σ; `Var = (‖∇‖² I + ∇∇ᵀ) / n`."""
    exact = small.meta_gradient
    variance = exact.square().sum() + exact.square()
    for pairs, count in ((1, 160), (16, 20)):
        drawn = samples(small, pairs, count)
        error = (drawn.mean(0) - exact) / (variance / (pairs * count)).sqrt()
        assert error.abs().max().item() < 4
        spread = drawn.var(0).sum() / variance.sum() * pairs
        # the variance of a variance: 2 / count for normal draws, a few times that for ε²
        assert spread.item() == pytest.approx(1, abs=4 * math.sqrt(6 / count))


def test_the_reported_error_is_the_standard_error(small):
    """`√(tr Var / n) / ‖∇‖ = √((dim + 1) / n)`."""
    result = estimate(small, eg.EvolutionStrategies(pairs=150, sigma=0.1))
    assert result.error_estimate is not None
    assert result.error_estimate == pytest.approx(math.sqrt(4 / 150), rel=0.3)
    assert small.relative_error(result.grads["theta"]) < 3 * result.error_estimate
    assert estimate(small, eg.EvolutionStrategies(pairs=1)).error_estimate is None


def test_a_seed_decides_and_the_global_generator_does_not(small):
    one = estimate(small, eg.EvolutionStrategies(pairs=2, seed=5)).grads["theta"]
    torch.randn(7)
    two = estimate(small, eg.EvolutionStrategies(pairs=2, seed=5)).grads["theta"]
    other = estimate(small, eg.EvolutionStrategies(pairs=2, seed=6)).grads["theta"]
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_same_dropout_masks_on_both_sides():
    """With masks of their own, the two sides would differ by noise / σ."""
    dropout = torch.nn.Dropout(0.5)
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - m["c"]).square().sum(),
        lambda p, m: dropout(p["w"]).sum(),
        modules=(dropout,),
    )
    meta = {"c": torch.zeros(50, dtype=torch.float64)}
    start = {"w": torch.ones(50, dtype=torch.float64)}
    solver = eg.GradientDescent(lr=1, max_steps=1)
    es = eg.EvolutionStrategies(pairs=3, sigma=1e-6)
    torch.manual_seed(0)
    result = eg.meta_gradient(problem, start, meta, solver=solver, estimator=es)
    torch.manual_seed(0)
    exact = eg.meta_gradient(problem, start, meta, solver=solver, estimator=eg.Unrolled())
    assert set(exact.grads["c"].tolist()) == {0.0, 2.0}
    # three pairs: the projection of the gradient on three directions, up to rounding
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack(
        [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(3)]
    )
    expected = (noise @ exact.grads["c"]) @ noise / 3
    torch.testing.assert_close(result.grads["c"], expected, rtol=1e-6, atol=1e-6)


def test_a_computed_start_moves_along():
    """`φ_T = C φ_0`, φ_0 = 2θ, so the gradient of ΣφT is 2C everywhere."""
    theta = {"t": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)}
    problem = eg.Bilevel(lambda p, m: 0.5 * p["w"].square().sum(), lambda p, m: p["w"].sum())
    result = eg.meta_gradient(
        problem,
        {"w": 2 * theta["t"]},
        theta,
        solver=eg.GradientDescent(lr=0.5, max_steps=2),
        estimator=eg.EvolutionStrategies(pairs=1, sigma=0.3),
    )
    noise = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(result.grads["t"], 0.5 * noise.sum() * noise)


def test_phases_that_did_not_settle_are_named(small):
    result = estimate(small, eg.EvolutionStrategies(pairs=1), steps=5)
    assert "perturbed meta-parameters ended not converged" in result.status


def test_a_sample_that_a_perturbation_loses_is_back_at_the_next():
    """`h = 2θ` in two samples, of which the second diverges where θ > 0 and stays at 0 there.

    So `L(x) = 2x` for x > 0 and `4x` for x < 0: every pair says `(2 + 4) / 2 · ε²`.
    """

    def relax(p, m):
        wild = torch.where(m["t"] > 0, 1e30, 0.5) * p["h"][1:] + m["t"]
        return {"h": torch.cat([0.5 * p["h"][:1] + m["t"], wild])}

    result = eg.meta_gradient(
        eg.FixedPoint(relax, lambda p, m: p["h"].sum(), samples=True),
        {"h": torch.zeros(2, 1, dtype=torch.float64)},
        {"t": torch.zeros((), dtype=torch.float64)},
        solver=eg.Picard(max_steps=80),
        estimator=eg.EvolutionStrategies(pairs=4),
    )
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, generator=generator, dtype=torch.float64).item() for _ in range(4)]
    expected = sum(3 * n**2 for n in noise) / 4
    assert result.grads["t"].item() == pytest.approx(expected, rel=1e-12)
    assert "ended diverged in part" in result.status


def test_any_solver_will_do(small):
    es = eg.EvolutionStrategies(pairs=3, sigma=0.1)
    result = eg.meta_gradient(
        small.problem,
        small.params(),
        small.meta_params(),
        solver=eg.LBFGS(tol=1e-10),
        estimator=es,
    )
    torch.testing.assert_close(
        result.grads["theta"], estimate(small, es).grads["theta"], rtol=1e-7, atol=1e-9
    )
