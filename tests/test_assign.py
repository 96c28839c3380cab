"""Where a meta-gradient lands: in the `.grad` of what an optimiser moves, or refused."""

import pytest
import torch

import equigrad as eg

SOLVER = eg.GradientDescent(lr=0.3, tol=1e-10, max_steps=2000)


def gradient(meta, inner_pull=lambda m: m["a"], start=None):
    """Of ½(w* - 2)² for w* = 1 / (1 + a), by components."""
    problem = eg.Bilevel(
        lambda p, m: 0.5 * ((p["w"] - 1).square() + inner_pull(m) * p["w"].square()).sum(),
        lambda p, m: 0.5 * (p["w"] - 2).square().sum(),
    )
    start = {"w": torch.zeros(2, dtype=torch.float64)} if start is None else start
    return eg.meta_gradient(problem, start, meta, solver=SOLVER, estimator=eg.ExactSolve())


def leaf(value=0.5):
    return torch.full((2,), value, dtype=torch.float64, requires_grad=True)


def exact(a):
    return (1 / (1 + a) - 2) * -1 / (1 + a).square()


@pytest.mark.parametrize(
    "compute",
    [torch.exp, torch.Tensor.double, lambda t: t[:1].expand(2), lambda t: t.view(2)],
    ids=["function", "cast", "slice", "view"],
)
def test_what_is_computed_is_refused_by_name_and_the_advice_reaches_the_leaf(compute):
    raw = leaf().detach().float().requires_grad_()
    other = leaf()
    meta = {"b": other, "a": compute(raw).double()}
    result = gradient(meta, lambda m: m["a"] + m["b"])
    with pytest.raises(eg.ProblemError, match=r"'a' is computed.*torch\.autograd\.backward"):
        result.assign()
    assert other.grad is None
    torch.autograd.backward([meta[n] for n in result.grads], list(result.grads.values()))
    again = raw.detach().clone().requires_grad_()
    a = compute(again).double()
    w = 1 / (1 + a + other.detach())
    (0.5 * (w - 2).square().sum()).backward()
    torch.testing.assert_close(raw.grad, again.grad)


def test_what_retains_its_gradient_gets_it():
    meta = {"a": leaf() * 1}
    meta["a"].retain_grad()
    gradient(meta).assign()
    torch.testing.assert_close(meta["a"].grad, exact(meta["a"].detach()))


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_one_tensor_under_many_names_gets_the_sum(names):
    shared, alone = leaf(0.2), leaf(0.1)
    result = gradient(
        {"z": alone, **dict.fromkeys(names, shared)},
        lambda m: torch.stack([(i + 1) * m[n] for i, n in enumerate(names)]).sum(0) + m["z"],
    )
    for _ in range(2):  # a second call writes, and does not add
        result.assign()
    weight = sum(range(1, len(names) + 1))
    slope = exact(weight * 0.2 + alone.detach())
    torch.testing.assert_close(shared.grad, weight * slope)
    torch.testing.assert_close(alone.grad, slope)
    torch.testing.assert_close(result.grads["a"], slope)  # the parts are as they were


def test_an_optimiser_descends_with_a_tied_parameter():
    shared = leaf(1.0)
    meta = {"a": shared, "b": shared}
    optimiser = torch.optim.SGD([shared], lr=0.1)
    gradient(meta, lambda m: m["a"] * m["b"]).assign()
    optimiser.step()
    torch.testing.assert_close(shared.detach(), 1 - 0.1 * 2 * exact(torch.ones_like(shared)))


def test_equal_tensors_are_not_one():
    meta = {"a": leaf(0.2), "b": leaf(0.2)}
    gradient(meta, lambda m: m["a"] + 3 * m["b"]).assign()
    first, second = meta["a"].grad, meta["b"].grad
    assert first is not None
    torch.testing.assert_close(second, 3 * first)


def test_a_leaf_that_requires_no_gradient_gets_one():
    meta = {"a": leaf().detach()}
    gradient(meta).assign()
    torch.testing.assert_close(meta["a"].grad, exact(meta["a"]))
