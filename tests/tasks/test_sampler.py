"""Dice that depend on the seed and on the draw, and on nothing else."""

import pytest
import torch

from equigrad.errors import ConfigurationError
from equigrad.tasks import NWayKShot, Sinusoids
from equigrad.tasks.sampler import dice

SAMPLERS = {
    "sinusoids": lambda seed: Sinusoids(seed=seed),
    "classes": lambda seed: NWayKShot(
        torch.arange(200.0).reshape(10, 20, 1), shot=2, queries=3, seed=seed
    ),
}


def drawn(batch):
    return torch.cat([t.flatten(1).double() for t in (*batch.support, *batch.query)], 1)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_draws_depend_on_seed_and_number_alone(make):
    one = make(3)
    first, second = drawn(one.sample(4, draw=0)), drawn(one.sample(4, draw=1))
    torch.manual_seed(99)
    torch.rand(5)
    later = make(3)
    later.sample(7, draw=5)
    assert torch.equal(drawn(later.sample(4, draw=1)), second)
    assert torch.equal(drawn(one.sample(4, draw=0)), first)
    assert not torch.equal(first, second)
    # draw 1 of seed 3 is not draw 0 of seed 4, nor are the tasks of a batch alike
    assert not torch.equal(drawn(make(4).sample(4, draw=0)), second)
    assert len(first.unique(dim=0)) == 4


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_the_global_generator_is_left_alone(make):
    before = torch.get_rng_state()
    make(0).sample(2, draw=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_draws_share_their_dice():
    seeds = {dice(seed, draw).initial_seed() for seed in range(-5, 45) for draw in range(200)}
    assert len(seeds) == 50 * 200


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("tasks", [0, -1, 2.0])
def test_batches_have_tasks(make, tasks):
    with pytest.raises(
        ConfigurationError, match=f"tasks must be a whole number of at least 1.*got {tasks}"
    ):
        make(0).sample(tasks, draw=0)
