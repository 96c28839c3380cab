"""A module computes with the weights that it is handed, and with none of its own."""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import linear, mse_loss
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import equigrad as eg

X, V = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0)).double().unbind()
Y, W = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(1)).double().unbind()


class Tied(nn.Module):
    """Uses a matrix twice, as torch wants it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4).double()
        self.hold()

    def hold(self):
        pass

    def again(self, h):
        return linear(h, self.a.weight)

    def forward(self, x):
        return self.again(torch.tanh(self.a(x)))


class InList(Tied):
    def hold(self):
        self.held = [[self.a.weight]]

    def again(self, h):
        return linear(h, self.held[0][0])


class InTuple(Tied):
    def hold(self):
        self.held = (self.a.bias, self.a.weight)

    def again(self, h):
        return linear(h, self.held[1])


class InDict(Tied):
    def hold(self):
        self.held = {"w": self.a.weight}

    def again(self, h):
        return linear(h, self.held["w"])


class InPartial(Tied):
    def hold(self):
        self.held = functools.partial(linear, weight=self.a.weight)

    def again(self, h):
        return self.held(h)


class Checkpointed(Tied):
    def forward(self, x):
        h = checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)
        return self.again(h)


class Twice(Tied):
    def again(self, h):
        return self.a(h)


class CheckpointedPart(Tied):
    def again(self, h):
        return checkpoint(self.a, h, use_reentrant=False)


class Chained(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
        self.parts = nn.Sequential(*layers).double()

    def forward(self, x):
        return {"out": checkpoint_sequential(self.parts, 2, x, use_reentrant=False)}["out"]


class Plain(Chained):
    def forward(self, x):
        return self.parts(x)


ALIASED = [InList, InTuple, InDict, InPartial]
RECOMPUTED = [Checkpointed, CheckpointedPart]
DESCENT = eg.GradientDescent(lr=0.1, max_steps=30)


def made(kind):
    torch.manual_seed(3)
    return kind()


def problem(f):
    return eg.Bilevel(
        lambda p, m: (
            mse_loss(f(p, X), Y) + m["l"].exp() * sum(q.square().sum() for q in p.values())
        ),
        lambda p, m: mse_loss(f(p, V), W),
    )


def gradient(f, params, estimator):
    meta = {"l": torch.tensor(-1.0, dtype=torch.float64)}
    return eg.meta_gradient(problem(f), params, meta, solver=DESCENT, estimator=estimator)


def away(params):
    """Other weights than the module's own."""
    return {n: 0.5 * p + 0.1 for n, p in params.items()}


@pytest.mark.parametrize(
    "estimator",
    [eg.Contrastive(beta=0.01, scheme="symmetric"), eg.GMRES(), eg.Unrolled(), eg.T1T2()],
)
@pytest.mark.parametrize("kind", [*ALIASED, *RECOMPUTED, Chained])
def test_functional_binds_them_all(kind, estimator):
    plain = eg.nn.Functional(made({Chained: Plain, CheckpointedPart: Twice}.get(kind, Tied)))
    found = eg.nn.Functional(made(kind))
    params = away(plain.params())
    one, other = (gradient(f, params, estimator) for f in (plain, found))
    torch.testing.assert_close(one.grads, other.grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [*ALIASED, *RECOMPUTED, Chained])
def test_functional_call_is_refused(kind):
    net = made(kind)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    params = away(before)
    with pytest.raises(eg.ProblemError, match=r"its module's own weights.*nn.Functional"):
        gradient(lambda p, x: functional_call(net, p, (x,)), params, eg.Contrastive())
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_synapses_bind_them_all_and_make_ordinary_modules():
    synapse = eg.nn.ComplexSynapse(made(InList), strength=0.3)
    params = away(synapse.params())
    module = synapse.module(params)
    expected = torch.tanh(linear(X, params["a.weight"], params["a.bias"])) @ params["a.weight"].T
    torch.testing.assert_close(synapse(params, X), expected)
    torch.testing.assert_close(module(X), expected)
    assert isinstance(module, InList)
    assert module.held[0][0] is module.a.weight


@pytest.mark.parametrize("kind", ALIASED)
def test_weights_are_bound_again_after_a_module_was_put_back(kind):
    """Two losses that share a functional, and phases that go back to where another one ended."""
    plain, found = eg.nn.Functional(made(Tied)), eg.nn.Functional(made(kind))
    params = away(plain.params())
    found({n: p + 1 for n, p in params.items()}, X)
    for estimator in (eg.Contrastive(nudge="force"), eg.ExactSolve(), eg.GMRES()):
        one, other = (gradient(f, params, estimator) for f in (plain, found))
        torch.testing.assert_close(one.grads, other.grads, rtol=1e-9, atol=1e-12)


def test_a_modules_own_weights_may_be_constants():
    """A proximal centre, and a teacher with the same names, both of which require a gradient."""
    net, teacher = made(Tied), made(Tied)
    centre = dict(net.named_parameters())

    def f(p, x):
        pull = sum((p[n] - centre[n]).square().sum() for n in p)
        return functional_call(net, p, (x,)) + 0.1 * teacher(x) + 0.01 * pull

    result = gradient(f, away({n: p.detach() for n, p in centre.items()}), eg.Contrastive())
    assert "own" not in result.status


def test_reentrant_checkpoints_are_named():
    class Reentrant(Tied):
        def again(self, h):
            return checkpoint(self.a, h, use_reentrant=True)

    net = eg.nn.Functional(made(Reentrant))
    with pytest.raises(eg.ProblemError, match="use_reentrant=False"):
        gradient(net, net.params(), eg.Contrastive())


def test_a_penalty_on_gradients_by_torch_func_is_a_loss_like_any_other():
    """The module is called inside of a transform, where its own weights cannot be shifted."""
    net = made(Tied)

    def slopes(call, p, x):
        return call(p, x) + vmap(grad(lambda one: call(p, one[None]).sum()))(x).square().mean()

    params = away({n: p.detach() for n, p in net.named_parameters()})
    found = [
        gradient(lambda p, x, call=call: slopes(call, p, x), params, eg.Contrastive())
        for call in (lambda p, x: functional_call(net, p, (x,)), eg.nn.Functional(net))
    ]
    torch.testing.assert_close(found[0].grads, found[1].grads, rtol=1e-9, atol=1e-12)
