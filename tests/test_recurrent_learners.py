"""Learners driven by an input that changes in time: nn.LSTM, nn.GRU and nn.RNN, as they are."""

import pytest
import torch
from torch import nn

import equigrad as eg
from test_docs import run_examples

SOLVER = eg.LBFGS(tol=1e-9)
RULE = eg.Contrastive(beta=3e-4, scheme="symmetric")


class Once(torch.autograd.Function):
    """The identity, with a derivative that has none: what cuDNN's recurrent kernels are like."""

    backwards = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore
        Once.backwards += 1
        return NeverAgain.apply(gradient)


class NeverAgain(torch.autograd.Function):
    """The identity; to differentiate it is an error."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):  # pyright: ignore
        raise RuntimeError("trying to differentiate twice what has one derivative")


class Recurrent(nn.Module):
    """A sequence for a sequence."""

    def __init__(self, kind):
        super().__init__()
        self.core = kind(2, 2, batch_first=True)
        self.readout = nn.Linear(2, 1)

    def forward(self, x):
        return self.readout(Once.apply(self.core(x)[0]))


def problem_of(kind, device="cpu", dtype=torch.float64):
    """θ: a strength and a centre for every weight, and a gain of the input at every instant."""
    torch.manual_seed(4)
    model = Recurrent(kind).to(dtype).to(device)
    x, v = torch.randn(2, 4, 3, 2, dtype=dtype).to(device).unbind()
    y, w = (x.cumsum(1)[..., :1] / 3).tanh(), (v.cumsum(1)[..., :1] / 3).tanh()
    synapse = eg.nn.ComplexSynapse(model, strength=0.05, learn=("strength", "center"))
    problem = eg.Bilevel(
        lambda p, m: (synapse(p, m["gain"] * x) - y).square().mean(),
        lambda p, m: (synapse(p, m["gain"] * v) - w).square().mean(),
        regularizer=synapse,
    )
    gain = torch.linspace(0.5, 1.5, 3, dtype=dtype, device=device)[:, None]
    return problem, synapse.params(), synapse.meta_params() | {"gain": gain}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_contrast_is_the_gradient_of_the_resettled_outer_loss(kind):
    """The error is O(β²); β = 1e-3 leaves 4e-4 of the LSTM's, whose curvatures begin at λ."""
    problem, params, meta = problem_of(kind)
    check = eg.check_meta_gradient(
        problem, params, meta, solver=SOLVER, estimator=RULE, directions=1, rtol=1e-4
    )
    assert check.passed, str(check)
    # all it could compare with is the re-settled loss: there is no second derivative
    assert "central differences" in check.reference
    assert "exact solve" not in check.reference
    assert check.result.grads["gain"].abs().min() > 0


def test_memory_and_gradients_are_those_of_single_backward_passes():
    """Each gradient that is counted is one pass back through time, and none is another's."""
    problem, params, meta = problem_of(nn.LSTM)
    solver = eg.GradientDescent(lr=0.1, max_steps=7)
    Once.backwards = 0
    result = eg.meta_gradient(problem, params, meta, solver=solver, estimator=RULE)
    look = 4  # at a problem that is seen for the first time
    assert Once.backwards == result.gradient_evaluations + look
    with pytest.raises(eg.DoubleBackwardError, match=r"Use .*Contrastive"):
        eg.meta_gradient(problem, params, meta, solver=solver, estimator=eg.Unrolled())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_cudnn_serves(kind):
    """In float32 on the GPU, against float64 on the CPU."""
    solver = eg.GradientDescent(lr=0.2, momentum=0.9, nesterov=True, max_steps=1000)
    rule = eg.Contrastive(beta=0.1, scheme="symmetric")
    problem, params, meta = problem_of(kind)
    expected = eg.meta_gradient(problem, params, meta, solver=solver, estimator=rule)
    problem, params, meta = problem_of(kind, "cuda", torch.float32)
    found = eg.meta_gradient(problem, params, meta, solver=solver, estimator=rule)
    for name, grad in expected.grads.items():
        error = (found.grads[name].cpu().double() - grad).norm() / grad.norm()
        assert error < 5e-2, name


def test_the_page_learns_to_smooth():
    """The error on new sequences falls by a quarter or so, of which a chance start takes none."""
    (scope,) = run_examples("recurrent-learners.md")
    assert scope["errors"][-1] < 0.8 * scope["errors"][0]
