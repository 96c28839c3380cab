# pyright: basic, reportIncompatibleMethodOverride=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
"""An equilibrium layer: its gradients, its manners inside other modules, and what it refuses."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.errors import SettlingWarning

TIGHT = eg.Anderson(tol=1e-12, max_steps=500)


class Cell(nn.Module):
    """`tanh(W h + U x)`, W of spectral norm 0.7 and far from symmetric."""

    def __init__(self, units=4, inputs=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.recurrent = nn.Linear(units, units).double()
        self.encode = nn.Linear(inputs, units, bias=False).double()
        with torch.no_grad():
            weight = self.recurrent.weight
            weight.mul_(0.7 / torch.linalg.matrix_norm(weight, 2))

    def start(self, x):
        return x.new_zeros(len(x), self.recurrent.out_features)

    def forward(self, h, x):
        return torch.tanh(self.recurrent(h) + self.encode(x))


class SymmetricCell(Cell):
    """The same with `½ (W + Wᵀ)`: the gradient of `Φ = ½ hᵀWh + hᵀ(b + Ux)`."""

    activation = staticmethod(torch.tanh)

    def primitive(self, h, x):
        drive = self.recurrent.bias + self.encode(x)
        return 0.5 * (h * (h @ self.recurrent.weight.T)).sum() + (h * drive).sum()


class Shift(nn.Module):
    """`h ↦ a h + x`."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, h, x):
        return self.a * h + x


def data(seed=1, samples=5):
    torch.manual_seed(seed)
    return torch.randn(samples, 3).double(), torch.randn(samples, 4).double()


def gradients(layer, x, target, start=None):
    """Of a loss by x and the weights."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    (layer(x, start=start) - target).square().sum().backward()
    return {"x": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}}


def differences(layer, x, target, step=1e-5):
    """The same along random directions, by central differences: directions, slopes."""
    tensors = {"x": x.clone(), **{n: p.data for n, p in layer.named_parameters()}}
    generator, found = torch.Generator().manual_seed(3), []
    for _ in range(4):
        direction = {
            n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in tensors.items()
        }
        values = []
        for amount in (1, -2, 1):
            for n, t in tensors.items():
                t.add_(direction[n], alpha=amount * step)
            with torch.no_grad():
                values.append((layer(tensors["x"]) - target).square().sum().item())
        found.append((direction, (values[0] - values[1]) / (2 * step)))
    return found


def error_along(found, differences):
    exact = torch.tensor([slope for _, slope in differences])
    along = torch.tensor(
        [
            sum((found[n] * d).sum().item() for n, d in direction.items())
            for direction, _ in differences
        ]
    )
    return ((along - exact).norm() / exact.norm()).item()


def error(found, exact):
    flat = [torch.cat([g[n].flatten() for n in sorted(exact)]) for g in (found, exact)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


EXACT = {
    "adjoint by Anderson": eg.Adjoint(solver=eg.Anderson(tol=1e-10, max_steps=200)),
    "adjoint by Broyden": eg.Adjoint(solver=eg.Broyden(tol=1e-10, max_steps=200)),
    "adjoint by Picard": eg.Adjoint(solver=eg.Picard(tol=1e-10, max_steps=500)),
    "GMRES": eg.GMRES(tol=1e-10),
    "exact solve": eg.ExactSolve(),
    "Neumann until it has converged": eg.NeumannSeries(terms=200),
    "phantom until it has converged": eg.PhantomGradient(steps=200, damping=1.0),
}


# Gradients


@pytest.mark.parametrize("cell", [Cell, SymmetricCell])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", EXACT)
def test_exact_gradients_agree_with_finite_differences(name, seed, cell):
    layer = eg.nn.EquilibriumLayer(cell(seed=seed), solver=TIGHT, estimator=EXACT[name])
    assert error_along(gradients(layer, *data()), differences(layer, *data())) < 1e-5


@pytest.mark.parametrize(
    ("estimator", "bound"),
    [
        (eg.Contrastive(beta=1e-3, scheme="symmetric", points=4), 1e-5),
        (eg.Contrastive(beta=0.1, scheme="symmetric", points=2), 1e-2),
        (eg.Contrastive(rtol=1e-4), 1e-4),
    ],
)
def test_contrast_agrees_with_finite_differences_on_symmetric_cells(estimator, bound):
    solver = eg.Picard(tol=1e-13, max_steps=500)
    layer = eg.nn.EquilibriumLayer(SymmetricCell(), solver=solver, estimator=estimator)
    assert error_along(gradients(layer, *data()), differences(layer, *data())) < bound


def by_hand(cell, x, target, respond):
    """`(∂f/∂θ)ᵀ respond(J, g)` of every sample, with J by hand: D W for tanh."""
    layer = eg.nn.EquilibriumLayer(cell, solver=TIGHT)
    h = layer(x).detach()
    gain = 1 - h.square()
    pressure = 2 * (h - target)
    jacobian = gain[:, :, None] * cell.recurrent.weight.detach()  # ∂f_i/∂h_j
    x = x.clone().requires_grad_()
    response = torch.stack([respond(j, g) for j, g in zip(jacobian, pressure, strict=True)])
    names, weights = zip(*cell.named_parameters(), strict=True)
    grads = torch.autograd.grad(cell(h, x), [x, *weights], response)
    return dict(zip(["x", *(f"cell.{n}" for n in names)], grads, strict=True))


def neumann(terms, alpha=1.0):
    def respond(jacobian, g):
        x, term = torch.zeros_like(g), g
        for _ in range(terms):
            x, term = x + alpha * term, (1 - alpha) * term + alpha * jacobian.T @ term
        return x

    return respond


@pytest.mark.parametrize(
    ("estimator", "respond"),
    [
        (eg.T1T2(), lambda jacobian, g: g),
        (eg.NeumannSeries(terms=4, tol=9), neumann(4)),
        (eg.PhantomGradient(steps=4, damping=0.6), neumann(4, 0.6)),
        (eg.PhantomGradient(steps=1, damping=1.0), lambda jacobian, g: g),
    ],
)
def test_biased_estimators_equal_their_definition(estimator, respond):
    cell, (x, target) = Cell(), data()
    layer = eg.nn.EquilibriumLayer(cell, solver=TIGHT, estimator=estimator)
    found = gradients(layer, x, target)
    assert error(found, by_hand(cell, x, target, respond)) < 1e-8
    exact = by_hand(cell, x, target, lambda j, g: torch.linalg.solve(torch.eye(4) - j.T, g))
    assert error(found, exact) > 0.01


def test_gradients_scale_with_the_loss():
    """A loss that is a million times smaller: β and tolerances are relative to its gradient."""
    solver = eg.Picard(tol=1e-12, max_steps=500)
    for estimator in (eg.Contrastive(beta=0.1), eg.GMRES(), eg.PhantomGradient()):
        layer = eg.nn.EquilibriumLayer(SymmetricCell(), solver=solver, estimator=estimator)
        x, _ = data()
        grads = []
        for scale in (1.0, 1e-6):
            layer.zero_grad()
            (scale * layer(x).sum()).backward()
            grads.append({n: p.grad / scale for n, p in layer.named_parameters()})
        assert error(*grads) < 1e-9


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_gradient_that_vanished_or_overflowed_passes_through(value):
    """What scales losses for half precision looks for what is not finite in `.grad`."""
    layer = eg.nn.EquilibriumLayer(Cell(), estimator=eg.GMRES())
    layer(data()[0]).backward(torch.full((5, 4), value).double())
    for p in layer.parameters():
        assert (p.grad == 0).all() if value == 0 else p.grad.isnan().all()


# States, inputs, starts


class Pair(nn.Module):
    """Two layers that drive each other: as one state `tanh(W [a, b] + x)`."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(Cell().recurrent.weight.detach().clone())

    def start(self, x):
        return self.form(x[:, :1], x[:, 1:])

    def forward(self, h, x):
        a, b = h.values() if isinstance(h, dict) else h
        image = torch.tanh(torch.cat([a, b], 1) @ self.weight.T + x)
        return self.form(image[:, :1], image[:, 1:])


@pytest.mark.parametrize("form", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}])
def test_states_of_several_tensors(form):
    _, x = data()
    layer = eg.nn.EquilibriumLayer(Pair(form), solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    h = layer(x)
    assert type(h) is type(form(0, 0))
    parts = list(h.values()) if isinstance(h, dict) else h
    parts[1].square().sum().backward()  # the first part is not used

    whole = Cell()
    whole.forward = lambda h, x: torch.tanh(h @ whole.recurrent.weight.T + x)
    other = eg.nn.EquilibriumLayer(whole, solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    expected = other(x)
    expected[:, 1:].square().sum().backward()
    torch.testing.assert_close(torch.cat(list(parts), 1), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        layer.cell.weight.grad, whole.recurrent.weight.grad, rtol=1e-9, atol=1e-10
    )


def test_inputs_in_containers_none_and_those_that_need_no_gradient():
    class Many(Cell):
        def start(self, parts, *others):
            return super().start(parts["x"])

        def forward(self, h, parts, nothing, pair, number):
            assert nothing is None
            x, index = pair
            assert number == 0.5
            return number * super().forward(h, parts["x"]) + 0.1 * x[index]

    layer = eg.nn.EquilibriumLayer(Many(), solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    x = data()[0].requires_grad_()
    fixed, index = torch.randn(9, 4).double(), torch.arange(5)
    h = layer({"x": x}, None, (fixed, index), 0.5)
    h.sum().backward()
    assert fixed.grad is None
    image = layer.cell(h.detach(), {"x": x.detach()}, None, (fixed, index), 0.5)
    torch.testing.assert_close(h.detach(), image, rtol=0, atol=1e-11)
    gain = 0.5 * (1 - ((image - 0.1 * fixed[:5]) / 0.5).square()).detach()
    jacobian = gain[:, :, None] * layer.cell.recurrent.weight.detach()
    one = torch.ones(4).double()
    solved = torch.stack([torch.linalg.solve(torch.eye(4) - j.T, one) for j in jacobian])
    expected = (gain * solved) @ layer.cell.encode.weight
    torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-9, atol=1e-11)


def test_a_start_saves_steps_and_changes_no_gradient():
    layer = eg.nn.EquilibriumLayer(Cell(), solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    x, target = data()
    cold = gradients(layer, x, target)
    steps, h = layer.phase.steps, layer(x)
    warm = gradients(layer, x, target, start=h)
    assert layer.phase.steps == 0 < steps
    assert error(warm, cold) < 1e-9


def test_frozen_weights_get_no_gradient():
    layer = eg.nn.EquilibriumLayer(Cell())
    layer.cell.recurrent.requires_grad_(False)
    layer(data()[0]).sum().backward()
    assert layer.cell.recurrent.weight.grad is None
    assert layer.cell.encode.weight.grad.any()


# Inside other modules


def test_a_layer_in_sequential_learns_and_its_state_is_the_cells():
    torch.manual_seed(0)
    layer = eg.nn.EquilibriumLayer(Cell())
    net = nn.Sequential(nn.Linear(3, 3).double(), layer, nn.Linear(4, 4).double())
    x, target = data()
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=0.03), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((net(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert set(layer.state_dict()) == {f"cell.{n}" for n in layer.cell.state_dict()}


def test_one_cell_in_two_layers():
    """Both contribute to the gradient: the sum of what each has alone, by the chain rule."""
    cell = Cell(inputs=4)
    first, second = (
        eg.nn.EquilibriumLayer(cell, solver=TIGHT, estimator=eg.GMRES(tol=1e-12)) for _ in "ab"
    )
    net = nn.Sequential(first, second)
    _, x = data()
    net(x).square().sum().backward()
    found = cell.recurrent.weight.grad[1, 2].item()
    values, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            cell.recurrent.weight[1, 2] += sign * step
            values.append(net(x).square().sum().item())
            cell.recurrent.weight[1, 2] -= sign * step
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_copies_pickles_and_state_dicts_of_a_used_layer():
    layer = eg.nn.EquilibriumLayer(Cell(), solver=TIGHT)
    x, _ = data()
    expected = layer(x)
    expected.sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    fresh = eg.nn.EquilibriumLayer(Cell(seed=7), solver=TIGHT)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(x), expected)


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    layer = eg.nn.EquilibriumLayer(Cell())
    x, _ = data()
    with_graph = layer.eval()(x)
    with torch.no_grad():
        h = layer(x)
    assert h.grad_fn is None
    assert torch.equal(h, with_graph)
    with torch.inference_mode():
        assert torch.equal(layer(x), with_graph)


def test_weights_that_changed_before_backward_are_noticed():
    layer = eg.nn.EquilibriumLayer(Cell())
    h = layer(data()[0])
    with torch.no_grad():
        layer.cell.recurrent.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_backward_twice_and_second_derivatives():
    layer = eg.nn.EquilibriumLayer(Cell())
    x = data()[0].requires_grad_()
    loss = layer(x).sum()
    one, two = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(one, two)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(eg.DoubleBackwardError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_what_backward_keeps_does_not_grow_with_the_steps():
    def kept(steps):
        solver = eg.Picard(max_steps=steps)
        layer = eg.nn.EquilibriumLayer(Cell(), solver=solver)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            layer(data()[0])
        return sum(sizes)

    weights = sum(p.numel() for p in Cell().parameters())
    assert kept(10) == kept(160) == weights + 5 * 3 + 5 * 4  # x and h


def test_the_cell_may_be_compiled():
    cell, (x, target) = Cell(), data()
    plain = eg.nn.EquilibriumLayer(cell, solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    expected = gradients(plain, x, target)
    compiled = torch.compile(cell, backend="aot_eager")
    layer = eg.nn.EquilibriumLayer(compiled, solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    found = {n.replace("_orig_mod.", ""): g for n, g in gradients(layer, x, target).items()}
    assert error(found, expected) < 1e-9


# Buffers, random numbers, precision


class Normalized(Cell):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, h, x):
        return torch.tanh(0.3 * self.norm(self.recurrent(h) + self.encode(x)))


def test_batch_statistics_move_once_as_if_evaluated_where_it_settled():
    layer = eg.nn.EquilibriumLayer(Normalized(), solver=TIGHT)
    x, _ = data()
    h = layer(x)
    after = copy.deepcopy(layer.cell.norm.state_dict())
    assert after["num_batches_tracked"] == 1
    drive = (layer.cell.recurrent(h) + layer.cell.encode(x)).detach()
    torch.testing.assert_close(after["running_mean"], 0.1 * drive.mean(0), rtol=0, atol=1e-11)
    h.sum().backward()
    layer.eval()(x).sum().backward()
    for name, value in layer.cell.norm.state_dict().items():
        assert torch.equal(value, after[name])


@pytest.mark.parametrize("estimator", [eg.PhantomGradient(steps=80, damping=1.0), eg.GMRES()])
def test_batch_statistics_in_the_gradient(estimator):
    """Samples act on each other through them: by differences of the layer as a whole."""
    layer = eg.nn.EquilibriumLayer(Normalized(), solver=TIGHT, estimator=estimator)
    assert error_along(gradients(layer, *data()), differences(layer, *data())) < 1e-5


def test_spectral_normalisation_is_of_one_map_and_moves_once():
    cell = Cell()
    nn.utils.parametrizations.spectral_norm(cell.recurrent)
    torch.manual_seed(0)
    parametrization = next(cell.recurrent.get_submodule("parametrizations.weight").children())
    parametrization._u.copy_(nn.functional.normalize(torch.randn(4).double(), dim=0))
    expected = copy.deepcopy(cell)
    expected.recurrent.weight  # noqa: B018  one power iteration
    layer = eg.nn.EquilibriumLayer(cell, solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    h = layer(data()[0])
    assert layer.phase.outcome == "converged"
    for found, wanted in zip(cell.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)
    h.sum().backward()
    for found, wanted in zip(cell.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


class Dropping(Cell):
    def forward(self, h, x):
        return nn.functional.dropout(super().forward(h, x), 0.5, self.training)


def test_dropout_keeps_its_mask_through_one_forward_and_its_backward():
    layer = eg.nn.EquilibriumLayer(Dropping(), solver=TIGHT, estimator=eg.GMRES(tol=1e-12))
    x, _ = data(samples=50)
    torch.manual_seed(5)
    h = layer(x)
    assert layer.phase.outcome == "converged"  # with other masks at every step it would not
    dropped = h == 0
    assert 0.4 < dropped.double().mean() < 0.6
    torch.rand(3)  # whatever the others draw
    h.sum().backward()
    weight = layer.cell.recurrent.weight.detach()
    gain = torch.where(dropped, 0.0, 2 * (1 - (h / 2).square())).detach()
    jacobian = gain[:, :, None] * weight
    one = torch.ones(4).double()
    solved = torch.stack([torch.linalg.solve(torch.eye(4) - j.T, one) for j in jacobian])
    expected = ((gain * solved)[:, :, None] * h.detach()[:, None, :]).sum(0)
    torch.testing.assert_close(layer.cell.recurrent.weight.grad, expected, rtol=1e-9, atol=1e-11)
    assert not torch.equal(layer(x) == 0, dropped)
    torch.manual_seed(5)
    assert torch.equal(layer(x), h)


def test_autocast_lowers_the_cell_alone():
    seen = []

    class Seen(Cell):
        def forward(self, h, x):
            image = super().forward(h, x)
            seen.append((h.dtype, self.recurrent(h).dtype))
            return image

    cell = Seen().float()
    solver, adjoint = eg.Anderson(tol=3e-2), eg.Adjoint(solver=eg.Anderson(tol=1e-2))
    x = data()[0].float()
    exact = eg.nn.EquilibriumLayer(cell, solver=eg.Anderson(tol=1e-6))
    expected = gradients(exact, x, 0.0)
    seen.clear()
    cell.zero_grad()
    layer = eg.nn.EquilibriumLayer(cell, solver=solver, estimator=adjoint)
    net = nn.Sequential(nn.Identity(), layer)
    with torch.autocast("cpu", torch.bfloat16):
        h = net(x)
    forward = len(seen)
    h.square().sum().backward()  # outside, as is usual
    assert h.dtype == torch.float32
    assert len(seen) > forward
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    found = {n: p.grad for n, p in layer.named_parameters()}
    expected.pop("x")
    assert 1e-5 < error(found, expected) < 0.05


def test_processes_agree_with_one():
    """Two processes under DistributedDataParallel have the gradient that one has of all samples."""
    script = Path(__file__).with_name("equilibrium_layer_processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().endswith("same")


# What is said


def test_a_cell_that_does_not_contract_is_named_in_the_first_failing_step():
    layer = eg.nn.EquilibriumLayer(Shift(-1.25), solver=eg.Picard(tol=1e-6, max_steps=10))
    x = torch.ones(3, 2).double()
    with pytest.warns(SettlingWarning, match=r"Shift\) not converged.*3 samples.*1\.25 ≥ 1.*damp"):
        layer(x)
    layer(x)  # once is enough, and the phase says it again
    assert layer.phase.unsettled == [0, 1, 2]
    damped = eg.nn.EquilibriumLayer(Shift(-1.25), solver=eg.Picard(tol=1e-6, damping=0.4))
    torch.testing.assert_close(damped(x), x / 2.25, rtol=1e-6, atol=0)


def test_unsettled_may_raise_or_be_ignored_without_gradients_too():
    x, picard = torch.ones(1, 2).double(), eg.Picard(tol=1e-9, max_steps=3)
    layer = eg.nn.EquilibriumLayer(Shift(0.5), solver=picard, unsettled="raise")
    with torch.no_grad(), pytest.raises(eg.SettlingError, match=r"0\.5 < 1.*more steps"):
        layer.eval()(x)
    layer = eg.nn.EquilibriumLayer(Shift(0.5), solver=picard, unsettled="ignore")
    layer(x)
    assert layer.phase.outcome == "not converged"
    layer = eg.nn.EquilibriumLayer(Shift(0.5), solver=picard)
    with torch.no_grad(), pytest.warns(SettlingWarning):
        layer.eval()(x)


def test_some_samples_settle_and_some_do_not():
    class Gains(nn.Module):
        def forward(self, h, gain):
            return gain * h + 1

    gains = torch.tensor([[0.1], [0.999], [-0.3], [1.1]]).double()
    layer = eg.nn.EquilibriumLayer(Gains(), solver=eg.Picard(tol=1e-6, max_steps=40))
    with pytest.warns(SettlingWarning, match=r"2 samples \(1, 3\) of 4.*1\.1 ≥ 1 in sample 3 of 4"):
        h = layer(gains)
    assert layer.phase.unsettled == [1, 3]
    torch.testing.assert_close(h[[0, 2]], 1 / (1 - gains[[0, 2]]), rtol=1e-6, atol=0)
    residuals = (gains * h + 1 - h).abs().flatten()  # one step before the end
    torch.testing.assert_close(layer.phase.residuals * gains.flatten().abs(), residuals)


class Square(nn.Module):
    """`h ↦ h² + w x`: rests near w x where that is small, and explodes where it is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1).double())

    def forward(self, h, x):
        return h.square() + self.weight * x


def test_divergence_names_the_sample_and_the_radius():
    layer = eg.nn.EquilibriumLayer(Square(), solver=eg.Picard(tol=1e-6, max_steps=100))
    x = torch.tensor([[0.1], [9.0]]).double()
    with pytest.warns(
        SettlingWarning, match=r"EquilibriumLayer\(Square\).*sample 1 of 2 diverged.*radius"
    ):
        h = layer(x)
    assert layer.phase.diverged == (1,)
    assert h[1].item() == 0  # where it started
    assert h[0].item() == pytest.approx((1 - 0.6**0.5) / 2, abs=1e-6)
    raising = eg.nn.EquilibriumLayer(Square(), solver=layer.solver, unsettled="raise")
    with pytest.raises(eg.SettlingError, match="sample 1 of 2 diverged"):
        raising(x)
    with pytest.raises(
        eg.SettlingError, match=r"EquilibriumLayer\(Square\).*2 samples \(0, 1\) of 2.*radius"
    ):
        layer(x[[1, 1]])


@pytest.mark.parametrize("solver", [eg.Picard, eg.GradientFlow])
@pytest.mark.parametrize(
    "estimator",
    [
        eg.Adjoint(solver=eg.Anderson(tol=1e-11)),
        eg.GMRES(tol=1e-11),
        eg.T1T2(),
        eg.PhantomGradient(steps=30),  # enough to diverge once more
        eg.NeumannSeries(terms=60),
    ],
)
def test_a_sample_that_diverges_has_no_part_in_the_gradient(solver, estimator):
    """The gradient by the weight and by the inputs is that of the batch without it."""
    x = torch.tensor([[0.1], [9.0], [-0.2]]).double().requires_grad_()
    solver = solver(tol=1e-11, max_steps=300)

    def gradient(rows):
        layer = eg.nn.EquilibriumLayer(
            Square(), solver=solver, estimator=estimator, unsettled="ignore"
        )
        h = layer(x[rows])
        return torch.autograd.grad(h.cos().sum(), [layer.cell.weight, x])

    weight, by_x = gradient([0, 1, 2])
    expected, expected_by_x = gradient([0, 2])
    torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(by_x, expected_by_x, rtol=1e-8, atol=1e-12)
    assert by_x[1].item() == 0


class Cubic(nn.Module):
    """The same with an energy: `h ↦ h² + w x` from `Φ = Σ h³/3 + w x h`."""

    activation = nn.Identity()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1).double())

    def forward(self, h, x):
        return h.square() + self.weight * x

    def primitive(self, h, x):
        return (h**3 / 3 + self.weight * x * h).sum()


@pytest.mark.parametrize("scheme", ["forward", "symmetric"])
def test_a_sample_that_diverges_has_no_part_in_a_contrast(scheme):
    """Nor do nudged phases that end while it is on its way to infinity once more."""
    x = torch.tensor([[0.1], [9.0], [-0.2]]).double()
    solver = eg.Picard(tol=1e-11, max_steps=300)

    def gradient(rows):
        layer = eg.nn.EquilibriumLayer(
            Cubic(),
            solver=solver,
            estimator=eg.Contrastive(
                beta=1e-3, scheme=scheme, nudged_solver=eg.Picard(max_steps=6)
            ),
            unsettled="ignore",
        )
        (grad,) = torch.autograd.grad(layer(x[rows]).cos().sum(), [layer.cell.weight])
        return grad

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([0, 2]), rtol=1e-8, atol=1e-12)


def test_what_estimators_have_to_say_is_said():
    few = eg.Adjoint(solver=eg.Picard(tol=1e-9, max_steps=3))
    layer = eg.nn.EquilibriumLayer(Cell(), estimator=few)
    with pytest.warns(SettlingWarning, match=r"backward pass.*adjoint has not converged"):
        layer(data()[0]).sum().backward()
    layer(data()[0]).sum().backward()
    layer = eg.nn.EquilibriumLayer(Cell(), estimator=few, unsettled="raise")
    with pytest.raises(eg.SettlingError, match=r"adjoint has not converged"):
        layer(data()[0]).sum().backward()
    nudged = eg.Contrastive(nudged_solver=eg.Picard(tol=1e-12, max_steps=2), momentum="reset")
    layer = eg.nn.EquilibriumLayer(SymmetricCell(), estimator=nudged)
    with pytest.warns(SettlingWarning, match=r"phase β=0\.01 not converged"):
        layer(data()[0]).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": 3}, "solver must be a Solver, got 3"),
        ({"estimator": eg.GMRES}, "estimator must be an Estimator, got"),
        ({"unsettled": "shout"}, "'warn', 'raise' or 'ignore', got 'shout'"),
        ({"estimator": eg.Contrastive()}, r"Contrastive needs an energy.*Cell.*primitive.*GMRES"),
        ({"estimator": eg.ConjugateGradient()}, r"ConjugateGradient needs a Hessian.*use T1T2"),
        (
            {"solver": eg.LBFGS()},
            r"LBFGS compares values of a loss, but a cell has no loss. Use And",
        ),
        ({"estimator": eg.LeastControl()}, "LeastControl needs an outer loss that has a minimum"),
        ({"estimator": eg.Unrolled()}, r"Unrolled needs the steps.*use T1T2.*PhantomGradient"),
    ],
)
def test_what_cannot_work_is_refused_when_the_layer_is_made(arguments, message):
    with pytest.raises(eg.ConfigurationError, match=message):
        eg.nn.EquilibriumLayer(**{"cell": Cell(), **arguments})


def test_a_cell_that_expands_is_named_without_a_tolerance_too():
    """`h ← 2h + 1` doubles its residual at every step: from √2 to 2¹⁹ times that."""
    solver = eg.Picard(max_steps=20)
    layer = eg.nn.EquilibriumLayer(Shift(2.0), solver=solver, unsettled="raise")
    x = torch.ones(3, 2).double()
    with pytest.raises(eg.SettlingError, match=r"residual 7.4e\+05 .* up from 1.4.* 2 ≥ 1"):
        layer(x)
    calm = eg.nn.EquilibriumLayer(Shift(0.5), solver=solver, unsettled="raise")
    calm(x)
    assert calm.phase.outcome == "stopped"


def test_an_adjoint_that_expands_is_named_without_a_tolerance_too():
    adjoint = eg.Adjoint(solver=eg.Picard(max_steps=20))
    layer = eg.nn.EquilibriumLayer(
        Shift(2.0), solver=eg.Broyden(tol=1e-9), estimator=adjoint, unsettled="raise"
    )
    h = layer(torch.ones(3, 2).double())
    with pytest.raises(eg.SettlingError, match=r"adjoint has not converged.*up from"):
        h.sum().backward()


@pytest.mark.parametrize(
    ("image", "solver", "said", "unsaid"),
    [
        # the slope of h³ is 0 at the start, and yet it diverges
        (lambda h, x: 3 * h**3 + 2 * x, eg.Picard(), "radius .* is 0 < 1", "more steps"),
        (lambda h, x: torch.log(h - 1), eg.Picard(), "at step 0.*check the function", "radius"),
        (lambda h, x: -3 * h + x, eg.Broyden(tol=1e-30, max_steps=1), "more steps", "Broyden"),
        (lambda h, x: 0.9 * h + x, eg.Anderson(tol=1e-30, max_steps=1), "more steps", r"Anderson"),
    ],
)
def test_advice_fits_the_map_and_the_solver(image, solver, said, unsaid):
    class Map(nn.Module):
        def forward(self, h, x):
            return image(h, x)

    layer = eg.nn.EquilibriumLayer(Map(), solver=solver, unsettled="raise")
    with pytest.raises(eg.SettlingError, match=said) as raised:
        layer(torch.ones(2, 3).double())
    for wrong in (unsaid, "minimum", "step size"):
        assert wrong not in str(raised.value)


def test_half_precision():
    """Solved to what bfloat16 can say: 8 bits."""
    cell = Cell().bfloat16()
    layer = eg.nn.EquilibriumLayer(
        cell, solver=eg.Anderson(tol=0.1), estimator=eg.Adjoint(solver=eg.Anderson(tol=0.1))
    )
    found = layer(data()[0].bfloat16())
    found.sum().backward()
    exact = eg.nn.EquilibriumLayer(copy.deepcopy(cell).double(), solver=TIGHT)(
        data()[0].bfloat16().double()
    )
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.1 * exact.norm()
    assert cell.recurrent.weight.grad.isfinite().all()


def test_an_empty_batch_is_named():
    with pytest.raises(eg.ProblemError, match="'h' have 0 samples; leave out empty batches"):
        eg.nn.EquilibriumLayer(Cell())(torch.zeros(0, 3).double())


def test_an_energy_needs_an_activation():
    class NoActivation(nn.Module):
        def primitive(self, h, x):
            return (h * x).sum()

    with pytest.raises(eg.ConfigurationError, match="no activation"):
        eg.nn.EquilibriumLayer(NoActivation())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (lambda h: h[:, :2], r"'h': \(5, 3\)}, but returned {'h': \(5, 2\)}. Change the start"),
        (lambda h: (h, h), r"returned {'h0': \(5, 3\), 'h1'"),
        (lambda h: None, "got NoneType"),
    ],
)
def test_a_cell_that_changes_the_shape(image, message):
    class Wrong(Cell):
        start = None

        def forward(self, h, x):
            return image(h)

    with pytest.raises(eg.ProblemError, match=message):
        eg.nn.EquilibriumLayer(Wrong())(data()[0])


def test_bad_input():
    layer = eg.nn.EquilibriumLayer(Cell())
    x, h = data()
    x[3, 1] = float("nan")
    with pytest.raises(eg.ProblemError, match=r"input 0 of Cell holds NaN.*sample 3 of 5"):
        layer(x)
    with pytest.raises(eg.ProblemError, match=r"start of 'h' of Cell holds NaN"):
        layer(data()[0], start=h / 0)
    with pytest.raises(eg.ProblemError, match=r"the same number of samples.*\(5, 4\).*\(2, 4\)"):
        layer(data()[0], start=(h, h[:2]))
    with pytest.raises(eg.ProblemError, match="first dimension counts samples"):
        layer(data()[0], start=torch.tensor(1.0))
    with pytest.raises(eg.ProblemError, match="Give start="):
        eg.nn.EquilibriumLayer(Shift(0.5))(torch.arange(3))
