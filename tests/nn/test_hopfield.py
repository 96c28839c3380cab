"""Layered Hopfield networks: what they settle to, what they learn by, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.evaluation import Evaluation
from equigrad.nn.hebbian import coactivity
from equigrad.nn.hopfield import cross_entropy
from equigrad.problems import Primitive
from helpers import along, directional_derivative, random_direction

SOLVER = eg.Anderson(tol=1e-12, max_steps=2000)


def linear(sizes=(6, 9, 7, 3), scale=1.0, **options):
    torch.manual_seed(1)
    net = eg.nn.Hopfield.fully_connected(sizes, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p *= scale
    return net, torch.randn(5, sizes[0]).double(), torch.arange(5) % 3


def convolutional(*, pooling, **options):
    torch.manual_seed(2)
    first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), pooling)
    second = nn.Sequential(nn.Conv2d(4, 3, 3), pooling)
    net = eg.nn.Hopfield(
        [first, second, nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 3))], **options
    )
    return net.double(), torch.randn(4, 2, 13, 13).double(), torch.arange(4) % 3


NETWORKS = {
    "hard sigmoid": lambda: linear(),
    "hard sigmoid that saturates": lambda: linear(scale=1.3),
    "hard sigmoid, cross-entropy": lambda: linear(readout="cross-entropy"),
    "hard sigmoid, output too": lambda: linear(output="hard sigmoid"),
    "tanh": lambda: linear(activation="tanh"),
    "tanh, cross-entropy": lambda: linear(activation="tanh", readout="cross-entropy"),
    "sigmoid": lambda: linear(activation="sigmoid"),
    "convolutions, largest of a pool": lambda: convolutional(pooling=nn.MaxPool2d(2)),
    "convolutions, mean of a pool": lambda: convolutional(
        pooling=nn.AvgPool2d(2), activation="tanh", readout="cross-entropy"
    ),
}


def theta(net):
    return dict(net.named_parameters())


def gradient(net, x, y, estimator, solver: eg.Solver = SOLVER):
    return eg.meta_gradient(
        net.problem(x, y), net.start(x), theta(net), solver=solver, estimator=estimator
    )


def test_neurons_settle_to_what_their_two_sides_say():
    net, x, y = linear((6, 9, 3))
    settled = gradient(net, x, y, eg.Contrastive()).params
    first, last = net.connections
    assert isinstance(last, nn.Linear)
    hidden = (first(x) + settled["layer2"] @ last.weight).clamp(0, 1)
    torch.testing.assert_close(settled["layer1"], hidden, rtol=0, atol=1e-11)
    torch.testing.assert_close(settled["layer2"], last(hidden), rtol=0, atol=1e-11)
    assert (hidden == 0).any()
    assert ((hidden > 0) & (hidden < 1)).any()


def test_a_network_starts_where_signals_first_arrive():
    net, x, _ = linear(activation="tanh", readout="cross-entropy")
    start = net.start(x)
    assert list(start) == ["layer1", "layer2"]
    forward = net.connections[1](net.connections[0](x).tanh()).tanh()
    torch.testing.assert_close(start["layer2"], forward)
    assert not any(s.requires_grad for s in start.values())


def test_logits():
    net, x, _ = linear(readout="cross-entropy")
    states = net.start(x)
    torch.testing.assert_close(net.logits(states, theta(net)), net.connections[2](states["layer2"]))
    doubled = {name: 2 * p for name, p in theta(net).items()}
    torch.testing.assert_close(net.logits(states, doubled), 2 * net.logits(states, theta(net)))
    net, x, _ = linear()
    states = net.start(x)
    assert net.logits(states, theta(net)) is states["layer3"]


def test_the_cheap_form_of_the_primitive_function_has_its_slope():
    net, x, y = convolutional(pooling=nn.MaxPool2d(2))
    phi = net.problem(x, y).primitive
    assert isinstance(phi, Primitive)
    states = {name: torch.rand_like(s).requires_grad_() for name, s in net.start(x).items()}
    constants = {name: p.detach() for name, p in theta(net).items()}
    one = torch.autograd.grad(phi(states, constants), list(states.values()))
    other = torch.autograd.grad(phi.at(constants)(states), list(states.values()))
    torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_what_the_input_does_is_computed_once_for_all_phases_of_the_same_weights():
    net, x, y = linear()
    problem, states = net.problem(x, y), net.start(x)
    assert isinstance(problem.primitive, Primitive)
    constants = {name: p.detach().clone() for name, p in theta(net).items()}
    before = problem.velocity_at(constants, 0.0)(grown(states), 0)[0]
    drive = net.call(constants, 0, x)
    with torch.no_grad():
        constants["connections.0.bias"] += 0.1  # in place, as an optimiser steps
        after = problem.velocity_at(constants, 0.0)(grown(states), 0)[0]
    moved = (drive + 0.1 + states["layer2"] @ constants["connections.1.weight"]).clamp(0, 1)
    torch.testing.assert_close(after[0], moved - states["layer1"])
    assert not torch.equal(before[0], after[0])
    seen = []
    call = net.call

    def counting(meta_params, connection, activity):
        seen.append(connection)
        return call(meta_params, connection, activity)

    net.call = counting
    estimator = eg.Contrastive(nudge="loss", nudged_solver=eg.Picard(max_steps=3), error=False)
    gradient(net, x, y, estimator, eg.Picard(max_steps=4))
    assert seen.count(0) == 1 + 2  # once to settle, and for ∂Φ/∂θ of two phases


def grown(states):
    return {name: s.clone().requires_grad_() for name, s in states.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_against_differences_of_the_settled_loss(name):
    net, x, y = NETWORKS[name]()
    result = gradient(net, x, y, eg.Contrastive(beta=1e-4, scheme="symmetric", nudge="loss"))
    if name.startswith("hard sigmoid that"):
        hidden = torch.cat([result.params["layer1"], result.params["layer2"]], dim=1)
        assert all((hidden == bound).double().mean() > 0.1 for bound in (0, 1))
    direction = random_direction(theta(net))
    reference = directional_derivative(
        net.problem(x, y), result.params, theta(net), SOLVER, direction, step=1e-5
    )
    assert along(result.grads, direction) == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_local_rule_and_autograd_agree(name):
    net, x, y = NETWORKS[name]()
    estimator = eg.Contrastive(beta=0.1, scheme="symmetric", nudge="loss", error=False)
    result = gradient(net, x, y, estimator)
    with Evaluation(net.problem(x, y), net.start(x), theta(net)) as evaluation:
        free = evaluation.settle(SOLVER)

        def phase(node, steps=None):
            return evaluation.settle_nudged(
                free, SOLVER, node * estimator.beta, keep_momentum=True, steps=steps
            )

        longest = max(phase(node).phase.steps for node in estimator.nodes)
        states = [phase(node, longest).params for node in estimator.nodes]
    local = net.hebbian(x, states, [w.real / estimator.beta for w in estimator.weights])
    assert list(local) == net.reaches["inner"]
    for parameter, update in local.items():
        torch.testing.assert_close(update, result.grads[parameter], rtol=1e-10, atol=1e-10)


def test_outer_products_of_a_fully_connected_layer():
    before, after = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    products = coactivity(nn.Linear(3, 2).double(), before, after)
    by_hand = sum(torch.outer(a, b) for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(products["weight"], by_hand)
    torch.testing.assert_close(products["bias"], after.sum(0))


@pytest.mark.parametrize(
    "connection",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        nn.Sequential(nn.Conv2d(2, 3, (3, 2), dilation=2), nn.AvgPool2d((2, 3))),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten()),
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)),
    ],
)
def test_products_through_kernels_and_pools_are_the_derivative_of_their_energy(connection):
    connection = connection.double()
    before = torch.randn(4, 2, 9, 9).double()
    image = connection(before)
    after = torch.randn_like(image)
    (image * after).sum().backward()
    products = coactivity(connection, before, after)
    assert products.keys() == dict(connection.named_parameters()).keys()
    for name, p in connection.named_parameters():
        torch.testing.assert_close(products[name], p.grad, rtol=1e-12, atol=1e-12)


class Exponential(nn.Linear):
    """What it computes is not what a linear layer does."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.exp(), self.bias)


@pytest.mark.parametrize(
    "connection",
    [
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.Softplus()),
        nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(2, stride=1)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(2, divisor_override=1)),
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.AvgPool2d(3, ceil_mode=True)),
        nn.Sequential(Exponential(4, 2)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
    ],
)
def test_connections_without_a_product(connection):
    with pytest.raises(eg.ConfigurationError, match="Hebbian product"):
        coactivity(connection, torch.randn(1, 2, 4, 4), torch.zeros(1))


def test_two_roots_of_one_are_the_symmetric_scheme():
    net, x, y = linear(activation="tanh", readout="cross-entropy")
    symmetric = gradient(net, x, y, eg.Contrastive(beta=0.2, scheme="symmetric", nudge="loss"))
    holomorphic = gradient(net, x, y, eg.Contrastive(beta=0.2, scheme="holomorphic", nudge="loss"))
    for name, grad in symmetric.grads.items():
        torch.testing.assert_close(holomorphic.grads[name], grad, rtol=1e-9, atol=1e-11)


def test_a_random_sign_is_the_symmetric_scheme_on_average():
    net, x, y = linear(activation="tanh", readout="cross-entropy")
    first = {}
    for beta in (0.2, -0.2):
        first[beta] = gradient(
            net, x, y, eg.Contrastive(beta=beta, scheme="forward", nudge="loss")
        ).grads
    symmetric = gradient(
        net, x, y, eg.Contrastive(beta=0.2, scheme="symmetric", nudge="loss")
    ).grads
    for name, grad in symmetric.items():
        mean = (first[0.2][name] + first[-0.2][name]) / 2
        torch.testing.assert_close(mean, grad, rtol=1e-9, atol=1e-9)
    signs = []
    for seed in range(12):
        torch.manual_seed(seed)
        drawn = gradient(
            net, x, y, eg.Contrastive(beta=0.2, sign="random", scheme="forward", nudge="loss")
        )
        (beta,) = {phase.beta.real for phase in drawn.phases} - {0.0}
        signs.append(beta)
        torch.testing.assert_close(drawn.grads, first[beta], rtol=1e-9, atol=1e-9)
    assert 2 <= signs.count(0.2) <= 10  # a fair coin misses this once in 157


def error(net, x, y, exact, estimator):
    grads = gradient(net, x, y, estimator).grads
    apart = torch.stack([(grads[n] - g).norm() for n, g in exact.items()]).norm()
    return (apart / torch.stack([g.norm() for g in exact.values()]).norm()).item()


@pytest.mark.parametrize("readout", ["squared error", "cross-entropy"])
@pytest.mark.parametrize(
    ("scheme", "points", "order"),
    [
        ("forward", 2, 1),
        ("forward", 3, 2),
        ("forward", 4, 3),
        ("symmetric", 2, 2),
        ("symmetric", 4, 4),
        ("holomorphic", 2, 2),
        ("holomorphic", 3, 3),
        ("holomorphic", 4, 4),
        ("holomorphic", 6, 6),
    ],
)
def test_order_of_the_error_in_beta(scheme, points, order, readout):
    """Halving β divides the error by `2^order`, against an implicit gradient by GMRES."""
    net, x, y = linear((4, 5, 4, 3), activation="tanh", readout=readout)
    exact = gradient(net, x, y, eg.GMRES(tol=1e-13)).grads
    beta = {1: 2e-3, 2: 5e-3, 3: 5e-3, 4: 3e-2, 6: 0.1}[order]
    large, small = (
        error(net, x, y, exact, eg.Contrastive(beta=b, scheme=scheme, points=points, nudge="loss"))
        for b in (beta, beta / 2)
    )
    assert small > 1e-11  # above what rounding leaves
    assert large / small == pytest.approx(2**order, rel=0.15)


def test_a_hard_sigmoid_is_not_holomorphic():
    net, x, y = linear()
    with pytest.raises(
        eg.ConfigurationError,
        match=r"evaluates activation .*not holomorphic; scheme='symmetric'.*any activation.*tanh",
    ):
        gradient(net, x, y, eg.Contrastive(scheme="holomorphic", points=4))


def test_the_largest_of_a_pool_is_not_holomorphic():
    net, x, y = convolutional(pooling=nn.MaxPool2d(2), activation="tanh")
    with pytest.raises(eg.ConfigurationError, match=r"evaluates primitive .*scheme='symmetric'"):
        gradient(net, x, y, eg.Contrastive(scheme="holomorphic", points=4), eg.Picard(max_steps=2))


def test_complex_cross_entropy_continues_the_real_one():
    """Same values and slopes on the real axis, and a derivative that obeys Cauchy and Riemann."""
    logits = (30 * torch.randn(4, 3)).double().requires_grad_()
    y = torch.tensor([0, 2, 1, 1])
    z = logits.detach().to(torch.complex128).requires_grad_()
    one, other = cross_entropy(logits, y), cross_entropy(z, y)
    torch.testing.assert_close(other.real, one)
    (slope,) = torch.autograd.grad(one, logits)
    (continued,) = torch.autograd.grad(other.real, z)  # of a holomorphic function, all of it
    torch.testing.assert_close(continued.real, slope)
    direction, h = torch.randn(4, 3).double(), 1e-20
    moved = cross_entropy(z.detach() + 1j * h * direction, y)  # a complex step does not cancel
    assert moved.imag.item() / h == pytest.approx((slope * direction).sum().item(), rel=1e-12)


def test_targets_may_be_given_in_the_shape_of_the_output():
    net, x, y = linear()
    estimator = eg.Contrastive(scheme="symmetric", nudge="loss")
    one = gradient(net, x, y, estimator)
    other = gradient(net, x, nn.functional.one_hot(y, 3).double(), estimator)
    torch.testing.assert_close(one.grads, other.grads)


def test_a_network_that_has_been_used_can_be_copied_pickled_and_cast():
    net, x, y = linear(activation="tanh", readout="cross-entropy")
    unrolled = eg.Unrolled()  # leaves tensors with a graph in the functional
    result = gradient(net, x, y, unrolled, eg.Picard(max_steps=3))
    other = copy.deepcopy(net)
    again = gradient(other, x, y, unrolled, eg.Picard(max_steps=3))
    torch.testing.assert_close(again.grads, result.grads)
    net.activations = {}  # functions without a name do not pickle
    assert pickle.loads(pickle.dumps(net)).readout == "cross-entropy"
    single = gradient(other.float(), x.float(), y, eg.Contrastive(), eg.Picard(max_steps=3))
    assert single.grads["connections.0.weight"].dtype == torch.float32


def test_frozen_parameters_are_followed():
    net, x, y = linear()
    estimator = eg.Contrastive(scheme="symmetric", nudge="loss")
    expected = gradient(net, x, y, estimator).grads
    frozen, _, _ = linear()
    frozen.requires_grad_(False)
    torch.testing.assert_close(gradient(frozen, x, y, estimator).grads, expected)


@pytest.mark.parametrize(
    ("beta", "damping", "noted"), [(1.2, 1.0, True), (1.2, 0.5, False), (0.2, 1.0, False)]
)
def test_a_nudge_that_an_undamped_iteration_cannot_settle_is_noted(beta, damping, noted):
    """Linear outputs follow `s ← a - β (s - y)`, which grows by β a step."""
    net, x, y = linear((4, 8, 3))
    estimator = eg.Contrastive(
        beta=beta,
        nudged_solver=eg.Picard(max_steps=20, damping=damping),
        scheme="forward",
        nudge="loss",
    )
    result = gradient(net, x, y, estimator, eg.Picard(max_steps=20))
    gone = result.phases[-1]
    assert (gone.residual > 2 * gone.start_residual) is noted
    assert (
        "moved away from its equilibrium, so the contrast with it is not a gradient"
        in result.status
    ) is noted


def tied():
    torch.manual_seed(1)
    shared = nn.Linear(4, 4)
    net = eg.nn.Hopfield(
        [nn.Linear(4, 4), shared, shared], activation="tanh", readout="cross-entropy"
    )
    return net.double(), torch.randn(5, 4).double(), torch.arange(5) % 4


@pytest.mark.parametrize("estimator", [eg.Adjoint(), eg.Contrastive(beta=1e-3, scheme="symmetric")])
def test_a_readout_that_is_a_connection_too_has_both_terms(estimator):
    """The loss and the energy both see it: against a difference of the settled loss."""
    net, x, y = tied()
    result = gradient(net, x, y, estimator)
    direction = random_direction(theta(net))
    exact = directional_derivative(
        net.problem(x, y), net.start(x), theta(net), SOLVER, direction, 1e-5
    )
    assert along(result.grads, direction) == pytest.approx(exact, rel=1e-5)


def test_a_network_that_has_been_used_follows_its_training_flag():
    """Dropout at rate 1/2 doubles what it lets through, and lets all through once it sleeps."""
    torch.manual_seed(0)
    net = eg.nn.Hopfield([nn.Linear(4, 8), nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))])
    net, x, y = net.double(), torch.randn(5, 4).double(), torch.arange(5) % 3
    dropped = gradient(net, x, y, eg.Contrastive()).params
    net.eval()
    awake = gradient(net, x, y, eg.Contrastive()).params
    plain = eg.nn.Hopfield([net.connections[0], net.connections[1][1]])  # pyright: ignore
    expected = gradient(plain, x, y, eg.Contrastive()).params
    torch.testing.assert_close(awake, expected, rtol=0, atol=1e-10)
    assert (dropped["layer2"] - awake["layer2"]).abs().max() > 1e-2


def test_dropout_on_the_input_is_the_same_in_both_forms_of_the_primitive_function():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 8)), nn.Sequential(nn.Dropout(0.5))]
    net = eg.nn.Hopfield([*parts, nn.Linear(8, 3)]).double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    result = gradient(net, x, y, eg.Contrastive(beta=1e-4, scheme="symmetric"))
    torch.manual_seed(7)
    exact = gradient(net, x, y, eg.Adjoint())
    torch.manual_seed(7)
    found = gradient(net, x, y, eg.Contrastive(beta=1e-4, scheme="symmetric"))
    assert result.phases[0].outcome == "converged"
    torch.testing.assert_close(found.grads, exact.grads, rtol=1e-4, atol=1e-6)


def test_a_connection_can_be_replaced_after_use():
    net, x, y = linear()
    gradient(net, x, y, eg.Contrastive())
    net.connections[2] = nn.Linear(7, 2).double()
    result = gradient(net, x, y % 2, eg.Contrastive())
    assert result.params["layer3"].shape == (5, 2)


def test_what_a_network_cannot_read():
    net, x, y = linear()
    for given, message in [
        (x[:, :4], r"cannot process x of torch.float64 with shape \(5, 4\) \(samples first\)"),
        (x.float(), "weights of torch.float64, cannot process x of torch.float32"),
        (x * float("nan"), "x holds NaN or infinite values"),
    ]:
        with pytest.raises(eg.ProblemError, match=message):
            gradient(net, given, y, eg.Contrastive())


@pytest.mark.parametrize("readout", ["squared error", "cross-entropy"])
def test_labels_that_are_none(readout):
    net, x, y = linear(readout=readout)
    for given, message in [
        (y.float(), r"from 0 to 2; got torch.float32 of shape \(5,\)"),
        (y + 2, "from 0 to 2; got torch.int64 .* from 2 to 4"),
        (y[:3], r"targets must be a class for each of the 5 samples.*of shape \(3,\)"),
    ]:
        with pytest.raises(eg.ProblemError, match=message):
            gradient(net, x, given, eg.Contrastive())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eg.nn.Hopfield([]), "at least 1 connections, got 0"),
        (
            lambda: eg.nn.Hopfield([nn.Linear(2, 2)], readout="cross-entropy"),
            "at least 2 connections, got 1, which leaves no neurons",
        ),
        (
            lambda: eg.nn.Hopfield([nn.Linear(2, 2), None]),  # pyright: ignore
            "connection 1 must be a torch.nn.Module",
        ),
        (
            lambda: eg.nn.Hopfield([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]),
            "connection 0 has buffers",
        ),
        (
            lambda: eg.nn.Hopfield.fully_connected([4, 3], activation="relu"),
            "activation must be one of 'hard sigmoid', .*or a function, got 'relu'",
        ),
        (lambda: eg.nn.Hopfield.fully_connected([4, 3], output=2), "output must be one of"),
        (
            lambda: eg.nn.Hopfield.fully_connected([4, 3], readout="hinge"),
            "readout must be 'squared error' or 'cross-entropy', got 'hinge'",
        ),
        (
            lambda: eg.nn.Hopfield.fully_connected([4]),
            r"sizes must have at least two entries, got \[4\]",
        ),
        (lambda: eg.nn.Hopfield.fully_connected([4, 0]), "each a whole number of at least 1"),
    ],
)
def test_networks_that_cannot_work(make, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        make()
