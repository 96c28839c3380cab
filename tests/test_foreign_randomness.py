"""Losses that draw from Python's or numpy's global generator draw the same in every phase."""

import functools
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import equigrad as eg
from equigrad.randomness import CommonRandomness

DRAWS = {
    "gauss": lambda n: [random.gauss(0, 1) for _ in range(n)],
    "uniform": lambda n: [random.random() for _ in range(n)],
    "shuffle": lambda n: random.sample(range(n), n),
    "randn": lambda n: np.random.randn(n),
    "permutation": lambda n: np.random.permutation(n),
    "both": lambda n: np.random.rand(n) + [random.random() for _ in range(n)],
}


def noise(draw, n=3):
    return torch.tensor(np.array(DRAWS[draw](n)), dtype=torch.float64)


def shifted(draw, outer=False):
    """A quadratic around noise that all steps draw anew: φ* moves with it, and so does no slope."""

    def inner(p, m):
        pull = 0.0 if outer else noise(draw)
        return 0.5 * (p["w"] - m["t"] - 0.1 * pull).square().sum()

    def judge(p, m):
        pull = noise(draw) if outer else 0.0
        return 0.5 * (p["w"] - 3.0 - 0.1 * pull).square().sum()

    return eg.Bilevel(inner, judge)


def run(problem, estimator=None, seed=0, steps=40):
    torch.manual_seed(seed)
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    meta = {"t": torch.ones(3, dtype=torch.float64)}
    solver = eg.GradientDescent(lr=0.2, max_steps=steps)
    estimator = estimator or eg.Contrastive(beta=1e-5, scheme="symmetric")
    return eg.meta_gradient(problem, start, meta, solver=solver, estimator=estimator)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("known", [False, True], ids=["tried", "known"])
def test_phases_share_the_noise_of_the_inner_loss(draw, known):
    problem = shifted(draw)
    if known:  # nothing is evaluated before the free phase then
        reaches: Any = {"inner": ["t"], "outer": []}
        problem = eg.Bilevel(problem.inner_loss, problem.outer_loss, reaches=reaches)
    exact = run(problem, eg.Unrolled()).grads["t"]
    for estimator in (eg.ForwardMode(), eg.Unrolled(segment=7)):
        torch.testing.assert_close(run(problem, estimator).grads["t"], exact)
    # noise that phases did not share would be divided by β; it is not, and moves φ by some 0.1
    found = run(problem)
    assert (found.grads["t"] - (found.params["w"] - 3.0)).abs().max() < 0.2


@pytest.mark.parametrize("draw", DRAWS)
def test_noise_of_the_outer_loss_alone(draw):
    problem = shifted(draw, outer=True)
    found = run(problem).grads["t"]
    assert (found + 2.0).abs().max() < 1.0  # of the size of the noise, and not of noise over β
    torch.testing.assert_close(run(problem).grads["t"], found)


@pytest.mark.parametrize("draw", DRAWS)
def test_torchs_seed_decides_everything_and_the_users_numbers_go_on(draw):
    problem = shifted(draw)
    random.seed(5), np.random.seed(5)
    random.gauss(0, 1), np.random.randn(1)  # both generators now keep half of a pair
    expected = [random.gauss(0, 1), random.random(), *np.random.randn(2), np.random.rand()]
    random.seed(5), np.random.seed(5)
    random.gauss(0, 1), np.random.randn(1)
    first = run(problem).grads["t"]
    second = run(problem).grads["t"]
    other = run(problem, seed=1).params["w"]
    found = [random.gauss(0, 1), random.random(), *np.random.randn(2), np.random.rand()]
    assert found == expected
    assert torch.equal(first, second)
    assert not torch.equal(other, run(problem).params["w"])


def test_the_users_numbers_go_on_after_an_exception():
    def fails(p, m):
        random.random(), np.random.rand()
        raise ZeroDivisionError

    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    with pytest.raises(ZeroDivisionError):
        run(eg.Bilevel(fails, fails))
    assert (random.random(), np.random.rand()) == expected


def test_a_map_that_draws_is_the_same_map_at_every_step():
    def relax(p, m):
        mask = noise("uniform") < 0.5
        return {"w": 0.3 * p["w"] * mask + m["t"]}

    problem = eg.FixedPoint(relax, lambda p, m: p["w"].square().sum())
    torch.manual_seed(0)
    found = eg.meta_gradient(
        problem,
        {"w": torch.zeros(3, dtype=torch.float64)},
        {"t": torch.ones(3, dtype=torch.float64)},
        solver=eg.Picard(tol=1e-9, max_steps=60),
        estimator=eg.GMRES(tol=1e-9),
    )
    assert not found.phases[0].failed
    # w* = t / (1 - 0.3 mask), and dL/dt = 2 w* / (1 - 0.3 mask)
    torch.testing.assert_close(found.grads["t"], 2 * found.params["w"].square())


def test_draws_in_a_later_evaluation_are_seen_and_nested_ones_do_not_disturb():
    def evaluate(step, draws):
        shared.seed("inner", step)
        return random.random(), float(np.random.rand()) if draws else None

    with CommonRandomness([torch.zeros(1)], base=7) as shared:
        for step in range(3):
            shared.seed("inner", step)
            with CommonRandomness([torch.zeros(1)], base=9) as within:
                within.seed("outer", 0)
                random.random(), np.random.rand()
        first = [evaluate(step, True) for step in range(3, 6)]
        again = [evaluate(step, True) for step in range(3, 6)]
    assert first[1:] == again[1:]  # the first draw of all finds out
    assert len(set(first)) == 3


def test_numpy_is_not_imported_for_it():
    script = (
        "import sys, equigrad.randomness as r; had = 'numpy.random' in sys.modules\n"
        "with r.CommonRandomness([], base=0) as c: c.seed('inner', 0)\n"
        "assert ('numpy.random' in sys.modules) == had"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_generator_of_numpys_that_cannot_be_seeded_is_left_alone():
    numpy: Any = np.random
    given = numpy.get_bit_generator()
    try:
        numpy.set_bit_generator(np.random.PCG64(0))
        run(shifted("gauss"))
        np.random.rand()
    finally:
        numpy.set_bit_generator(given)


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return generator.random() if hasattr(generator, "random") else generator.rand()


KINDS: dict[str, Callable[[], Any]] = {
    "torch.Generator": lambda: torch.Generator().manual_seed(0),
    "numpy.Generator": lambda: np.random.default_rng(0),
    "numpy.RandomState": lambda: np.random.RandomState(0),
    "random.Random": lambda: random.Random(0),
}
DICE: Any = None


class Augmented(torch.utils.data.Dataset):
    def __init__(self, generator):
        self.how = {"shift": [generator]}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.full((3,), i + 0.5 * draw(self.how["shift"][0]), dtype=torch.float64)


class Jitter:
    def __init__(self, generator):
        self.generator = generator

    def __call__(self, p, m):
        return (p["w"] - m["t"] - draw(self.generator)).square().sum()


def in_closure(generator):
    return {"inner_loss": lambda p, m: (p["w"] - m["t"] - draw(generator)).square().sum()}


def in_global(generator):
    global DICE
    DICE = generator
    return {"inner_loss": lambda p, m: (p["w"] - m["t"] - draw(DICE)).square().sum()}


def in_object(generator):
    return {"inner_loss": Jitter(generator)}


def in_partial(generator):
    def loss(generator, p, m):
        return (p["w"] - m["t"] - draw(generator)).square().sum()

    return {"inner_loss": functools.partial(loss, generator)}


def with_batch(p, m, batch):
    return (p["w"] - m["t"] - batch).square().sum()


def in_data_set(generator):
    return {"inner_loss": with_batch, "inner_batches": Augmented(generator)}


def in_subset(generator):
    whole = Augmented(generator)
    return {"inner_loss": with_batch, "inner_batches": torch.utils.data.Subset(whole, [1, 0])}


def in_concatenated(generator):
    both = torch.utils.data.ConcatDataset([Augmented(generator), Augmented(generator)])
    return {"inner_loss": with_batch, "inner_batches": both}


def plain(p, m):
    return (p["w"] - m["t"]).square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place",
    [in_closure, in_global, in_object, in_partial, in_data_set, in_subset, in_concatenated],
)
def test_a_generator_of_ones_own_is_named_wherever_it_is(kind, place):
    result = eg.meta_gradient(
        eg.Bilevel(outer_loss=plain, **place(KINDS[kind]())),
        {"w": torch.zeros(3, dtype=torch.float64)},
        {"t": torch.ones(3, dtype=torch.float64)},
        solver=eg.GradientDescent(lr=0.1, max_steps=20),
    )
    assert "inner_loss is not a function of params and step alone: two calls" in result.status
    assert f"a random generator of its own ({kind})" in result.status


class Shaken(torch.nn.Linear):
    def __init__(self, generator):
        super().__init__(3, 1, dtype=torch.float64)
        self.dice = generator

    def forward(self, input):
        return super().forward(input + draw(self.dice))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_that_a_module_holds_is_put_back_and_named(kind):
    generator = KINDS[kind]()
    module = Shaken(generator)
    x = torch.ones(5, 3, dtype=torch.float64)

    def loss(p, m):
        return (torch.func.functional_call(module, dict(p), (x,)) - m["t"]).square().mean()

    def gradient():
        result = eg.meta_gradient(
            eg.Bilevel(lambda p, m: loss(p, m), plain_size),
            dict(module.named_parameters()),
            {"t": torch.ones(1, dtype=torch.float64)},
            solver=eg.GradientDescent(lr=0.05, max_steps=20),
        )
        assert "each changes attribute 'dice' of Shaken" in result.status
        return result.grads["t"]

    assert gradient().equal(gradient())
    assert draw(generator) == draw(KINDS[kind]())


def plain_size(p, m):
    return sum((q.square().sum() for q in p.values()), torch.zeros((), dtype=torch.float64))
