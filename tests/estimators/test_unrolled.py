"""Unrolled and ForwardMode: the gradient of T steps, whatever they led to."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.testing import Quadratic
from equigrad.vectors import flatten
from helpers import along, random_direction, small_network

STEPS = 17
RULES = {
    "plain": eg.GradientDescent(lr=0.1, max_steps=STEPS),
    "heavy ball": eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=STEPS),
    "nesterov": eg.GradientDescent(lr=0.1, momentum=0.9, nesterov=True, max_steps=STEPS),
}


class Learner:
    """A network with dropout, mini-batches, θ in both losses, in the regulariser and the start."""

    def __init__(self):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)).double()
        x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
        v, w = torch.randn(9, 3).double(), torch.randn(9, 1).double()
        self.net = eg.nn.ComplexSynapse(net, strength=0.1, positivity="log", learn=("center",))
        self.problem = eg.Bilevel(
            lambda p, m, rows: (self.net(p, m["scale"] * x[rows]) - y[rows]).square().mean(),
            lambda p, m: (self.net(p, v) - w).square().mean() + m["scale"].square().sum(),
            regularizer=self.net,
            inner_batches=[slice(0, 4), slice(4, 8), slice(8, 12)],
        )
        self.meta = self.net.meta_params() | {
            "scale": torch.ones(3, dtype=torch.float64, requires_grad=True),
            "gain": torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
        }

    def start(self, meta):
        return {name: meta["gain"] * p for name, p in self.net.params().items()}

    def gradient(self, solver, estimator):
        torch.manual_seed(0)
        return eg.meta_gradient(
            self.problem, self.start(self.meta), self.meta, solver=solver, estimator=estimator
        )

    def outer_loss(self, solver, meta):
        meta = {name: m.detach().requires_grad_() for name, m in meta.items()}
        torch.manual_seed(0)
        with Evaluation(self.problem, self.start(meta), meta) as evaluation:
            return evaluation.outer_loss(evaluation.settle(solver)).item()

    def difference(self, solver, direction, step=1e-5):
        above, below = (
            self.outer_loss(solver, {n: m + s * direction[n] for n, m in self.meta.items()})
            for s in (step, -step)
        )
        return (above - below) / (2 * step)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner()


def largest_difference(one, other) -> float:
    return max((one.grads[n] - other.grads[n]).abs().max().item() for n in one.grads)


@pytest.mark.parametrize("rule", RULES)
def test_central_differences_of_the_loss_after_so_many_steps(learner, rule):
    solver = RULES[rule]
    result = learner.gradient(solver, eg.Unrolled())
    assert result.phases[0].outcome == "stopped"
    assert result.phases[0].residual > 0.01  # nowhere near an equilibrium
    for seed in range(3):
        direction = random_direction(learner.meta, seed)
        reference = learner.difference(solver, direction)
        assert along(result.grads, direction) == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "estimator",
    [
        eg.Unrolled(segment=1),
        eg.Unrolled(segment=5),
        eg.Unrolled(segment=100),
        eg.Unrolled(truncation=STEPS),
        eg.Unrolled(truncation=100, segment=5),
    ],
    ids=str,
)
def test_segments_and_a_truncation_that_cuts_nothing_change_nothing(learner, rule, estimator):
    full = learner.gradient(RULES[rule], eg.Unrolled())
    assert largest_difference(full, learner.gradient(RULES[rule], estimator)) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_truncation_does_not_depend_on_the_segments(learner, rule):
    cut = learner.gradient(RULES[rule], eg.Unrolled(truncation=7))
    assert "truncation=7 differentiates fewer than all" in cut.status
    assert not cut.grads["gain"].any()
    for segment in (2, 7, 30):
        other = learner.gradient(RULES[rule], eg.Unrolled(truncation=7, segment=segment))
        assert largest_difference(cut, other) < 1e-12
    full = learner.gradient(RULES[rule], eg.Unrolled())
    assert largest_difference(cut, full) > 1e-3


def test_truncation_is_what_the_last_steps_contribute(quadratic):
    """K of T steps on the quadratic: `λη Σ_{k<K} (I-ηA)^k ∂L_out(φ_T)`."""
    steps, kept, eta = 20, 6, quadratic.step_size
    result = eg.meta_gradient(
        quadratic.problem,
        quadratic.params(),
        quadratic.meta_params(),
        solver=quadratic.solver(steps),
        estimator=eg.Unrolled(truncation=kept),
    )
    pressure = quadratic._hessian * (result.params["phi"] - quadratic._validation)
    contraction = 1 - eta * (quadratic._hessian + quadratic.strength)
    expected = sum(quadratic.strength * eta * contraction**k * pressure for k in range(kept))
    torch.testing.assert_close(result.grads["theta"], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_forward_mode_is_reverse_mode(learner, rule):
    solver = eg.GradientDescent(
        lr=0.1, momentum=RULES[rule].momentum, nesterov=RULES[rule].nesterov, max_steps=5
    )
    reverse = learner.gradient(solver, eg.Unrolled())
    forward = learner.gradient(solver, eg.ForwardMode())
    assert largest_difference(reverse, forward) < 1e-10


def test_many_steps_give_the_implicit_gradient():
    problem, synapse = small_network()
    solver = eg.GradientDescent(lr=0.1, momentum=0.95, nesterov=True, max_steps=1500)
    long, exact = (
        eg.meta_gradient(
            problem, synapse.params(), synapse.meta_params(), solver=solver, estimator=estimator
        )
        for estimator in (eg.Unrolled(segment=50), eg.ExactSolve())
    )
    for name in exact.grads:
        torch.testing.assert_close(long.grads[name], exact.grads[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "estimator",
    [eg.Unrolled(), eg.Unrolled(segment=4), eg.Unrolled(truncation=9, segment=2), eg.ForwardMode()],
    ids=str,
)
def test_every_replayed_step_finds_the_buffers_that_it_saw(estimator):
    """A loss whose curvature c_t grows with a running count: w_9 = Π(1 - η c_t) w_0."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self, w, pull):
            self.count += 1
            return 0.5 * (1 + 0.3 * self.count) * pull * w.square().sum()

    counter = Counter()
    problem = eg.Bilevel(lambda p, m: counter(p["w"], m["pull"]), lambda p, m: p["w"].sum())
    pull = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    result = eg.meta_gradient(
        problem,
        {"w": torch.ones(2, dtype=torch.float64)},
        {"pull": pull},
        solver=eg.GradientDescent(lr=0.2, max_steps=9),
        estimator=estimator,
    )
    end = torch.stack([1 - 0.2 * (1 + 0.3 * (t + 1)) * pull for t in range(9)]).prod()
    (expected,) = torch.autograd.grad(2 * end, pull)
    torch.testing.assert_close(result.grads["pull"], expected, rtol=1e-12, atol=0)
    assert counter.count == 0


def test_gradient_evaluations_are_counted(quadratic):
    def count(estimator):
        return eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=quadratic.solver(10),
            estimator=estimator,
        ).gradient_evaluations

    check, free, outer = 2, 10, 1
    assert count(eg.Unrolled()) == check + outer + 10 * (1 + 2)  # the graph of the free phase
    assert count(eg.Unrolled(segment=3)) == check + free + outer + 10 * (1 + 2)
    assert count(eg.Unrolled(truncation=4)) == check + free + outer + 4 * (1 + 2) + 2  # 6 = 4 + 2
    small = Quadratic(dim=3)
    forward = eg.meta_gradient(
        small.problem,
        small.params(),
        small.meta_params(),
        solver=small.solver(10),
        estimator=eg.ForwardMode(),
    )
    assert forward.gradient_evaluations == check + free + outer + 3 * 10 * 2


@pytest.mark.parametrize("tol", [None, 1e-30])
def test_the_report_is_that_of_the_phase_however_its_graph_is_had(learner, tol):
    solver = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=STEPS, check_every=5)
    torch.manual_seed(0)
    with Evaluation(learner.problem, learner.start(learner.meta), learner.meta) as evaluation:
        plain = evaluation.settle(solver)
        outer_loss = evaluation.outer_loss(plain).item()
    solver = dataclasses.replace(solver, tol=tol)
    once = learner.gradient(solver, eg.Unrolled())
    apart = learner.gradient(solver, eg.Unrolled(segment=6))
    for result in (once, apart):
        report = result.phases[0]
        assert report.outcome == ("stopped" if tol is None else "not converged")
        assert (report.steps, report.residual, report.start_residual) == pytest.approx(
            (STEPS, plain.phase.residual, plain.phase.start_residual), rel=1e-12
        )
        for name, p in plain.params.items():
            torch.testing.assert_close(result.params[name], p, rtol=1e-12, atol=1e-14)
            assert not result.params[name].requires_grad
        assert result.outer_loss == pytest.approx(outer_loss, rel=1e-12)
    # without a tolerance the number of steps is known, and none is taken twice
    assert apart.gradient_evaluations - once.gradient_evaluations == (STEPS if tol is None else 0)


def test_a_phase_that_diverges_under_its_graph_is_named(quadratic):
    with pytest.raises(eg.SettlingError, match="diverged"):
        eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=eg.GradientDescent(lr=1e30, max_steps=20),
            estimator=eg.Unrolled(),
        )


def saved_numbers(problem, start, meta, solver, estimator) -> int:
    """The most numbers that autograd's graph held at a time."""
    held, most = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor = tensor
            held += tensor.numel()
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        eg.meta_gradient(problem, start, meta, solver=solver, estimator=estimator)
    return most


def test_segments_hold_the_graph_of_one_segment_at_a_time():
    problem = eg.Bilevel(
        lambda p, m: (m["scale"] * p["w"]).pow(4).mean(), lambda p, m: p["w"].square().mean()
    )
    start = {"w": torch.linspace(0, 1, 1000)}
    meta = {"scale": torch.ones(())}

    def held(estimator, steps=100):
        solver = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=steps)
        return saved_numbers(problem, start, meta, solver, estimator)

    whole, tenth = held(eg.Unrolled()), held(eg.Unrolled(segment=10))
    assert whole > 9 * tenth
    assert held(eg.Unrolled(truncation=10)) == pytest.approx(tenth, rel=0.05)
    assert held(eg.ForwardMode()) == held(eg.ForwardMode(), steps=10)  # one step at a time


def test_a_solver_that_cannot_be_differentiated():
    quadratic = Quadratic(dim=3)
    solvers = {
        "LBFGS": eg.TorchOptimizer(optimizer=torch.optim.LBFGS, max_steps=5),
        "Adadelta": eg.TorchOptimizer(optimizer=torch.optim.Adadelta, max_steps=5),
        "LBFGS ": eg.LBFGS(max_steps=5),
        "BlackBox": eg.BlackBox(lambda objective, x: x),
    }
    for estimator in (eg.Unrolled(), eg.ForwardMode(), eg.Unrolled(segment=2)):
        for name, solver in solvers.items():
            with pytest.raises(
                eg.ConfigurationError,
                match=f"{name.strip()} are not.*GradientDescent.*Adam.*RAdam",
            ):
                eg.meta_gradient(
                    quadratic.problem,
                    quadratic.params(),
                    quadratic.meta_params(),
                    solver=solver,
                    estimator=estimator,
                )


def test_too_many_tangents(quadratic):
    with pytest.raises(eg.ConfigurationError, match=r"50 meta-parameters.*max_size=49.*Unrolled"):
        eg.meta_gradient(
            quadratic.problem,
            quadratic.params(),
            quadratic.meta_params(),
            solver=quadratic.solver(3),
            estimator=eg.ForwardMode(max_size=49),
        )


ADAM = eg.TorchOptimizer(
    optimizer=torch.optim.AdamW, options={"lr": 0.05, "weight_decay": 0.1}, max_steps=STEPS
)


@pytest.mark.parametrize("solver", [RULES["nesterov"], ADAM], ids=["nesterov", "AdamW"])
@pytest.mark.parametrize("segment", [None, 5])
def test_products_by_contrast_give_the_gradient_by_autograd(learner, solver, segment):
    by_contrast = learner.gradient(solver, eg.Unrolled(products="contrast", segment=segment))
    exact = learner.gradient(solver, eg.Unrolled(segment=segment))
    for name, grad in exact.grads.items():
        torch.testing.assert_close(by_contrast.grads[name], grad, rtol=1e-6, atol=1e-8)
    assert "the first is accurate to" in by_contrast.status
    chosen = by_contrast.gradient_evaluations - exact.gradient_evaluations
    assert 4 <= chosen <= 28  # for the distance, once


def test_the_distance_of_contrast_follows_what_the_gradient_answers():
    """Adam divides by gradients: the adjoint of a weight that has none is long, and along it the
    loss is flat, so that one distance for all steps is as good as none (float32)."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    params = {n: p.detach() for n, p in net.named_parameters()} | {"idle": torch.ones(2)}

    def inner(p, m):
        errors = (
            torch.func.functional_call(net, {n: p[n] for n in p if n != "idle"}, (x,)) - y
        ) ** 2
        return (m["w"] * errors.squeeze(1)).mean() + 1e-9 * (p["idle"] ** 2).sum()

    problem = eg.Bilevel(
        inner,
        lambda p, m: (
            torch.func.functional_call(net, {n: p[n] for n in p if n != "idle"}, (x + 1,))
            .square()
            .mean()
        ),
    )
    solver = eg.TorchOptimizer(optimizer=torch.optim.AdamW, options={"lr": 0.01}, max_steps=40)
    found = [
        eg.meta_gradient(
            problem,
            params,
            {"w": torch.ones(16)},
            solver=solver,
            estimator=eg.Unrolled(products=how),
        ).grads["w"]
        for how in ("contrast", "autograd")
    ]
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_a_loss_without_curvature_leaves_the_distance_of_contrast_finite():
    """Every product is rounding alone; `dL/ds = -η Σ_t g = -0.1 · 30` is exact all the same."""
    direction = torch.tensor([0.6, 0.8])
    problem = eg.Bilevel(
        lambda p, m: m["s"] * (direction * p["w"]).sum(), lambda p, m: (direction * p["w"]).sum()
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.ones(2)},
        {"s": torch.ones(())},
        solver=eg.GradientDescent(lr=0.1, max_steps=30, tol=None),
        estimator=eg.Unrolled(products="contrast"),
    )
    assert result.grads["s"].item() == pytest.approx(-3.0, rel=1e-3)


def test_products_by_contrast_need_one_hessian(learner):
    still = eg.FixedPoint(
        lambda p, m: {"h": 0.5 * p["h"] + m["b"]}, lambda p, m: p["h"].square().sum()
    )
    start, meta = {"h": torch.zeros(2)}, {"b": torch.ones(2)}
    solver = eg.GradientDescent(lr=1.0, max_steps=3)
    with pytest.raises(eg.ConfigurationError, match="a Bilevel problem with samples=False"):
        eg.meta_gradient(
            still, start, meta, solver=solver, estimator=eg.Unrolled(products="contrast")
        )


@pytest.mark.parametrize("segment", [None, 2])
def test_batch_normalisation_in_training_mode(segment):
    """Its running statistics are written after every step, and the graph keeps them."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)]
    net = eg.nn.Functional(nn.Sequential(*layers).double())
    x, y = torch.randn(10, 3).double(), torch.randn(10, 1).double()
    before = {n: b.clone() for n, b in layers[1].named_buffers()}

    def inner(p, m):
        return mse_loss(net(p, x), y) + m["l"].exp() * sum(q.square().sum() for q in p.values())

    problem = eg.Bilevel(inner, lambda p, m: mse_loss(net(p, x + 0.1), y))
    meta, solver = torch.tensor(-3.0).double(), eg.GradientDescent(lr=0.1, max_steps=5)

    def value(by):
        moved = {"l": meta + by}
        end = eg.settle(problem, net.params(), moved, solver=solver).params
        return problem.outer_loss(end, moved).item()

    found = eg.meta_gradient(
        problem, net.params(), {"l": meta}, solver=solver, estimator=eg.Unrolled(segment=segment)
    )
    central = (value(1e-4) - value(-1e-4)) / 2e-4
    assert found.grads["l"].item() == pytest.approx(central, rel=1e-6)
    assert all(torch.equal(b, before[n]) for n, b in layers[1].named_buffers())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_products_by_contrast_say_where_kinks_spoil_them(activation):
    """In float32 a difference needs a distance, within which a small ReLU network has kinks."""
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    y = (x[:, 0] > 0).long()
    net = eg.nn.Functional(nn.Sequential(nn.Linear(5, 16), activation(), nn.Linear(16, 2)))

    def inner(p, m):
        return (m["w"].sigmoid() * cross_entropy(net(p, x[:40]), y[:40], reduction="none")).mean()

    problem = eg.Bilevel(inner, lambda p, m: cross_entropy(net(p, x[40:]), y[40:]))
    solver = eg.TorchOptimizer(optimizer=torch.optim.AdamW, options={"lr": 0.01}, max_steps=50)
    exact, found = (
        eg.meta_gradient(
            problem,
            net.params(),
            {"w": torch.zeros(40)},
            solver=solver,
            estimator=eg.Unrolled(products=how),
        )
        for how in ("autograd", "contrast")
    )
    true = exact.grads["w"]
    error = ((found.grads["w"] - true).norm() / true.norm()).item()
    assert found.error_estimate is not None
    assert error < 4 * found.error_estimate
    assert ("does not change smoothly" in found.status) == (activation is nn.ReLU)
    assert exact.error_estimate is None


RULES_OF_NETWORKS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
}


def weighted(hidden, rule, dtype, products, seed, steps=30):
    """The gradient of weights of examples, by which a network trains."""
    draw = torch.Generator().manual_seed(seed)
    x, xv = (torch.randn(n, 8, generator=draw).to(dtype) for n in (64, 50))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 32), hidden(), nn.Linear(32, 1)).to(dtype)
    model = eg.nn.Functional(net)

    def errors(p, x):
        return (model(p, x) - x.sum(1, keepdim=True).sin()).square().squeeze(1)

    optimizer, options = RULES_OF_NETWORKS[rule]
    return eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (m["w"].sigmoid() * errors(p, x)).mean(), lambda p, m: errors(p, xv).mean()
        ),
        model.params(),
        {"w": torch.zeros(64, dtype=dtype)},
        solver=eg.TorchOptimizer(optimizer=optimizer, options=options, max_steps=steps),
        estimator=eg.Unrolled(products=products),
    )


@pytest.mark.parametrize("rule", RULES_OF_NETWORKS)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_products_by_contrast_of_smooth_networks_in_single_precision(activation, rule):
    for seed in range(2):
        exact = flatten(
            [*weighted(activation, rule, torch.float64, "autograd", seed).grads.values()]
        )
        found = weighted(activation, rule, torch.float32, "contrast", seed)
        error = (flatten([*found.grads.values()]) - exact).norm() / exact.norm()
        assert found.error_estimate is not None
        assert error < 4e-4  # 1e-5 to 2e-4
        assert error < found.error_estimate < 0.05


@pytest.mark.parametrize("rule", RULES_OF_NETWORKS)
def test_products_by_contrast_of_kinks_are_a_number_and_said_to_be_wrong(rule):
    for seed in range(2):
        exact = flatten([*weighted(nn.ReLU, rule, torch.float64, "autograd", seed).grads.values()])
        found = weighted(nn.ReLU, rule, torch.float32, "contrast", seed)
        error = (flatten([*found.grads.values()]) - exact).norm() / exact.norm()
        assert found.error_estimate is not None
        assert error < found.error_estimate
        assert "may be wrong by" in found.status


def test_rounding_that_looks_like_curvature_does_not_shorten_the_distance():
    """At the end of training gradients cancel, and round more coarsely than their sizes say."""

    def normalised():
        layers = nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()
        return nn.Sequential(*layers)

    exact, found = (
        flatten([*weighted(normalised, "momentum", dtype, products, 0, 200).grads.values()])
        for dtype, products in ((torch.float64, "autograd"), (torch.float32, "contrast"))
    )
    assert (found - exact).norm() < 2e-3 * exact.norm()
