import math
from typing import Any

import pytest
import torch
from torch.nn import functional

import equigrad as eg
from equigrad.training import Checkpoint
from equigrad.training.directions import AdaptiveBeta, Contrasts, LinearSystem
from equigrad.training.single_loop import Carriage, learn_jointly


def quadratic(batches=0):
    """A strongly convex problem in float64, its θ and the θ at which dL_out/dθ vanishes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, c = normal(6, 6), normal(6, 4), normal(6)
    a = a @ a.T / 6 + torch.eye(6, dtype=torch.float64)
    noise = [normal(6) for _ in range(batches)]
    noise = [n - sum(noise) / len(noise) for n in noise]  # the mean over batches is the problem

    def inner(params, meta, batch=None):
        w = params["w"]
        loss = 0.5 * w @ a @ w - w @ (b @ meta["t"])
        return loss if batch is None else loss + 0.1 * w @ batch

    def outer(params, meta):
        return 0.5 * (params["w"] - c).square().sum() + 0.05 * meta["t"].square().sum()

    problem = eg.Bilevel(inner, outer, inner_batches=noise or None)
    s = torch.linalg.solve(a, b)
    best = torch.linalg.solve(s.T @ s + 0.1 * torch.eye(4, dtype=torch.float64), s.T @ c)
    meta = {"t": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    return problem, {"w": torch.zeros(6, dtype=torch.float64)}, meta, best


def carried(state) -> Carriage:
    assert isinstance(state.carried, Carriage)
    return state.carried


def grad_of(meta, name="t") -> torch.Tensor:
    grad = meta[name].grad
    assert grad is not None
    return grad


def learned(direction, *, steps=800, solver=None, batches=0, lr=0.1, **options):
    problem, params, meta, best = quadratic(batches)
    state = learn_jointly(
        problem,
        params,
        meta,
        solver=solver or eg.GradientDescent(lr=0.2),
        direction=direction,
        optimizer=torch.optim.SGD(meta.values(), lr=lr),
        steps=steps,
        **options,
    )
    return state, ((meta["t"] - best).norm() / best.norm()).item()


@pytest.mark.parametrize(
    ("direction", "error"),
    [
        (Contrasts(beta=1e-3), 1e-3),
        (Contrasts(beta=0.05, scheme="symmetric"), 1e-3),
        (Contrasts(beta=0.02, points=3), 1e-3),
        (LinearSystem(), 1e-8),
    ],
)
def test_theta_goes_where_the_hypergradient_vanishes(direction, error):
    """Up to the finite β: of order β forward, β² symmetric and with three points."""
    assert learned(direction)[1] < error


def test_the_error_falls_with_beta_in_its_order():
    errors = [learned(Contrasts(beta=beta))[1] for beta in (0.04, 0.02)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    errors = [learned(Contrasts(beta=beta, scheme="symmetric"))[1] for beta in (0.2, 0.1)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def held(direction, inner_steps):
    """One direction, after many steps at a θ that stays."""
    problem, params, meta, _ = quadratic()
    with torch.no_grad():
        meta["t"].copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    state = learn_jointly(
        problem,
        params,
        meta,
        solver=eg.GradientDescent(lr=0.2),
        direction=direction,
        optimizer=torch.optim.SGD(meta.values(), lr=0.0),
        steps=1,
        inner_steps=inner_steps,
    )
    return problem, params, meta, state


@pytest.mark.parametrize("lam", [1.0, 10.0, 100.0])
def test_two_forward_points_are_f2sa(lam):
    r"""`∂ₓf(y) + λ [∂ₓg(y) - ∂ₓg(z)]`, y the minimum of f + λ g and z that of g (Kwon et al.)."""
    problem, params, meta, _ = held(Contrasts(beta=1 / lam), 400)
    grad = grad_of(meta)
    theta = meta["t"].detach().requires_grad_()

    def f(w):
        return problem.outer_loss({"w": w}, {"t": theta})

    def g(w):
        return problem.inner_loss({"w": w}, {"t": theta})

    settled = {}
    for name, loss in (("y", lambda w: f(w) + lam * g(w)), ("z", g)):
        w = params["w"].clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(loss, w)
        slope = torch.autograd.grad(loss(w), w)[0]
        settled[name] = (w - torch.linalg.solve(hessian, slope)).detach()
    (expected,) = torch.autograd.grad(
        f(settled["y"]) + lam * (g(settled["y"]) - g(settled["z"])), theta
    )
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


def test_at_rest_the_linear_system_is_implicit_differentiation():
    problem, params, meta, _ = held(LinearSystem(), 400)
    exact = eg.meta_gradient(
        problem, params, meta, solver=eg.LBFGS(tol=1e-12), estimator=eg.ExactSolve()
    )
    torch.testing.assert_close(grad_of(meta), exact.grads["t"], rtol=1e-8, atol=1e-10)


def test_one_step_of_the_linear_system_from_zero_is_t1t2_times_the_step_size():
    """v = -ρ ∂L_out/∂φ, and T1-T2 has -∂L_out/∂φ in its place."""
    problem, params, meta, _ = quadratic()
    rest = eg.settle(problem, params, meta, solver=eg.LBFGS(tol=1e-12)).params
    learn_jointly(
        problem,
        rest,
        meta,
        solver=eg.GradientDescent(lr=0.2),
        direction=LinearSystem(),
        optimizer=torch.optim.SGD(meta.values(), lr=0.0),
        steps=1,
    )
    t1t2 = eg.meta_gradient(
        problem, rest, meta, solver=eg.LBFGS(tol=1e-12), estimator=eg.T1T2()
    ).grads["t"]
    direct = 0.1 * meta["t"].detach()
    torch.testing.assert_close(grad_of(meta) - direct, 0.2 * (t1t2 - direct), rtol=1e-7, atol=1e-10)


def test_batches_that_states_share_cancel_in_the_contrast():
    """Noise of 0.1 divided by β = 0.01 would be ten; shared, it leaves no trace here."""
    assert learned(Contrasts(beta=0.01), batches=7)[1] < 0.02


def test_adaptive_beta_follows_the_rule_of_bome():
    _, error = learned(Contrasts(beta=AdaptiveBeta(eta=0.5)), steps=1500)
    assert error < 0.02
    problem, _, meta, state = held(Contrasts(beta=AdaptiveBeta(most=0.5)), 3)
    free, nudged = (s.tensors["w"] for s in carried(state).states)
    theta = meta["t"].detach().requires_grad_()
    w = nudged.detach().requires_grad_()
    inner, outer = problem.inner_loss, problem.outer_loss
    gap = inner({"w": w}, {"t": theta}) - inner({"w": free.detach()}, {"t": theta})
    q = torch.cat(torch.autograd.grad(gap, [w, theta]))
    f = torch.cat(torch.autograd.grad(outer({"w": w}, {"t": theta}), [w, theta]))
    weight = max(0.5 * q.dot(q) - f.dot(q), torch.tensor(0.0).double()) / q.dot(q)
    expected = min(max(1 / weight.item() if weight > 0 else math.inf, 1e-3), 0.5)
    assert carried(state).beta == pytest.approx(expected, rel=1e-9)


def test_three_points_estimate_what_two_of_them_miss():
    state, _ = learned(Contrasts(beta=0.1, points=3), steps=50, inner_steps=20)
    assert state.history  # the estimate is of the step, and not in its row
    problem, params, meta, _ = quadratic()
    seen = []

    class Watch(eg.training.Callback):
        def on_step(self, state, result):
            seen.append(result.error_estimate)

    learn_jointly(
        problem,
        params,
        meta,
        solver=eg.GradientDescent(lr=0.2),
        direction=Contrasts(beta=0.1, points=3),
        optimizer=torch.optim.SGD(meta.values(), lr=0.0),
        steps=1,
        inner_steps=400,
        callbacks=[Watch()],
    )
    exact = eg.meta_gradient(
        problem, params, meta, solver=eg.LBFGS(tol=1e-12), estimator=eg.ExactSolve()
    ).grads["t"]
    true = ((grad_of(meta) - exact).norm() / exact.norm()).item()
    assert true < seen[0] < 1


def network(seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    net = torch.nn.Sequential(
        torch.nn.Linear(5, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 3),
    )
    model = eg.nn.Functional(net)

    def inner(params, meta, batch):
        losses = functional.cross_entropy(model(params, x[batch]), y[batch], reduction="none")
        return (meta["w"][batch].sigmoid() * losses).mean()

    def outer(params, meta):
        return functional.cross_entropy(model(params, x[50:]), y[50:])

    batches = list(torch.arange(50).split(10))
    problem = eg.Bilevel(inner, outer, inner_batches=batches)
    return net, problem, model.params(), {"w": torch.zeros(60, requires_grad=True)}


@pytest.mark.parametrize(
    "solver",
    [
        eg.GradientDescent(lr=0.05, momentum=0.9),
        eg.TorchOptimizer(
            optimizer=torch.optim.Adam,
            options={"lr": 1e-2},
            scheduler=lambda adam: torch.optim.lr_scheduler.ExponentialLR(adam, 0.9),
            accumulate=3,
        ),
    ],
    ids=["momentum", "adam"],
)
@pytest.mark.parametrize("direction", [Contrasts(beta=0.2), LinearSystem()], ids=["F2SA", "SOBA"])
def test_what_was_stopped_resumes_to_the_same_bits(solver, direction, tmp_path):
    """With mini-batches, dropout, batch statistics and an optimiser's memory."""

    def run(steps, resume, path):
        torch.manual_seed(1)
        _, problem, params, meta = network()
        return learn_jointly(
            problem,
            params,
            meta,
            solver=solver,
            direction=direction,
            optimizer=torch.optim.Adam(meta.values(), lr=0.1),
            steps=steps,
            inner_steps=2,
            callbacks=[Checkpoint(path, resume=resume)],
        )

    whole = run(9, False, tmp_path / "whole.pt")
    run(4, False, tmp_path / "cut.pt")
    cut = run(9, True, tmp_path / "cut.pt")
    assert torch.equal(whole.meta_params["w"], cut.meta_params["w"])
    for one, other in zip(carried(whole).states, carried(cut).states, strict=True):
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        assert all(torch.equal(a, b) for a, b in zip(one.buffers, other.buffers, strict=True))


def test_the_users_module_is_as_it_was():
    net, problem, params, meta = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    learn_jointly(
        problem,
        params,
        meta,
        solver=eg.GradientDescent(lr=0.05),
        optimizer=torch.optim.SGD(meta.values(), lr=1.0),
        steps=5,
    )
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert net.training


def test_bad_input_is_a_sentence():
    falling: Any = lambda share: 1 - 1.5 * share  # noqa: E731
    problem, params, meta, _ = quadratic()

    def call(**changed):
        arguments = {
            "solver": eg.GradientDescent(lr=0.1),
            "optimizer": torch.optim.SGD(meta.values(), lr=0.1),
            "steps": 3,
            **changed,
        }
        return learn_jointly(problem, params, meta, **arguments)

    with pytest.raises(eg.ConfigurationError, match="inner_steps must be"):
        call(inner_steps=0)
    with pytest.raises(eg.ConfigurationError, match="LBFGS needs a loss that stays the same"):
        call(solver=eg.LBFGS())
    with pytest.raises(eg.ConfigurationError, match=r"beta must return a number above 0.*returned"):
        call(direction=Contrasts(beta=falling), steps=5)
    for said in (0.0, -0.1, math.nan, math.inf, None, "x", True, torch.ones(2), 1j):
        schedule: Any = lambda share, said=said: said  # noqa: E731
        with pytest.raises(eg.ConfigurationError, match=r"must return a number above 0.*when 0%"):
            call(direction=Contrasts(beta=schedule))
    takes_none: Any = lambda: 0.1  # noqa: E731
    with pytest.raises(
        eg.ConfigurationError, match=r"share of the loop .* for example beta\(0.5\)"
    ):
        call(direction=Contrasts(beta=takes_none))
    with pytest.raises(eg.ConfigurationError, match="LBFGS evaluates a loss several times"):
        call(optimizer=torch.optim.LBFGS(meta.values()))
    meta_on_no_device = {"t": torch.zeros(4, device="meta", requires_grad=True)}
    with pytest.raises(eg.ProblemError, match=r"meta_params\['t'\] is on the meta device"):
        learn_jointly(
            problem,
            params,
            meta_on_no_device,
            solver=eg.GradientDescent(lr=0.1),
            optimizer=torch.optim.SGD(meta_on_no_device.values(), lr=0.1),
            steps=1,
        )
    with pytest.raises(eg.ConfigurationError, match="even number of points"):
        Contrasts(scheme="symmetric", points=3)
    with pytest.raises(eg.ConfigurationError, match="scheme='forward' and points=2"):
        Contrasts(beta=AdaptiveBeta(), points=3)
    with pytest.raises(eg.SettlingError, match="use smaller steps"):
        call(solver=eg.GradientDescent(lr=1e6), steps=200)


def test_the_learner_of_symmetric_states_is_not_the_nudged_one():
    """Between the two: to second order in β where the free problem settles."""
    problem, params, meta, state = held(Contrasts(beta=0.02, scheme="symmetric"), 400)
    free = eg.settle(problem, params, meta, solver=eg.LBFGS(tol=1e-12)).params["w"]
    nudged = carried(state).states[0].tensors["w"]
    assert (state.params["w"] - free).norm() < 0.05 * (nudged - free).norm()
    outer = problem.outer_loss({"w": free}, meta).item()
    assert state.history[-1]["outer_loss"] == pytest.approx(outer, rel=1e-2)


def loop(problem, params, meta, direction, **options):
    arguments = {
        "solver": eg.GradientDescent(lr=0.1),
        "optimizer": torch.optim.SGD(meta.values(), lr=0.1),
        "steps": 3,
        **options,
    }
    return learn_jointly(problem, params, meta, direction=direction, **arguments)


def test_what_is_hidden_from_second_derivatives_is_refused():
    problem, params, meta, _ = quadratic()

    def inner(p, m):
        return problem.inner_loss(p, m) + 0.5 * (p["w"].detach() * p["w"]).sum()

    hidden = eg.Bilevel(inner, problem.outer_loss)
    with pytest.raises(eg.ProblemError, match="autograd"):
        loop(hidden, params, meta, LinearSystem())


def test_a_random_loss_is_named_at_every_step():
    problem, params, meta, _ = quadratic()
    own = torch.Generator().manual_seed(0)

    def inner(p, m):
        return problem.inner_loss(p, m) + torch.rand((), generator=own) * p["w"].sum()

    state = loop(eg.Bilevel(inner, problem.outer_loss), params, meta, Contrasts())
    assert all(
        "not a function of params and step alone" in str(row["status"]) for row in state.history
    )


def test_a_map_has_no_contrast_and_decay_in_the_optimiser_is_named():
    fixed = eg.FixedPoint(
        lambda p, m: {"h": torch.tanh(0.5 * p["h"] + m["b"])}, lambda p, m: p["h"].sum()
    )
    meta = {"b": torch.zeros(3, requires_grad=True)}
    with pytest.raises(eg.ConfigurationError, match="a FixedPoint problem does not have"):
        loop(fixed, {"h": torch.zeros(3)}, meta, Contrasts())
    problem, params, meta, _ = quadratic()
    adamw = eg.TorchOptimizer(optimizer=torch.optim.AdamW, options={"lr": 1e-2})
    state = loop(problem, params, meta, LinearSystem(), solver=adamw)
    assert "AdamW has weight_decay=0.01" in str(state.history[-1]["status"])


def test_every_phase_reports_its_own_nudge():
    problem, params, meta, _ = quadratic()
    seen = []

    class Watch(eg.training.Callback):
        def on_step(self, state, result):
            seen.append([phase.beta for phase in result.phases])

    loop(problem, params, meta, Contrasts(beta=0.2, scheme="symmetric"), callbacks=[Watch()])
    assert seen == [[0.2, -0.2]] * 3


@pytest.mark.parametrize("inner_steps", [1, 4, 5])
def test_a_loader_is_drawn_from_once_a_batch_and_theta_sees_all_of_them(inner_steps):
    """Eight batches: with a stride of four, θ would see two of them."""
    drawn, asked = [], set()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            drawn.append(i)
            return i

    def inner(p, m, batch):
        if m["t"].requires_grad and torch.is_grad_enabled():
            asked.add(batch.item())
        return (p["w"] - m["t"][batch]).square().sum()

    problem = eg.Bilevel(
        inner,
        lambda p, m: p["w"].square().sum(),
        inner_batches=torch.utils.data.DataLoader(Data(), batch_size=1),
        reaches={"inner": ["t"], "outer": []},
    )
    meta = {"t": torch.zeros(8, requires_grad=True)}
    steps, before = 16, len(drawn)
    loop(problem, {"w": torch.zeros(1)}, meta, Contrasts(), steps=steps, inner_steps=inner_steps)
    assert asked == set(range(8))
    assert len(drawn) - before <= steps * (inner_steps + 1) + 8


def renamed(problem, name):
    """The same problem with θ under another name."""
    return eg.Bilevel(
        lambda p, m: problem.inner_loss(p, {"t": m[name]}),
        lambda p, m: problem.outer_loss(p, {"t": m[name]}),
    )


@pytest.mark.parametrize("direction", [LinearSystem(), Contrasts(beta=AdaptiveBeta())])
def test_names_that_params_and_meta_params_share_change_nothing(direction):
    found = []
    for name in ("t", "w"):
        problem, params, meta, _ = quadratic()
        meta = {name: meta["t"]}
        learn_jointly(
            renamed(problem, name),
            params,
            meta,
            solver=eg.GradientDescent(lr=0.2),
            direction=direction,
            optimizer=torch.optim.SGD(meta.values(), lr=0.1),
            steps=20,
        )
        found.append(meta[name].detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("scheme", ["forward", "symmetric"])
def test_together_everything_moves_from_the_same_place(scheme):
    problem, params, meta, _ = quadratic(batches=3)
    state = learn_jointly(
        problem,
        params,
        meta,
        solver=eg.GradientDescent(lr=0.2),
        direction=Contrasts(beta=0.1, scheme=scheme, together=True),
        optimizer=torch.optim.SGD(meta.values(), lr=0.1),
        steps=7,
    )
    nudges = [0.0, 0.1] if scheme == "forward" else [0.1, -0.1]
    theta, states = torch.zeros(4, dtype=torch.float64), [params["w"], params["w"]]
    for step in range(7):
        t = theta.clone().requires_grad_()
        leaves = [w.clone().requires_grad_() for w in states]
        grads = []
        for w, nudge in zip(leaves, nudges, strict=True):
            batch = problem.batch("inner", step)
            loss = problem.inner_loss({"w": w}, {"t": t}, batch)
            loss = loss + nudge * problem.outer_loss({"w": w}, {"t": t})
            grads.append(torch.autograd.grad(loss, (w, t)))
        states = [w - 0.2 * g for w, (g, _) in zip(states, grads, strict=True)]
        theta = theta - 0.1 * (grads[1][1] - grads[0][1]) / (nudges[1] - nudges[0])
    torch.testing.assert_close(meta["t"].detach(), theta, rtol=1e-12, atol=1e-12)
    learner = states[0] if scheme == "forward" else sum(states) / 2
    torch.testing.assert_close(state.params["w"], learner, rtol=1e-12, atol=1e-12)


def test_together_arrives_at_the_same_theta_for_half_the_gradients():
    counts = []
    for together in (False, True):
        state, error = learned(Contrasts(beta=1e-3, scheme="symmetric", together=together))
        assert error < 1e-4
        counts.append(state.gradient_evaluations)
    assert counts[1] < 0.6 * counts[0]


def test_together_is_refused_where_there_is_more_than_one_loss():
    with pytest.raises(eg.ConfigurationError, match="needs the states after their step"):
        Contrasts(beta=AdaptiveBeta(), together=True)
    synapse = eg.nn.ComplexSynapse(torch.nn.Linear(3, 1, bias=False))
    meta = synapse.meta_params()
    problem = eg.Bilevel(
        lambda p, m: p["weight"].square().sum(),
        lambda p, m: (p["weight"] - 1).square().sum(),
        regularizer=synapse,
    )
    with pytest.raises(
        eg.ConfigurationError, match="Bilevel problem with a regularizer does not move along"
    ):
        learn_jointly(
            problem,
            {"weight": torch.zeros(1, 3)},
            meta,
            solver=eg.GradientDescent(),
            direction=Contrasts(together=True),
            optimizer=torch.optim.SGD(meta.values(), lr=0.1),
            steps=1,
        )


@pytest.mark.parametrize(("direct", "calls"), [(False, 2), (True, 3)])
def test_the_outer_loss_is_asked_only_where_it_moves_something(direct, calls):
    asked = []

    def outer(p, m):
        asked.append(1)
        loss = (p["w"] - 1).square().sum()
        return loss + m["t"].square().sum() if direct else loss

    meta = {"t": torch.zeros(3, requires_grad=True)}
    options = {
        "solver": eg.GradientDescent(lr=0.1),
        "direction": Contrasts(beta=0.1),
        "optimizer": torch.optim.SGD(meta.values(), lr=0.1),
    }
    problem = eg.Bilevel(lambda p, m: (p["w"] - m["t"]).square().sum(), outer)
    counts = []
    for steps in (1, 1, 4):  # the first look at a loss is a longer one
        asked.clear()
        learn_jointly(problem, {"w": torch.zeros(3)}, meta, steps=steps, **options)
        counts.append(len(asked))
    assert counts[2] - counts[1] == 3 * calls


@pytest.mark.parametrize("direction", [Contrasts(together=True), LinearSystem()])
def test_a_batch_on_which_a_loss_is_constant_moves_nothing(direction):
    def outer(p, m, batch):
        return (p["w"] - 1).square().sum() if batch else torch.tensor(2.0)

    meta = {"t": torch.zeros(3, requires_grad=True)}
    problem = eg.Bilevel(lambda p, m: (p["w"] - m["t"]).square().sum(), outer, outer_batches=[1, 0])
    state = learn_jointly(
        problem,
        {"w": torch.zeros(3)},
        meta,
        solver=eg.GradientDescent(lr=0.1),
        direction=direction,
        optimizer=torch.optim.SGD(meta.values(), lr=0.1),
        steps=2,
    )
    assert [row["outer_loss"] for row in state.history] == [pytest.approx(3.0), 2.0]
