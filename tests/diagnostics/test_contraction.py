"""Spectral radii against the eigenvalues of the Jacobian itself."""

import pytest
import torch

import equigrad as eg
from equigrad.diagnostics.contraction import spectral_radius


def tanh_map(units, samples, scale=1.5, seed=0):
    """`h ↦ tanh(W h + b)`, whose Jacobian at h is `D W`, far from symmetric."""
    torch.manual_seed(seed)
    meta = {"w": scale * torch.randn(units, units).double() / units**0.5}
    h = torch.randn(samples, units).double()
    problem = eg.FixedPoint(
        lambda p, m: {"h": torch.tanh(p["h"] @ m["w"].T)}, lambda p, m: p["h"].sum(), samples=True
    )
    gain = 1 - torch.tanh(h @ meta["w"].T).square()
    radii = torch.linalg.eigvals(gain[:, :, None] * meta["w"]).abs().amax(1)
    return problem, {"h": h}, meta, radii


@pytest.mark.parametrize("units", [1, 4, 12])
def test_exact_for_small_states_sample_by_sample(units):
    problem, params, meta, radii = tanh_map(units, samples=6)
    found = spectral_radius(problem, params, meta)
    torch.testing.assert_close(found, radii, rtol=1e-7, atol=1e-9)


def test_close_for_large_states():
    """The eigenvalues of a random matrix fill a disc, its edge is found to a few per cent."""
    problem, params, meta, radii = tanh_map(200, samples=3)
    found = spectral_radius(problem, params, meta, vectors=60)
    assert ((found / radii - 1).abs() < 0.1).all()
    assert (found < 1.001 * radii).all()


def test_a_complex_pair_of_one_vector():
    """A rotation scaled by 1.2: no real eigenvalue, which power iteration would never settle on."""
    turn = 1.2 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    problem = eg.FixedPoint(
        lambda p, m: {
            "a": (turn @ torch.cat([p["a"], p["b"]]))[:1] + m["c"],
            "b": (turn @ torch.cat([p["a"], p["b"]]))[1:],
        },
        lambda p, m: p["a"].sum(),
    )
    params = {"a": torch.zeros(1).double(), "b": torch.zeros(1).double()}
    found = spectral_radius(problem, params, {"c": torch.ones(1).double()})
    assert found.shape == ()
    assert found.item() == pytest.approx(1.2, rel=1e-9)


def test_a_map_that_forgets_has_radius_zero():
    problem = eg.FixedPoint(lambda p, m: {"h": 0 * p["h"] + m["c"]}, lambda p, m: p["h"].sum())
    assert spectral_radius(problem, {"h": torch.ones(3)}, {"c": torch.ones(3)}) == 0


def test_losses_have_no_radius():
    problem = eg.Bilevel(lambda p, m: (p["w"] * m["c"]).square().sum(), lambda p, m: p["w"].sum())
    with pytest.raises(eg.ConfigurationError, match="a Bilevel problem has no map"):
        spectral_radius(problem, {"w": torch.ones(1)}, {"c": torch.ones(1)})


def test_meta_gradients_name_a_map_that_does_not_settle():
    problem, params, meta, _ = tanh_map(4, samples=3, scale=4.0)
    result = eg.meta_gradient(
        problem, params, meta, solver=eg.Picard(tol=1e-8, max_steps=30), estimator=eg.T1T2()
    )
    assert "not converged" in result.status
    assert "the spectral radius of ∂F/∂φ there is" in result.status


def test_vectors_are_counted():
    problem, params, meta, _ = tanh_map(4, samples=3)
    with pytest.raises(eg.ConfigurationError, match="vectors must be a whole number of at least 1"):
        spectral_radius(problem, params, meta, vectors=0)


def test_an_estimate_says_that_it_is_one():
    problem, params, meta, _ = tanh_map(40, samples=2, scale=4.0)
    result = eg.meta_gradient(
        problem, params, meta, solver=eg.Picard(max_steps=1, tol=1e-9), estimator=eg.T1T2()
    )
    assert "the spectral radius of ∂F/∂φ there is about" in result.status
