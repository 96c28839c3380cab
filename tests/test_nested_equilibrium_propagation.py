"""Equilibrium propagation within the contrastive rule: the page's network, against autograd."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import equigrad as eg
from helpers import along, directional_derivative, random_direction

PAGE = Path(__file__).parent.parent / "docs" / "nested-equilibrium-propagation.md"
NETWORK, LEARNING = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SCOPE = {}
exec(compile(NETWORK, str(PAGE), "exec"), SCOPE)

LEARNER = eg.GradientDescent(lr=0.2, momentum=0.5, max_steps=6)
RULE = eg.Contrastive(beta=0.1, scheme="symmetric")

LAYERS = {"WiringBackward", "_EquilibriumBackward"}
"""Nodes that hold connections; a path through two of them would be backpropagation."""


def network(**options):
    torch.manual_seed(1)
    return SCOPE["Network"](3, 4, 2, tol=1e-10, **options).double()


def data():
    torch.manual_seed(2)
    x, v = torch.randn(2, 6, 3, dtype=torch.float64).unbind()
    y, w = torch.tanh(torch.randn(2, 6, 2, dtype=torch.float64)).unbind()
    return x, y, v, w


def learning(strength=0.1, **options):
    """A strength for every weight; the network's gradients are had as the options say."""
    x, y, v, w = data()
    synapse = eg.nn.ComplexSynapse(network(**options), strength=strength)
    problem = eg.Bilevel(
        lambda p, m: 0.5 * (synapse(p, x) - y).square().mean(),
        lambda p, m: 0.5 * (synapse(p, v) - w).square().mean(),
        regularizer=synapse,
    )
    return problem, synapse.params(), synapse.meta_params()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def unrolled_gradient():
    """`∂L/∂φ` by autograd through four hundred passes over the cell's layers."""
    x, y, *_ = data()
    net = network()
    cell, state = net.layer.cell, net.layer.cell.start(x)
    for _ in range(400):
        state = cell(state, x)
    loss = 0.5 * (state[:, cell.hidden :] - y).square().mean()
    return flat(torch.autograd.grad(loss, list(net.parameters()))), loss


def propagated_gradient(beta):
    x, y, *_ = data()
    net = network(beta=beta)
    loss = 0.5 * (net(x) - y).square().mean()
    return flat(torch.autograd.grad(loss, list(net.parameters())))


def meta_gradient(learner=LEARNER, rule=RULE, **options):
    problem, params, meta = learning(**options)
    found = eg.meta_gradient(problem, params, meta, solver=learner, estimator=rule)
    return flat(found.grads.values())


def test_the_inner_gradient_is_that_of_autograd_up_to_beta_squared():
    exact, _ = unrolled_gradient()
    errors = [relative_error(propagated_gradient(beta), exact) for beta in (0.2, 0.1, 0.05)]
    assert errors[-1] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_the_meta_gradient_inherits_an_error_of_beta_squared():
    """A bias of the learner's gradients that is the same in all phases is not divided by β."""
    exact = meta_gradient(estimator=eg.Adjoint(solver=eg.Picard(tol=1e-10)))
    found = [meta_gradient(beta=beta) for beta in (0.2, 0.1)]
    errors = [relative_error(f, exact) for f in found]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] < 2e-2
    assert torch.cosine_similarity(found[1], exact, dim=0) > 0.9999


def test_both_levels_settled_give_the_derivative_of_the_resettled_outer_loss():
    """Neurons to 1e-10, weights to 1e-8; βs of 0.02 and 0.05, and neither has an error at O(β)."""
    learner = eg.GradientDescent(lr=0.3, momentum=0.7, tol=1e-8, max_steps=2000)
    rule = eg.Contrastive(beta=0.05, scheme="symmetric")
    problem, params, meta = learning(strength=0.3, beta=0.02)
    found = eg.meta_gradient(problem, params, meta, solver=learner, estimator=rule)
    assert found.phases[0].outcome == "converged"
    problem, params, meta = learning(strength=0.3, estimator=eg.Adjoint())
    direction = random_direction(meta)
    settled = found.params
    reference = directional_derivative(problem, settled, meta, eg.LBFGS(tol=1e-9), direction, 1e-3)
    assert along(found.grads, direction) == pytest.approx(reference, rel=1e-2)


def layers_in_a_row(output):
    """The largest number of nodes with connections on a path of a graph; all names of its nodes."""
    depths, ahead = {None: 0}, [output.grad_fn]
    while ahead:
        node = ahead[-1]
        parents = [parent for parent, _ in node.next_functions]
        unknown = [parent for parent in parents if parent not in depths]
        ahead += unknown
        if not unknown:
            ahead.pop()
            below = max((depths[parent] for parent in parents), default=0)
            depths[node] = below + (node.name() in LAYERS)
    return depths[output.grad_fn], {node.name() for node in depths if node is not None}


def test_no_gradient_passes_from_one_layer_to_another(monkeypatch):
    """Every graph that is run backwards, of neurons, weights and strengths, is looked at."""
    seen, grad = [], torch.autograd.grad

    def watched(outputs, *args, **kwargs):
        for output in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
            seen.append(layers_in_a_row(output))
        return grad(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    meta_gradient(eg.GradientDescent(lr=0.2, max_steps=3))
    depths, names = zip(*seen, strict=True)
    assert max(depths) == 1
    assert set().union(*names) >= LAYERS
    products = [n for n in set().union(*names) if re.search("mm|mv|Linear|Dot|Matmul", n, re.I)]
    assert products == []
    monkeypatch.undo()
    _, names = layers_in_a_row(unrolled_gradient()[1])
    assert "MmBackward0" in names  # what backpropagation looks like


def test_an_estimator_with_second_derivatives_is_told_that_there_are_none():
    problem, params, meta = learning()
    with pytest.raises(
        eg.DoubleBackwardError,
        match=r"EquilibriumLayer\(Cell\) is an estimate that cannot be differentiated",
    ):
        eg.meta_gradient(
            problem, params, meta, solver=LEARNER, estimator=eg.GMRES(products="autograd")
        )


def test_the_page_learns_which_inputs_matter():
    """Two of ten: without the other eight, most of the error on new examples is gone."""
    scope = dict(SCOPE)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(LEARNING, str(PAGE), "exec"), scope)
    assert "before" in said.getvalue()
    assert scope["errors"][-1] < scope["errors"][0] / 5
