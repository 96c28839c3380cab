"""Going on from what has settled: the same gradient, without the free phase."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import equigrad as eg

SOLVER = eg.GradientDescent(lr=0.1, momentum=0.5, max_steps=30)


def dropout_network():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64).unbind()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
    net = net.double()

    def inner(p, m):
        decay = m["decay"].exp() * sum(w.square().sum() for w in p.values())
        return (functional_call(net, p, x) - y).square().mean() + decay

    problem = eg.Bilevel(inner, lambda p, m: (functional_call(net, p, y) - x).square().mean())
    return problem, dict(net.named_parameters()), {"decay": torch.tensor(-3.0).double()}


@pytest.mark.parametrize(
    "estimator",
    [
        eg.Contrastive(),
        eg.Contrastive(scheme="symmetric", momentum="keep"),
        eg.T1T2(),
        eg.ConjugateGradient(max_iterations=3, indefinite="stop"),
        eg.FiniteDifferenceT1T2(),
    ],
    ids=str,
)
def test_same_bits_for_the_free_phase_less(estimator):
    problem, params, meta = dropout_network()
    torch.manual_seed(3)
    whole = eg.meta_gradient(problem, params, meta, solver=SOLVER, estimator=estimator)
    after = torch.rand(2)
    torch.manual_seed(3)
    settled = eg.settle(problem, params, meta, solver=SOLVER)
    assert torch.equal(torch.rand(2), after)
    for _ in range(2):
        again = eg.meta_gradient(
            problem, params, meta, solver=SOLVER, estimator=estimator, settled=settled
        )
        assert torch.equal(again.grads["decay"], whole.grads["decay"])
        assert again.phases == whole.phases
        assert (again.outer_loss, again.status) == (whole.outer_loss, whole.status)
        assert whole.gradient_evaluations - again.gradient_evaluations == settled.phase.steps
    for ours, theirs in ((settled.params, whole.params), (settled.buffers, whole.buffers)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_start_that_is_learned():
    center = {"w": torch.tensor([1.0, -2.0], requires_grad=True)}
    problem = eg.Bilevel(
        lambda p, m: 0.5 * p["w"].square().sum(), lambda p, m: (p["w"] - 1).square().sum()
    )
    solver = eg.GradientDescent(lr=0.5, max_steps=2)
    settled = eg.settle(problem, center, center, solver=solver)
    for estimator in (eg.Reptile(), eg.FirstOrderMAML()):
        one, other = (
            eg.meta_gradient(
                problem, center, center, solver=solver, estimator=estimator, settled=given
            )
            for given in (None, settled)
        )
        assert torch.equal(one.grads["w"], other.grads["w"])


def test_another_solver_starts_with_a_new_state():
    problem, params, meta = dropout_network()
    assert problem.modules
    problem.modules[0].eval()
    settled = eg.settle(problem, params, meta, solver=eg.LBFGS(max_steps=20))
    estimator = eg.Contrastive(momentum="keep")
    result = eg.meta_gradient(
        problem, params, meta, solver=SOLVER, estimator=estimator, settled=settled
    )
    assert result.phases[0] == settled.phase
    assert result.grads["decay"].isfinite()


@pytest.mark.parametrize(
    "estimator", [eg.Unrolled(), eg.MAML(), eg.ForwardMode(), eg.EvolutionStrategies()], ids=str
)
def test_estimators_that_need_the_steps_refuse(estimator):
    start = {"w": torch.tensor([1.0, -2.0], requires_grad=True)}
    problem = eg.Bilevel(
        lambda p, m: 0.5 * p["w"].square().sum(), lambda p, m: (p["w"] - 1).square().sum()
    )
    settled = eg.settle(problem, start, start, solver=SOLVER)
    with pytest.raises(eg.ConfigurationError, match=f"{type(estimator).__name__} needs all steps"):
        eg.meta_gradient(problem, start, start, solver=SOLVER, estimator=estimator, settled=settled)


def test_what_does_not_fit_is_refused():
    problem, params, meta = dropout_network()
    settled = eg.settle(problem, params, meta, solver=SOLVER)

    def call(params=params, meta=meta, **changes):
        given = {"solver": SOLVER, "settled": settled, **changes}
        eg.meta_gradient(problem, params, meta, **given)

    with pytest.raises(eg.ProblemError, match="other values of meta_params 'decay'"):
        call(meta={"decay": meta["decay"] + 1})
    with pytest.raises(eg.ProblemError, match="other values of meta_params 'decay'"):
        call(meta={"decay": meta["decay"].float()})
    with pytest.raises(eg.ProblemError, match="params must be a dictionary from names to tensors"):
        call(params=list(params.values()))
    with pytest.raises(eg.ProblemError, match="settled was computed for params"):
        call(params={"other": torch.zeros(1)})
    with pytest.raises(eg.ConfigurationError, match="settled must be a Settled, got"):
        call(settled=settled.phase)
    with pytest.raises(eg.ConfigurationError, match="uses no free phase"):
        call(estimator=eg.LeastControl(start="params"))


@pytest.mark.parametrize("rate", [1.0, 1e200], ids=["unsettled", "diverged"])
def test_a_map_that_has_not_settled(rate):
    generator = torch.Generator().manual_seed(0)
    start = {"h": torch.zeros(3, 4, dtype=torch.float64)}
    meta = {"w": torch.randn(4, 4, generator=generator, dtype=torch.float64) / 4}
    rates = torch.tensor([[0.5], [rate], [-0.5]], dtype=torch.float64)
    problem = eg.FixedPoint(
        map=lambda p, m: {"h": rates * (p["h"] @ m["w"]) + 0.5},
        outer_loss=lambda p, m: (p["h"] - 1).square().sum(),
        samples=True,
    )
    solver = eg.Picard(tol=1e-12, max_steps=4)
    settled = eg.settle(problem, start, meta, solver=solver)
    assert settled.phase.failed
    assert settled.phase.diverged == (() if rate == 1 else (1,))
    one, other = (
        eg.meta_gradient(problem, start, meta, solver=solver, estimator=eg.GMRES(), settled=given)
        for given in (None, settled)
    )
    assert torch.equal(one.grads["w"], other.grads["w"])
    assert one.status == other.status
    assert other.status.startswith(settled.status)
