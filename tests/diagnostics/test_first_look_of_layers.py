"""Cells of layers and losses of few-shot learners are looked at once, as other problems are."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import equigrad as eg
from equigrad.tasks import FewShotLearner, NWayKShot, Sinusoids

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.hold()

    def hold(self):
        pass

    def forward(self, h, x):
        return torch.tanh(0.5 * self.linear(h) + x)


class Noisy(Cell):
    def hold(self):
        self.dice = torch.Generator().manual_seed(0)

    def forward(self, h, x):
        return super().forward(h, x) + 0.3 * torch.rand(h.shape, generator=self.dice)


class NoisyByNumpy(Cell):
    def hold(self):
        self.dice = np.random.default_rng(0)

    def forward(self, h, x):
        return super().forward(h, x) + 0.1 * self.dice.random()


class NoisyByPython(NoisyByNumpy):
    def hold(self):
        self.dice = random.Random(0)


class Alternates(Cell):
    def hold(self):
        self.calls = 0

    def forward(self, h, x):
        self.calls += 1
        return super().forward(h, x) * (0.5 + 0.3 * (self.calls % 2))


class Averages(Cell):
    def hold(self):
        self.mean = torch.zeros(3)

    def forward(self, h, x):
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return super().forward(h, x) + self.mean


DICE = np.random.default_rng(0)
COUNT: list[int] = []


class NoisyByGlobal(Cell):
    def forward(self, h, x):
        return super().forward(h, x) + 0.1 * float(DICE.random())


class CountsOutside(Cell):
    def forward(self, h, x):
        COUNT.append(1)
        return super().forward(h, x) + 0.1 * len(COUNT)


class Aliased(Cell):
    def hold(self):
        self.again = [self.linear.weight]

    def forward(self, h, x):
        return torch.tanh(0.3 * self.linear(h @ self.again[0].T) + x)


class OnlyAlias(Aliased):
    def forward(self, h, x):
        return torch.tanh(0.3 * h @ self.again[0].T + 0 * self.linear(h) + x)


class AliasOfEnergy(nn.Module):
    activation = staticmethod(torch.tanh)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3, bias=False)
        self.again = {"w": self.linear.weight}

    def primitive(self, h, x):
        return 0.1 * (h * self.linear(h @ self.again["w"])).sum() + (h * x).sum()


class Counts(Cell):
    def hold(self):
        self.calls = 0

    def forward(self, h, x):
        self.calls += 1
        return super().forward(h, x)


class Drops(Cell):
    def forward(self, h, x):
        return nn.functional.dropout(super().forward(h, x), 0.3, self.training)


class Draws(Cell):
    def forward(self, h, x):
        noise = torch.randn_like(h) + random.random() + float(np.random.rand())
        return super().forward(h, x) + 0.1 * noise


class Normalises(Cell):
    def hold(self):
        self.norm = nn.BatchNorm1d(3)

    def forward(self, h, x):
        return torch.tanh(0.3 * self.norm(self.linear(h)) + x)


class Checkpoints(Cell):
    def forward(self, h, x):
        found = checkpoint(super().forward, h, x, use_reentrant=False)
        assert isinstance(found, torch.Tensor)
        return found


class Spectral(Cell):
    def hold(self):
        self.linear = nn.utils.parametrizations.spectral_norm(self.linear)


def passed(cell, passes=1, **options):
    """The layer after some passes, and what it warned of in the backward ones."""
    layer = eg.nn.EquilibriumLayer(cell, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(passes):
            layer(X).square().sum().backward()
    return layer, [str(w.message) for w in caught if "backward pass" in str(w.message)]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (Noisy, "each changes attribute 'dice' of Noisy"),
        (NoisyByNumpy, "each changes attribute 'dice' of NoisyByNumpy"),
        (NoisyByPython, "each changes attribute 'dice' of NoisyByPython"),
        (Alternates, "each changes attribute 'calls' of Alternates"),
        (Averages, "each changes attribute 'mean' of Averages"),
        (NoisyByGlobal, "a random generator of its own"),
        (CountsOutside, "keeps a state outside of the cell"),
    ],
)
def test_a_cell_that_is_no_function_is_named_once(cell, words):
    layer, (said,) = passed(cell(), passes=3)
    assert said.startswith(f"the backward pass of EquilibriumLayer({cell.__name__}): map is no")
    assert words in said
    assert "is restored at the end" not in said  # it is the user's, and trains on
    assert "map is not a function" not in layer.status  # nothing was looked at in the last pass
    with pytest.raises(eg.SettlingError, match=r"map is not a function|not converge"):
        passed(cell(), unsettled="raise")


@pytest.mark.parametrize("cell", [Aliased, OnlyAlias, AliasOfEnergy])
def test_a_parameter_that_a_cell_holds_twice_is_refused(cell):
    with pytest.raises(eg.ProblemError, match="Register each parameter of the cell only once"):
        passed(cell(), solver=eg.Picard(tol=1e-5, max_steps=300))


@pytest.mark.parametrize(
    "cell", [Cell, Counts, Drops, Draws, Normalises, Checkpoints, Spectral, nn.GRUCell]
)
def test_sound_cells_are_not_accused(cell):
    made = cell(3, 3) if cell is nn.GRUCell else cell()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    swapped = made
    if cell is nn.GRUCell:

        class Turned(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = made

            def forward(self, h, x):
                return 0.5 * self.cell(x, h)

        swapped = Turned()
    layer, said = passed(swapped, passes=2)
    assert said == []
    assert layer.status == ""
    assert all(p.equal(before[n]) for n, p in made.named_parameters())


def test_a_checkpoint_in_a_cell_leaves_its_gradient():
    plain, recomputed = Cell(), Checkpoints()
    for cell in (plain, recomputed):
        passed(cell)
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_look_at_a_cell_costs_four_evaluations_once():
    calls = []

    class Counted(Cell):
        def forward(self, h, x):
            calls.append(1)
            return super().forward(h, x)

    layer, spent = eg.nn.EquilibriumLayer(Counted(), solver=eg.Picard(max_steps=20)), []
    for _ in range(3):
        loss = layer(X).square().sum()
        calls.clear()
        loss.backward()
        spent.append(len(calls))
    assert spent[1] == spent[2]
    # two gradients and two values; the others are of a linear loss, which calls no cell
    assert spent[0] - spent[1] == 4


def test_a_layer_has_its_estimators_error():
    exact = eg.GMRES(tol=1e-7)
    solver = eg.Picard(tol=1e-6, max_steps=300)
    truth, said = passed(Cell(), solver=solver, estimator=exact)
    assert truth.error_estimate is not None
    assert truth.error_estimate < 1e-5
    rough, said = passed(Cell(), solver=solver, estimator=eg.NeumannSeries(terms=2, tol=9))
    assert rough.error_estimate is not None
    pairs = list(zip(rough.parameters(), truth.parameters(), strict=True))
    apart = torch.cat([(a.grad - b.grad).flatten() for a, b in pairs]).norm()  # type: ignore
    true = (apart / torch.cat([b.grad.flatten() for _, b in pairs]).norm()).item()  # type: ignore
    assert true / 3 < rough.error_estimate < 10 * true
    assert "NeumannSeries solved its linear system to a residual of" in rough.status
    assert said == []  # it was asked for no more
    rough(X).sum().mul(0).backward()
    assert (rough.error_estimate, rough.status) == (None, "")


def learner(loss=mse_loss, estimator=None, **options) -> FewShotLearner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    return FewShotLearner(
        model=eg.nn.Modulation(net.double()),
        loss=loss,
        solver=eg.GradientDescent(lr=0.05, max_steps=20),
        estimator=eg.Contrastive(beta=0.1) if estimator is None else estimator,
        batching="loop",
        **options,
    )


def status(one: FewShotLearner, draw: int = 0) -> str:
    batch = Sinusoids(seed=1).sample(3, draw).to(torch.device("cpu"), torch.float64)
    return one.meta_gradient(one.model.meta_params(), batch).status


def noisy(outputs, targets):
    return mse_loss(outputs, targets) * (1 + 0.1 * float(DICE.random()))


def counting(outputs, targets):
    COUNT.append(1)
    return mse_loss(outputs, targets) * (1 + 0.1 * (len(COUNT) % 3))


def half_hidden(outputs, targets):
    return mse_loss(outputs / (1 + outputs.detach().norm()), targets)


@pytest.mark.parametrize("loss", [noisy, counting])
def test_a_few_shot_loss_that_is_no_function_is_named(loss):
    one = learner(loss)
    for draw in range(2):
        assert "_loss is not a function of params and step alone: two calls" in status(one, draw)


@pytest.mark.parametrize("estimator", [eg.Contrastive(beta=0.1), eg.T1T2()])
def test_a_few_shot_loss_that_hides_something_is_refused(estimator):
    with pytest.raises(eg.ProblemError, match="hidden from autograd"):
        status(learner(half_hidden, estimator))


@pytest.mark.parametrize("estimator", [eg.Contrastive(beta=0.1), eg.T1T2()])
def test_the_look_at_a_few_shot_loss_costs_four_evaluations_once(estimator):
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        return mse_loss(outputs, targets)

    one, spent, counted = learner(loss, estimator), [], []
    meta_params = one.model.meta_params()
    for draw in range(3):
        calls.clear()
        batch = Sinusoids(seed=1).sample(3, draw).to(torch.device("cpu"), torch.float64)
        result = one.meta_gradient(meta_params, batch)
        spent.append(len(calls))
        counted.append(result.gradient_evaluations)
    assert spent[1] == spent[2]
    # two calls find what the losses depend on; the look is four values of the outer loss, and
    # where second derivatives are taken, two of the inner one
    assert spent[0] - spent[1] in (2 + 4 + 3 + 2, 2 + 4 + 4)
    assert len({*counted}) == 1


@pytest.mark.parametrize("estimator", [eg.Contrastive(beta=0.1), eg.T1T2(), eg.MAML()])
@pytest.mark.parametrize("batching", ["loop", "grouped", "vmap"])
def test_sound_few_shot_learners_are_not_accused(estimator, batching):
    generator = torch.Generator().manual_seed(0)
    tasks = NWayKShot(torch.rand(9, 8, 1, 16, 16, generator=generator), way=3, shot=2, queries=3)
    torch.manual_seed(0)
    net = eg.nn.conv4(filters=4, side=16, outputs=3)
    one = FewShotLearner(
        model=eg.nn.LearnedStart(net) if isinstance(estimator, eg.MAML) else eg.nn.Modulation(net),
        loss=cross_entropy,
        solver=eg.GradientDescent(lr=0.1, max_steps=4),
        estimator=estimator,
        batching=batching,
    )
    said = one.meta_gradient(one.model.meta_params(), tasks.sample(2, 0)).status
    assert "autograd" not in said
    assert "function of" not in said
