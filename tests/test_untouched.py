"""What a call may not change: the user's tensors, modules, buffers, flags and random state."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call

import equigrad as eg
from equigrad.buffers import find_modules

SOLVER = eg.GradientDescent(lr=0.01, max_steps=12)
X, Y = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).unbind()


def normalised_network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))


def losses(net, fail_after=None):
    calls = {"outer": 0}

    def inner(p, m):
        return (functional_call(net, p, X) - Y).square().mean() + m["decay"].exp() * sum(
            w.square().sum() for w in p.values()
        )

    def outer(p, m):
        calls["outer"] += 1
        if fail_after is not None and calls["outer"] > fail_after:
            raise ZeroDivisionError("the user's loss failed")
        return (functional_call(net, p, Y) - X).square().mean()

    return inner, outer


@pytest.mark.parametrize("fail_after", [None, 0, 3])
@pytest.mark.parametrize(
    "estimator",
    [
        eg.Contrastive(),
        eg.Contrastive(scheme="forward", nudge="loss"),
        eg.Unrolled(segment=5),
        eg.ForwardMode(),
        eg.EvolutionStrategies(pairs=2),
    ],
    ids=str,
)
def test_module_buffers_flags_and_random_state(fail_after, estimator):
    net = normalised_network()
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    params = dict(net.named_parameters())
    meta = {"decay": torch.tensor(-3.0, requires_grad=True)}
    torch.manual_seed(11)
    torch.randint(2**62, ())  # the one draw that a call makes
    expected_next = torch.rand(3)
    torch.manual_seed(11)

    def call():
        return eg.meta_gradient(
            eg.Bilevel(*losses(net, fail_after)),
            params,
            meta,
            solver=SOLVER,
            estimator=estimator,
        )

    if fail_after is None:
        call()
    else:
        with pytest.raises(ZeroDivisionError):
            call()
    assert torch.equal(torch.rand(3), expected_next)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m.training for m in net] == [True, True, False, True]
    assert all(p.grad is None for p in [*params.values(), *meta.values()])


def test_every_nudged_phase_starts_with_the_same_buffers():
    """A loss that depends on a running count would contrast noise if phases inherited it."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.count = self.count + 1  # replaced, not changed in place
            return x / self.count

    counter = Counter()
    problem = eg.Bilevel(
        lambda p, m: counter((p["w"] - m["c"]).square().sum()) + p["w"].square().sum(),
        lambda p, m: (p["w"] - 1).square().sum(),
    )
    w, c = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    estimates = [
        eg.meta_gradient(
            problem,
            {"w": w},
            {"c": c},
            solver=eg.GradientDescent(lr=0.1, max_steps=9),
            estimator=eg.Contrastive(beta=beta, scheme="symmetric"),
        ).grads["c"]
        for beta in (1e-6, 1e-3)
    ]
    torch.testing.assert_close(*estimates, rtol=1e-2, atol=0)
    assert counter.count == 0


@pytest.mark.parametrize("scheme", ["forward", "symmetric"])
def test_dropout_masks_are_common_to_all_phases(scheme):
    """Masks that differed would be divided by β: the estimate would explode as β falls."""
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    synapse = eg.nn.ComplexSynapse(net, strength=0.1)
    x, y = X.double(), Y.double()
    problem = eg.Bilevel(
        lambda p, m: (synapse(p, x) - y).square().mean(),
        lambda p, m: (synapse(p, y) - x).square().mean(),
        regularizer=synapse,
    )

    def estimate(beta, seed=0):
        torch.manual_seed(seed)
        result = eg.meta_gradient(
            problem,
            synapse.params(),
            synapse.meta_params(),
            solver=eg.GradientDescent(lr=0.05, max_steps=30),
            estimator=eg.Contrastive(beta=beta, scheme=scheme),
        )
        return torch.cat([g.flatten() for g in result.grads.values()])

    def difference(one, other):
        return ((one - other).norm() / other.norm()).item()

    small, smaller = estimate(1e-4), estimate(1e-6)
    assert difference(small, smaller) < 1e-2
    assert difference(small, estimate(1e-4, seed=1)) > 0.1  # masks there are


def test_mini_batches_come_in_the_same_order_in_every_phase():
    seen: dict[str, list[int]] = {"inner": [], "outer": []}

    def inner(p, m, batch):
        seen["inner"].append(batch)
        return (p["w"] - m["c"] - batch).square().sum()

    def outer(p, m, batch):
        seen["outer"].append(batch)
        return (p["w"] - batch).square().sum()

    problem = eg.Bilevel(inner, outer, inner_batches=[0, 1, 2], outer_batches=[5, 6])
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(1, dtype=torch.float64)},
        {"c": torch.ones(1, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1, max_steps=4),
        estimator=eg.Contrastive(beta=0.1, scheme="forward", nudge="loss", error=False),
    )
    check, whole = [0], [0, 1, 2]
    free, continued = [0, 1, 2, 0], [1, 2, 0, 1]
    # nudged and matched phase see the same batches; ∂L/∂θ is averaged over all
    look = [0] * 4  # a problem that is seen for the first time
    assert seen["inner"] == check + free + continued + continued + whole + whole + look
    # the check looks at the second outer batch too: θ might act on that one alone
    assert seen["outer"] == [5, 6, *[5, 6, 5, 6], *[5, 5], *[5, 6]]
    assert result.outer_loss == pytest.approx(
        sum((result.params["w"].item() - b) ** 2 for b in (5, 6)) / 2
    )


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("estimator", [eg.Contrastive(beta=1e-4), eg.T1T2()])
def test_a_meta_parameter_that_acts_on_one_batch_only(order, estimator):
    """Mean over batches of `100 m[b] + ½(w - c)²`: the direct gradient is 50 for either name."""
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (p["w"] - 1).square().sum(),
        lambda p, m, b: 100 * m["ab"[b]] + 0.5 * p["w"].square().sum(),
        outer_batches=order,
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(2, dtype=torch.float64)},
        {name: torch.tensor(0.0, dtype=torch.float64) for name in "ab"},
        solver=eg.GradientDescent(lr=0.5, max_steps=30),
        estimator=estimator,
    )
    assert result.grads["a"].item() == pytest.approx(50)
    assert result.grads["b"].item() == pytest.approx(50)


def test_a_tolerance_is_met_by_all_batches_together():
    """One batch is at its minimum where it starts, the mean of all is not."""
    batches = [float(b) for b in range(10)]
    problem = eg.Bilevel(
        lambda p, m, b: 0.5 * (p["w"] - b - m["c"]).square().sum(),
        lambda p, m: p["w"].sum(),
        inner_batches=batches,
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(1, dtype=torch.float64)},
        {"c": torch.zeros(1, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=1e-3, tol=1e-2, max_steps=20000),
        estimator=eg.Contrastive(beta=1e-3),
    )
    assert result.phases[0].outcome == "converged"
    assert result.params["w"].item() == pytest.approx(4.5, abs=0.05)
    assert result.grads["c"].item() == pytest.approx(1.0, rel=0.05)


def test_training_flags_are_the_same_in_every_phase():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    seen = []

    def inner(p, m):
        seen.append(net.training)
        return (functional_call(net, p, X) - Y).square().mean() * m["scale"]

    def outer(p, m):
        net.eval()
        return (functional_call(net, p, Y) - X).square().mean()

    eg.meta_gradient(
        eg.Bilevel(inner, outer),
        dict(net.named_parameters()),
        {"scale": torch.ones(())},
        solver=eg.GradientDescent(lr=0.01, max_steps=3),
        estimator=eg.T1T2(),
    )
    assert all(seen)
    assert net.training


def test_frozen_parameters_that_settle_are_named():
    net = nn.Linear(3, 3)
    net.bias.requires_grad_(False)
    result = eg.meta_gradient(
        eg.Bilevel(
            lambda p, m: (functional_call(net, p, X) - m["y"]).square().mean(),
            lambda p, m: (functional_call(net, p, Y) - X).square().mean(),
        ),
        dict(net.named_parameters()),
        {"y": Y},
        solver=SOLVER,
    )
    assert "params 'bias' are optimised although they are frozen" in result.status


def test_modules_are_found_where_people_keep_them():
    class Trainer:
        def __init__(self):
            self.net = nn.Linear(1, 1)

        def loss(self, p, m):
            return self.net

        def __call__(self, p, m):
            return self.net

    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    trainer = Trainer()

    def helper():
        return b

    def loss(p, m, net=a):
        return net, helper()

    def found(*functions):
        return {id(m) for m in find_modules(*functions)}

    assert found(loss) == {id(a), id(b)}
    assert found(functools.partial(loss, net=b)) >= {id(b)}
    assert found(trainer.loss) == found(trainer) == {id(trainer.net)}
    assert found(lambda p, m: GLOBAL_NET) == {id(GLOBAL_NET)}
    whole = nn.Sequential(a, b)
    assert found(lambda p, m: (whole, a)) == {id(whole)}


GLOBAL_NET = nn.Linear(1, 1)


@pytest.mark.parametrize(("steps", "tol", "first"), [(4, None, 1), (5, None, 2), (60, 1e-3, 0)])
def test_nudged_phases_go_on_with_the_numbers_of_the_free_one(steps, tol, first):
    seen: list[int] = []

    def inner(p, m, batch):
        seen.append(batch)
        return (p["w"] - m["c"] - batch).square().sum()

    result = eg.meta_gradient(
        eg.Bilevel(inner, lambda p, m: p["w"].square().sum(), inner_batches=[0, 1, 2]),
        {"w": torch.zeros(1, dtype=torch.float64)},
        {"c": torch.ones(1, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1, max_steps=steps, tol=tol),
        estimator=eg.Contrastive(
            beta=0.1, error=False, nudged_solver=eg.GradientDescent(lr=0.1, max_steps=3)
        ),
    )
    free, *nudged = (phase.steps for phase in result.phases)
    assert result.phases[0].outcome == ("stopped" if tol is None else "converged")
    assert nudged == [3, 3]
    taken = seen[1 + free :] if tol is None else seen[-4 - 6 - 6 :]
    passes = [taken[:3], taken[3:6]]
    assert passes == [[(first + k) % 3 for k in range(3)]] * 2
