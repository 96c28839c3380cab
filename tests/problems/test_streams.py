"""Batches of a DataLoader, or of anything that can be begun again."""

import random
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import equigrad as eg
from equigrad.problems.streams import KEPT, DrawnBatches, moved

N = 22


class Points(Dataset):
    """Rows of a regression, by number."""

    def __init__(self, augment=lambda: 0.0):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sum(1) + torch.randn(N, generator=generator, dtype=torch.float64)
        self.augment = augment

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": self.x[i] + 0.1 * torch.as_tensor(self.augment()), "y": self.y[i], "i": i}


class Counted:
    """Twelve batches that say how many of them live."""

    def __init__(self, count=12):
        self.count, self.live, self.most = count, weakref.WeakSet(), 0

    def __iter__(self):
        for _ in range(self.count):
            batch = Batch(torch.randn(5, 3, dtype=torch.float64))
            self.live.add(batch)
            self.most = max(self.most, len(self.live))
            yield batch


class Batch:
    def __init__(self, x):
        self.x = x


def inner(p, m, batch):
    weight = m["weight"].index_select(0, batch["i"]).sigmoid()
    return (weight * (batch["x"] @ p["w"] - batch["y"]).square()).mean()


V = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def outer(p, m):
    return (V @ p["w"] - V.sum(1)).square().mean()


def start():
    return {"w": torch.zeros(3, dtype=torch.float64)}, {"weight": torch.zeros(N).double()}


RULE = eg.Contrastive(beta=0.1)
SOLVER = eg.GradientDescent(lr=0.05, momentum=0.5, max_steps=13)


def gradient(
    batches, seed=0, solver: eg.Solver = SOLVER, estimator: eg.Estimator = RULE, **options
):
    torch.manual_seed(seed)
    problem = eg.Bilevel(inner, outer, inner_batches=batches, **options)
    return eg.meta_gradient(problem, *start(), solver=solver, estimator=estimator)


@pytest.mark.parametrize(
    "estimator",
    [
        eg.Contrastive(beta=0.1, nudged_solver=eg.GradientDescent(lr=0.05, max_steps=9)),
        eg.T1T2(),
        eg.Unrolled(segment=3),
        eg.ConjugateGradient(),
    ],
)
def test_a_loader_without_shuffling_is_the_list_of_its_batches(estimator):
    loader = DataLoader(Points(), batch_size=4)
    drawn, listed = (gradient(b, estimator=estimator) for b in (loader, list(loader)))
    assert torch.equal(drawn.grads["weight"], listed.grads["weight"])
    assert torch.equal(drawn.params["w"], listed.params["w"])
    assert drawn.outer_loss == listed.outer_loss


def orders(loader, seed=0):
    """What the free phase saw, pass by pass, and what further phases did."""
    seen = []

    def watched(p, m, batch):
        seen.append(tuple(batch["i"].tolist()))
        return inner(p, m, batch)

    torch.manual_seed(seed)
    problem = eg.Bilevel(watched, outer, inner_batches=loader)
    solver = eg.GradientDescent(lr=0.05, max_steps=15)
    estimator = eg.Contrastive(beta=0.1, nudge="loss", error=False)
    settled = eg.settle(problem, *start(), solver=solver)
    free = seen[-15:]
    seen.clear()
    eg.meta_gradient(problem, *start(), solver=solver, estimator=estimator, settled=settled)
    return free, seen


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_every_pass_has_an_order_of_its_own_and_all_phases_the_same(generator):
    loader = DataLoader(Points(), batch_size=4, shuffle=True, generator=generator)
    free, later = orders(loader)
    passes = [free[:6], free[6:12], free[12:] + later[1:4]]  # the third is ended by a nudged phase
    assert all(sorted(i for b in p for i in b) == list(range(N)) for p in passes)
    assert passes[0] != passes[1]
    assert later[0] == free[0]  # the losses are looked at once
    assert later[1:16] == later[16:31]  # the other one sees the same
    assert later[31:37] == passes[0]  # ∂L/∂θ is averaged over the first pass
    assert orders(loader) == (free, later)
    assert orders(loader, seed=1)[0] != free


def test_the_random_numbers_of_others_are_untouched():
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Points(), batch_size=4, shuffle=True, generator=generator)
    before, python, numpy = (
        generator.get_state(),
        random.getstate(),
        np.random.get_state(legacy=False),
    )
    gradient(loader)
    assert torch.equal(generator.get_state(), before)
    assert random.getstate() == python
    now = np.random.get_state(legacy=False)
    assert (now["state"]["key"] == numpy["state"]["key"]).all()
    after = torch.rand(())
    gradient(list(loader))
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize(
    "augment",
    [
        lambda: torch.randn(3, dtype=torch.float64),
        lambda: np.random.standard_normal(3),
        lambda: random.gauss(),
    ],
)
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_augmentations_are_the_same_in_every_phase(augment, workers):
    """At a small β, noise that phases do not share would be all there is."""
    loader = DataLoader(Points(augment), batch_size=11, shuffle=True, **workers)
    small, large = (
        gradient(loader, estimator=eg.Contrastive(beta=beta)).grads["weight"]
        for beta in (1e-5, 1e-2)
    )
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-5)


def test_inner_and_outer_may_share_a_loader_and_its_workers():
    def judged(p, m, batch):
        return inner(p, m, batch)

    loader = DataLoader(Points(), batch_size=4, num_workers=1, persistent_workers=True)
    iter(loader)  # somebody else uses it, too
    own = loader._iterator
    plain = list(DataLoader(Points(), batch_size=4))
    found = []
    for batches in (loader, plain):
        problem = eg.Bilevel(inner, judged, inner_batches=batches, outer_batches=batches)
        found.append(eg.meta_gradient(problem, *start(), solver=SOLVER).grads["weight"])
    assert torch.equal(*found)
    assert loader._iterator is own
    loader._iterator = None


def test_samplers_that_are_told_the_pass_draw_anew_in_each():
    class Epochs(RandomSampler):
        epoch = 7

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
            return iter(order.tolist())

    sampler = Epochs(Points())
    free, _ = orders(DataLoader(Points(), batch_size=4, sampler=sampler))
    assert free[:6] != free[6:12]
    assert sampler.epoch == 7


class Endless(IterableDataset):
    """A dataset that does not know how long it is."""

    def __iter__(self):
        points = Points()
        return (points[i] for i in range(N))


def test_a_stream_that_does_not_know_its_length():
    loader = DataLoader(Endless(), batch_size=4)
    listed = list(loader)
    assert torch.equal(gradient(loader).grads["weight"], gradient(listed).grads["weight"])


def test_memory_does_not_grow_with_the_stream():
    most = []
    for count in (20, 200):
        batches = Counted(count)
        problem = eg.Bilevel(
            lambda p, m, b: (b.x @ p["w"] - m["c"]).square().mean(), outer, inner_batches=batches
        )
        meta = {"c": torch.zeros(5, dtype=torch.float64)}
        solver = eg.GradientDescent(lr=0.01, max_steps=count + 4)
        short = eg.GradientDescent(lr=0.01, max_steps=5)
        estimator = eg.Contrastive(beta=0.1, nudged_solver=short, momentum="reset")
        eg.meta_gradient(problem, start()[0], meta, solver=solver, estimator=estimator)
        most.append(batches.most)
        assert not batches.live
    assert most[0] == most[1] <= 5 + 2


def test_phases_longer_than_what_is_kept_see_the_same_batches():
    batches = Counted(3 * KEPT)
    drawn = DrawnBatches(batches, "inner_batches", seed=3)
    drawn.keep(10)
    first = [drawn.at(step).x for step in range(10, 2 * KEPT)]
    again = [drawn.at(step).x for step in range(10, 2 * KEPT)]
    assert all(map(torch.equal, first, again))
    assert batches.most <= KEPT + 2


def test_what_differs_when_it_is_begun_again_is_refused():
    generator = np.random.default_rng(0)
    loader = DataLoader(Points(generator.standard_normal), batch_size=4)
    with pytest.raises(eg.ProblemError, match="inner_batches gave another batch 0 when"):
        gradient(loader)


class Late:
    """Batches of which only the first is always the same."""

    def __init__(self):
        self.own = random.Random(0)

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        rest = list(range(4, N))
        self.own.shuffle(rest)
        return iter([list(range(4)), rest[:4], rest[4:]])


class Unsorted(Late):
    """One batch of all points, in an order that differs: its sum is the same."""

    def __len__(self):
        return 1

    def __iter__(self):
        rest = list(range(N))
        self.own.shuffle(rest)
        return iter([rest])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("late", [Late, Unsorted])
def test_batches_are_compared_each_and_sample_by_sample(late, workers):
    loader = DataLoader(Points(), batch_sampler=late(), num_workers=workers)
    with pytest.raises(eg.ProblemError, match=r"inner_batches gave another batch . when"):
        gradient(loader)


def test_workers_that_race_are_refused():
    loader = DataLoader(Points(), batch_size=4, num_workers=2, in_order=False)
    with pytest.raises(eg.ProblemError, match=r"its 2 workers have them ready \(in_order=False\)"):
        gradient(loader)


class Shards(IterableDataset):
    """A stream in a random order, of which every worker reads its share."""

    def __iter__(self):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(random.randrange(9999)))
        share = get_worker_info()
        first, stride = (0, 1) if share is None else (share.id, share.num_workers)
        return (Points()[i] for i in order.tolist()[first::stride])


SETUPS = {
    "shuffled": lambda **o: DataLoader(
        Points(), 4, shuffle=True, generator=torch.Generator().manual_seed(3), **o
    ),
    "drop_last": lambda **o: DataLoader(Points(), 4, shuffle=True, drop_last=True, **o),
    "batch_sampler": lambda **o: DataLoader(
        Points(), batch_sampler=BatchSampler(RandomSampler(Points()), 4, drop_last=False), **o
    ),
    "weighted": lambda **o: DataLoader(
        Points(), 4, sampler=WeightedRandomSampler(torch.ones(N).tolist(), N), **o
    ),
    "stream": lambda **o: DataLoader(Shards(), 4, **o),
}


@pytest.mark.parametrize(
    "workers",
    [{"num_workers": 1}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}],
    ids=["one", "two persistent"],
)
@pytest.mark.parametrize("setup", SETUPS)
def test_loaders_with_workers_show_all_phases_the_same(setup, workers):
    """Also beyond the batches that are kept, where a pass is begun again."""
    loader = SETUPS[setup](**workers)
    _, later = orders(loader)
    assert later[1:16] == later[16:31]  # the two nudged phases
    assert len({*later}) > 6
    drawn = DrawnBatches(loader, "inner_batches", seed=3)
    passes = [[b["i"].tolist() for b in map(drawn.at, range(2 * len(drawn)))] for _ in range(2)]
    drawn.close()
    assert passes[0] == passes[1]
    assert passes[0][: len(drawn)] != passes[0][len(drawn) :]
    assert loader._iterator is None


class Short:
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(DataLoader(Points(), batch_size=4))


class Empty:
    def __iter__(self):
        return iter(())


def test_wrong_lengths_are_named():
    with pytest.raises(eg.ProblemError, match=r"inner_batches says that it has 8 batches .*gave 6"):
        gradient(Short())
    with pytest.raises(eg.ProblemError, match="inner_batches has no batches"):
        gradient(Empty())


def test_solvers_and_estimators_that_need_one_loss_refuse_a_loader():
    loader = DataLoader(Points(), batch_size=4)
    with pytest.raises(eg.ConfigurationError, match="mini-batches"):
        gradient(loader, solver=eg.LBFGS())
    with pytest.raises(eg.ConfigurationError, match="6 mini-batches"):
        gradient(loader, estimator=eg.Contrastive(rtol=1e-2))


def test_the_velocity_of_a_step_is_that_of_its_batch():
    loader = DataLoader(Points(), batch_size=4)
    drawn, listed = (eg.Bilevel(inner, outer, inner_batches=b) for b in (loader, list(loader)))
    for step in (0, 5, 8):
        velocities = (problem.velocity(*start(), step=step)["w"] for problem in (drawn, listed))
        assert torch.equal(*velocities)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_come_to_the_device_of_params():
    loader = DataLoader(Points(), batch_size=4)
    params, meta = ({n: t.cuda() for n, t in d.items()} for d in start())
    problem = eg.Bilevel(inner, lambda p, m: p["w"].square().sum(), inner_batches=loader)
    result = eg.meta_gradient(problem, params, meta, solver=SOLVER)
    assert result.grads["weight"].is_cuda


def test_batches_of_any_structure_are_moved():
    Pair = namedtuple("Pair", "x y")
    there = torch.device("meta")
    x = torch.ones(2)
    batch = {"a": [x, "text"], "b": Pair(x, (x, None))}
    found = moved(batch, there)
    assert found["a"][0].is_meta
    assert found["a"][1] == "text"
    assert isinstance(found["b"], Pair)
    assert found["b"].y[0].is_meta
    assert not batch["a"][0].is_meta


@pytest.mark.parametrize(
    "extra",
    [torch.zeros(0), torch.zeros(0, 3), torch.eye(3).to_sparse(), torch.tensor(2.0), torch.ones(2)],
    ids=["empty", "empty rows", "sparse", "scalar", "vector"],
)
def test_whatever_tensors_are_in_a_batch_it_is_compared(extra):
    """A stream that is begun again for every phase."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()

    class Stream:
        def __iter__(self):
            yield from ((part, extra) for part in x.split(2))

    problem = eg.Bilevel(
        lambda p, m, batch: (batch[0] @ p["w"] - m["t"]).square().mean(),
        lambda p, m: p["w"].sum(),
        inner_batches=Stream(),
    )
    result = eg.meta_gradient(
        problem,
        {"w": torch.zeros(3).double()},
        {"t": torch.ones(()).double()},
        solver=eg.GradientDescent(lr=0.1, max_steps=5),
    )
    assert result.grads["t"].isfinite()
