"""What two processes do in test_ranks.py: each check runs on both, and says what went wrong."""

import functools
import os
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import equigrad as eg
from equigrad.estimators import ESTIMATORS
from equigrad.nn import ComplexSynapse, Functional

CHECKS: dict[str, Callable[[], None]] = {}
RANKS, SECONDS = 2, 20.0


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def world(rank: int, size: int, store: str, names: list[str], results: Any) -> None:
    """One process; what it finds goes into `results[rank]`."""
    torch.set_num_threads(1)
    meet = f"file://{store}"
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", meet, rank=rank, world_size=size, timeout=timeout)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # others look for them
    for name in names:
        try:
            CHECKS[name]()
            results[rank, name] = "passed"
        except Exception:
            results[rank, name] = traceback.format_exc()
    dist.destroy_process_group()


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 3), (8, 2), (4, 3), (4, 2)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()


def plain() -> tuple[nn.Module, Any]:
    return network(), dist.group.WORLD


def wrapped() -> tuple[nn.Module, Any]:
    return DistributedDataParallel(network()), None


def alone() -> tuple[nn.Module, Any]:
    return network(), None


def accelerated() -> tuple[nn.Module, Any]:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(network()), None


def fabricated() -> tuple[nn.Module, Any]:
    from lightning_fabric import Fabric

    os.environ["TORCHELASTIC_RUN_ID"] = "these two processes"
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    net = fabric.setup(network())
    assert isinstance(net, nn.Module)
    return net, None


def sharded() -> tuple[nn.Module, Any]:
    return network(), None


ENGINES = {
    "plain": plain,
    "DDP": wrapped,
    "accelerate": accelerated,
    "fabric": fabricated,
    "DTensor": sharded,
}


def share(tensors: list[torch.Tensor], engine: Callable) -> list[torch.Tensor]:
    """The data of this rank."""
    if engine is sharded:
        return [distribute_tensor(t, mesh(), [Replicate()]) for t in tensors]
    return tensors if engine is alone else [t[dist.get_rank() :: RANKS] for t in tensors]


def laid_out(tensors: dict, engine: Callable) -> dict:
    """On shards, one tensor in two, where that is the engine."""
    if engine is not sharded:
        return tensors
    places = [Shard(0), Replicate()]
    return {
        n: distribute_tensor(t, mesh(), [places[i % 2 if t.ndim else 1]])
        for i, (n, t) in enumerate(tensors.items())
    }


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (RANKS,))


def problem(
    engine: Callable[[], tuple[nn.Module, Any]], **kwargs: Any
) -> tuple[eg.Bilevel, dict, dict]:
    """A penalised regression, whose data are spread over ranks but for `alone`."""
    net, group = engine()
    xs, ys, vs, ws = share(data(), engine)

    def inner(p, m):
        penalty = sum(w.square().sum() for w in p.values())
        return (functional_call(net, p, (xs,)) - ys).square().mean() + m["l"].exp() * penalty

    def outer(p, m):
        return (functional_call(net, p, (vs,)) - ws).square().mean() + 0.1 * m["l"].square()

    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    theta = {"l": torch.tensor(-1.0, dtype=torch.float64)}
    made = eg.Bilevel(inner, outer, group=group, **kwargs)
    return made, laid_out(params, engine), theta


def learned_start(engine) -> tuple[eg.Bilevel, dict, dict]:
    made, params, _ = problem(engine)
    bound = {"l": torch.tensor(-1.0, dtype=torch.float64)}
    start = {n: p.requires_grad_() for n, p in params.items()}
    inner, outer = made.inner_loss, made.outer_loss
    return (
        eg.Bilevel(lambda p, m: inner(p, bound), lambda p, m: outer(p, bound), group=made.group),
        start,
        start,
    )


def learned_center(engine) -> tuple[eg.Bilevel, dict, dict]:
    xs, ys, vs, ws = share(data(), engine)
    inside = network()
    group = None if engine in (alone, sharded) else dist.group.WORLD
    center = {n: torch.zeros_like(p) for n, p in inside.named_parameters()}
    synapse = ComplexSynapse(inside, 0.3, center, learn=("center",))
    made = eg.Bilevel(
        lambda p, m: (synapse(p, xs) - ys).square().mean(),
        lambda p, m: (synapse(p, vs) - ws).square().mean(),
        regularizer=synapse,
        group=group,
    )
    theta = synapse.meta_params()
    return made, laid_out(synapse.params(), engine), laid_out(theta, engine)


FEW = eg.GradientDescent(lr=0.2, momentum=0.5, nesterov=True, max_steps=6)
SETTINGS: dict[str, dict[str, Any]] = {
    "Contrastive": {"beta": 1e-2},
    "ConjugateGradient": {"max_iterations": 5},
    "EvolutionStrategies": {"pairs": 2},
    "Nystrom": {"rank": 5},
    "PhantomGradient": {"steps": 4},
    "NeumannSeries": {"terms": 4},
}


def result(
    estimator: eg.Estimator, engine, make=problem, solver: eg.Solver = FEW
) -> eg.MetaGradient:
    made, params, theta = make(engine)
    torch.manual_seed(7)
    found = eg.meta_gradient(made, params, theta, solver=solver, estimator=estimator)
    for given, had in ((theta, found.grads), (params, found.params)):
        for name, tensor in given.items():
            assert getattr(had[name], "placements", None) == getattr(tensor, "placements", None)
    return replace(found, grads=whole(found.grads), params=whole(found.params))


def whole(tensors: dict) -> dict:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def same(one: eg.MetaGradient, other: eg.MetaGradient, within: float = 1e-10) -> None:
    """Meta-gradients, settled params, outer loss, status and cost agree."""
    assert one.grads.keys() == other.grads.keys() or len(one.grads) == len(other.grads)
    for a, b in zip(one.grads.values(), other.grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within)
    for a, b in zip(one.params.values(), other.params.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within)
    assert abs(one.outer_loss - other.outer_loss) <= within * abs(other.outer_loss)
    assert one.gradient_evaluations == other.gradient_evaluations
    first = other.status.split(":")[0]
    assert one.status.split(":")[0] == first


def on_all(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def agree(one: eg.MetaGradient) -> None:
    """Every rank has the same bits."""
    mine = [*(g.tolist() for g in one.grads.values()), one.outer_loss, one.gradient_evaluations]
    assert all(theirs == mine for theirs in on_all(mine))


def meets(kind: type[eg.Estimator], engine: Callable, *, served: bool) -> None:
    """Two processes equal one; or both refuse, in words that say why."""
    estimator = kind(**SETTINGS.get(kind.__name__, {}))
    make = problem
    if kind.traits.needs_start:
        make = learned_start
    elif kind is eg.IMAML:
        make = learned_center
    if not served:
        words = "forward" if kind is eg.ForwardMode else "start that is learned"
        refused(lambda: result(estimator, engine, make), words)
        return
    both = result(estimator, engine, make)
    agree(both)
    # differences of gradients, divided by their distance
    within = 1e-9 if kind.__name__ == "FiniteDifferenceT1T2" else 1e-10
    same(both, by_itself(kind, make), within)


@functools.cache
def by_itself(kind: type[eg.Estimator], make: Callable) -> eg.MetaGradient:
    """What one process with all the data finds."""
    return result(kind(**SETTINGS.get(kind.__name__, {})), alone, make)


for _kind in ESTIMATORS:
    for _name, _engine in ENGINES.items():
        _served = _engine is not sharded or not (
            _kind.traits.needs_start or _kind is eg.ForwardMode
        )
        CHECKS[f"{_kind.__name__}-{_name}"] = functools.partial(
            meets, _kind, _engine, served=_served
        )


VARIANTS: dict[str, Callable[[Callable], eg.MetaGradient]] = {
    "symmetric": lambda e: result(eg.Contrastive(beta=1e-2, scheme="symmetric"), e),
    "force": lambda e: result(eg.Contrastive(beta=1e-2, nudge="force"), e),
    "unmatched": lambda e: result(eg.Contrastive(beta=1e-2, matched=False), e),
    "rtol": lambda e: result(
        eg.Contrastive(rtol=0.1), e, solver=eg.GradientDescent(lr=0.3, momentum=0.8, max_steps=40)
    ),
    "contrast products": lambda e: result(
        eg.ConjugateGradient(products="contrast", max_iterations=3), e
    ),
    "learned center": lambda e: result(eg.Contrastive(beta=1e-2), e, learned_center),
    "LBFGS": lambda e: result(eg.T1T2(), e, solver=eg.LBFGS(max_steps=8)),
    "AdamW": lambda e: result(
        eg.Contrastive(beta=1e-2),
        e,
        solver=eg.TorchOptimizer(
            optimizer=torch.optim.AdamW, options={"lr": 0.05, "weight_decay": 0.0}, max_steps=6
        ),
    ),
}


def variant(name: str, engine: Callable) -> None:
    both = VARIANTS[name](engine)
    agree(both)
    # products by contrast divide rounding errors by a distance of 1e-5
    same(both, VARIANTS[name](alone), 1e-8 if name in ("contrast products", "LBFGS") else 1e-10)


for _name in VARIANTS:
    CHECKS[f"{_name}-plain"] = functools.partial(variant, _name, engine=plain)
for _name in ("force", "AdamW", "LBFGS"):
    CHECKS[f"{_name}-DTensor"] = functools.partial(variant, _name, engine=sharded)


def compute(made: eg.Bilevel, params: dict, theta: dict, **kwargs: Any) -> eg.MetaGradient:
    estimator = kwargs.pop("estimator", eg.Contrastive(beta=1e-2))
    return eg.meta_gradient(
        made, params, theta, solver=kwargs.pop("solver", FEW), estimator=estimator, **kwargs
    )


def refused(call: Callable[[], Any], *words: str, kind: type[Exception] = eg.EquigradError) -> None:
    """Every rank raises, within seconds, and says these words; all are in step afterwards."""
    began = time.monotonic()
    try:
        call()
    except kind as error:
        said = str(error)
    else:
        said = "nothing"
    seconds = time.monotonic() - began
    for theirs, took in on_all((said, seconds)):
        assert all(word in theirs for word in words), theirs
        assert took < SECONDS / 2
    agree(compute(*problem(plain)))


def rank() -> int:
    return dist.get_rank()


@check
def other_params() -> None:
    made, params, theta = problem(plain)
    params["0.bias"] = params["0.bias"] + 1e-15 * rank()
    refused(lambda: compute(made, params, theta), "params '0.bias' differs", "rank 1")


@check
def other_meta_params() -> None:
    made, params, theta = problem(plain)
    refused(lambda: compute(made, params, {"l": theta["l"] - rank()}), "meta_params 'l' differs")


@check
def other_names_shapes_and_dtypes() -> None:
    made, params, theta = problem(plain)
    more = {**params, **({"more": torch.zeros(1)} if rank() else {})}
    refused(lambda: compute(made, more, theta), "params 'more'", "rank 1 alone")
    thetas = {"l": theta["l"].float() if rank() else theta["l"]}
    refused(lambda: compute(made, params, thetas), "float32", "float64")


@check
def other_constants() -> None:
    last = nn.Linear(2, 2).double().requires_grad_(False)
    nn.init.constant_(last.weight, 1.0 + rank())
    net = nn.Sequential(network(), last)
    params = {n: p.detach() for n, p in net.named_parameters() if p.requires_grad}
    x = share(data(), plain)[0]
    made = eg.Bilevel(
        lambda p, m: (m["l"] * functional_call(net, p, (x,))).square().mean(),
        lambda p, m: functional_call(net, p, (x,)).mean(),
        group=dist.group.WORLD,
    )
    theta = {"l": torch.ones((), dtype=torch.float64)}
    refused(lambda: compute(made, params, theta), "what modules hold", "1.weight")


@check
def other_numbers_of_batches() -> None:
    made, params, theta = problem(plain)
    inner, batches = made.inner_loss, [1.0] * (2 + rank())
    uneven = eg.Bilevel(
        lambda p, m, b: b * inner(p, m), made.outer_loss, inner_batches=batches, group=made.group
    )
    refused(lambda: compute(uneven, params, theta), "2 mini-batches of inner_batches", "has 3")


@check
def no_batches() -> None:
    made, _, _ = problem(plain)

    def construct() -> None:
        own = eg.Bilevel(
            made.inner_loss,
            made.outer_loss,
            inner_batches=[] if rank() else [1.0],
            group=dist.group.WORLD,
        )
        compute(own, *problem(plain)[1:])

    refused(construct, "at least one batch")


@check
def an_empty_share() -> None:
    made, params, theta = problem(plain)
    net, (xs, ys, *_) = network(), share(data(), plain)
    xs, ys = (t[:0] if rank() else t for t in (xs, ys))
    empty = eg.Bilevel(
        lambda p, m: m["l"].exp() * (functional_call(net, p, (xs,)) - ys).square().mean(),
        made.outer_loss,
        group=made.group,
    )
    refused(lambda: compute(empty, params, theta), "inner_loss is nan", "initial params")


@check
def nan_on_one_rank() -> None:
    made, params, theta = problem(plain)
    inner = made.inner_loss
    spoilt = eg.Bilevel(
        lambda p, m, b: b * inner(p, m),
        made.outer_loss,
        inner_batches=[1.0, torch.nan if rank() else 1.0],
        group=made.group,
    )
    refused(lambda: compute(spoilt, params, theta), "not finite on rank 1", kind=eg.SettlingError)
    params["0.bias"] = params["0.bias"] * (torch.nan if rank() else 1.0)
    refused(lambda: compute(made, params, theta), "params['0.bias'] holds NaN")


@check
def a_loss_that_fails_on_one_rank() -> None:
    made, params, theta = problem(plain)
    inner, calls = made.inner_loss, [0]

    def fails(p, m):
        calls[0] += rank()
        if calls[0] == 4:
            raise OSError("the disk of this share is gone")
        return inner(p, m)

    own = eg.Bilevel(fails, made.outer_loss, group=made.group)
    refused(lambda: compute(own, params, theta), "the disk of this share", kind=Exception)
    own = eg.Bilevel(
        lambda p, m: inner(p, {"l": m["left" if rank() else "l"]}),
        made.outer_loss,
        group=made.group,
    )
    refused(lambda: compute(own, params, theta), "inner_loss asked for 'left'")


@check
def other_settings() -> None:
    made, params, theta = problem(plain)
    solver = eg.GradientDescent(lr=0.1, max_steps=3 + rank())
    refused(lambda: compute(made, params, theta, solver=solver), "solver", "max_steps=4")
    estimator = eg.T1T2() if rank() else eg.Contrastive()
    refused(lambda: compute(made, params, theta, estimator=estimator), "estimator", "T1T2")
    compiled = eg.GradientDescent(lr=0.1, max_steps=30, compile=True)
    refused(lambda: compute(made, params, theta, solver=compiled), "compile=True")


@check
def settled_elsewhere() -> None:
    made, params, theta = problem(plain)
    settled = eg.settle(made, params, theta, solver=FEW)
    onward, anew = compute(made, params, theta, settled=settled), compute(made, params, theta)
    torch.testing.assert_close(onward.grads, anew.grads, rtol=1e-12, atol=0)
    given = settled if rank() else None
    refused(lambda: compute(made, params, theta, settled=given), "settled is False on rank 0")


@check
def a_module_that_is_wrapped_twice() -> None:
    net = DistributedDataParallel(DistributedDataParallel(network()))
    refused(lambda: problem(lambda: (net, None)), "wrapped twice", kind=eg.ProblemError)


@check
def frozen_params() -> None:
    net = network()
    net.get_parameter("0.bias").requires_grad_(False)
    net = DistributedDataParallel(net)
    made, _, theta = problem(lambda: (net, None))
    params = dict(net.named_parameters())
    refused(lambda: compute(made, params, theta), "module.0.bias", "frozen")


@check
def other_groups() -> None:
    mine = dist.new_group([rank()], use_local_synchronization=True)
    refused(lambda: problem(lambda: (DistributedDataParallel(network()), mine)), "different groups")
    by_itself = compute(*problem(lambda: (network(), mine)))
    assert len(set(on_all(by_itself.outer_loss))) == dist.get_world_size()
    refused(lambda: problem(lambda: (network(), "world")), "group must be")


@check
def a_map() -> None:
    net = DistributedDataParallel(nn.Linear(2, 2))
    refused(
        lambda: eg.FixedPoint(lambda p, m: {"h": net(p["h"])}, lambda p, m: p["h"].sum()),
        "DistributedDataParallel",
    )


@check
def shares_of_other_sizes() -> None:
    made, params, theta = problem(plain)
    inner, rows = made.inner_loss, torch.ones(4 - rank())
    own = eg.Bilevel(
        lambda p, m, b: b.mean() * inner(p, m),
        made.outer_loss,
        inner_batches=[rows],
        group=made.group,
    )
    assert "mini-batches of 4, 3 examples of inner_loss" in compute(own, params, theta).status


@check
def what_a_rank_does_not_use() -> None:
    """A loss that leaves out φ or θ on one rank, or is linear there: nobody waits for it."""
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    both = [
        (
            lambda p, m: m["a"].exp() * (p["w"] - target).square().sum() + p["b"].square().sum(),
            lambda p, m: p["w"].sum() + p["b"].sum(),
        ),
        (lambda p, m: p["w"].square().sum() + p["w"].sum(), lambda p, m: p["b"].square().sum()),
    ]
    params = {n: torch.zeros(2, dtype=torch.float64) for n in ("w", "b")}
    theta = {n: torch.zeros((), dtype=torch.float64) for n in ("a",)}
    means = [lambda p, m, i=i: (both[0][i](p, m) + both[1][i](p, m)) / 2 for i in (0, 1)]
    one, mine = eg.Bilevel(means[0], means[1]), both[rank()]
    spread = eg.Bilevel(mine[0], mine[1], group=dist.group.WORLD)
    for estimator in (eg.Contrastive(beta=1e-2), eg.ConjugateGradient(), eg.Unrolled()):
        together = compute(spread, params, theta, estimator=estimator)
        same(together, compute(one, params, theta, estimator=estimator))


@check
def random_numbers() -> None:
    """Seeds of the first rank count, and each rank's masks are its own; the same at every call."""
    net, (xs, ys, vs, ws) = nn.Sequential(network(), nn.Dropout(0.5)), share(data(), plain)
    seen: list[float] = []

    def inner(p, m):
        out = functional_call(net, p, (xs,))
        seen.append(out.sum().item())
        return (out - ys).square().mean() + m["l"].exp() * sum(w.square().sum() for w in p.values())

    def outer(p, m):
        return (functional_call(net, p, (vs,)) - ws).square().mean()

    params = {n: p.detach() for n, p in net.named_parameters()}
    made = eg.Bilevel(inner, outer, group=dist.group.WORLD)
    theta = {"l": torch.tensor(-1.0, dtype=torch.float64)}
    found = []
    for seed in (rank(), 10 * rank()):
        torch.manual_seed(seed)
        found.append(compute(made, params, theta))
    agree(found[0])
    same(found[0], found[1], 1e-15)
    assert len(set(on_all(seen[0]))) == dist.get_world_size()


@check
def lower_precision() -> None:
    """Under autocast, gradients are added up in float32."""
    grads = []
    for engine in (plain, wrapped, alone):
        net, group = engine()
        net, (xs, ys, vs, ws) = net.float(), [t.float() for t in share(data(), engine)]
        made = eg.Bilevel(
            lambda p, m, net=net, xs=xs, ys=ys: (
                (functional_call(net, p, (xs,)) - ys).square().mean()
                + m["l"].exp() * sum(w.square().sum() for w in p.values())
            ),
            lambda p, m, net=net, vs=vs, ws=ws: (
                (functional_call(net, p, (vs,)) - ws).square().mean()
            ),
            group=group,
        )
        params = {n: p.detach() for n, p in net.named_parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=engine is not alone):
            found = compute(
                made, params, {"l": torch.tensor(-1.0)}, estimator=eg.Contrastive(beta=0.5)
            )
        agree(found)
        grads.append(found.grads["l"])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0], grads[2], rtol=0.05, atol=0)


@check
def batch_statistics() -> None:
    """Running means of batch normalisation are averaged, and the module is as it was."""
    net, (xs, *_) = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), data()
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p)
    xs = share([xs], plain)[0]
    before = {n: b.clone() for n, b in net.named_buffers()}
    made = eg.Bilevel(
        lambda p, m: (m["l"] * functional_call(net, p, (xs,)) - xs[:, :2]).square().mean(),
        lambda p, m: functional_call(net, p, (xs,)).square().mean(),
        group=dist.group.WORLD,
    )
    params = {n: p.detach() for n, p in net.named_parameters()}
    found = compute(made, params, {"l": torch.ones((), dtype=torch.float64)})
    mine = {n: b.tolist() for n, b in found.buffers.items()}
    assert all(theirs == mine for theirs in on_all(mine))
    assert found.buffers["1.running_mean"].abs().sum() > 0
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


@check
def untouched() -> None:
    """A wrapped module trains as ever afterwards, and holds nothing new."""
    for unused in (False, True):
        net = DistributedDataParallel(network(), find_unused_parameters=unused)
        held = {n: id(v) for n, v in vars(net).items()}
        made, params, theta = problem(lambda net=net: (net, None))
        compute(made, params, theta, estimator=eg.ConjugateGradient(max_iterations=2))
        assert {n: id(v) for n, v in vars(net).items()} == held
        assert all(p.grad is None for p in net.parameters())
        xs, ys, *_ = share(data(), plain)
        for _ in range(2):
            net.zero_grad()
            (net(xs) - ys).square().mean().backward()
            compute(made, params, theta)
        whole, (xs, ys, *_) = network(), data()
        (whole(xs) - ys).square().mean().backward()
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    refused(lambda: Functional(net), "shared by 2 processes")


@check
def memory_is_flat() -> None:
    """A trajectory of 70 more steps would take 70 copies of 2 MB."""
    wide = {"w": torch.ones(250_000, dtype=torch.float64)}
    made = eg.Bilevel(
        lambda p, m: (p["w"] * m["s"]).square().mean(),
        lambda p, m: (p["w"] - 1).square().mean(),
        group=dist.group.WORLD,
    )
    peaks = []
    for steps in (10, 80):
        solver = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=steps)
        nudged = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=5)
        estimator = eg.Contrastive(nudged_solver=nudged)
        theta = {"s": torch.ones((), dtype=torch.float64)}
        compute(made, wide, theta, solver=solver, estimator=estimator)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] < peaks[0] + 20


@check
def shards() -> None:
    """What is sharded is refused where it cannot be served, and else goes on like anything."""
    made, params, theta = problem(sharded)
    settled = eg.settle(made, params, theta, solver=FEW)
    assert all(isinstance(p, DTensor) for p in settled.params.values())
    onward, anew = (compute(made, params, theta, settled=s) for s in (settled, None))
    torch.testing.assert_close(onward.grads, anew.grads, rtol=1e-12, atol=0)
    both = laid_out({"a": torch.ones(2)}, sharded)
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    fully_shard(net)
    refused(lambda: problem(lambda: (net, None)), "FSDP", "before it is wrapped")
    refused(lambda: eg.nn.Functional(net), "FSDP")
    grouped = eg.Bilevel(made.inner_loss, made.outer_loss, group=dist.group.WORLD)
    refused(lambda: compute(grouped, params, theta), "one loss on all processes")
    still = eg.FixedPoint(lambda p, m: {"a": 0.5 * p["a"] + m["b"]}, lambda p, m: p["a"].sum())
    one = {"b": torch.ones(2)}
    refused(lambda: eg.meta_gradient(still, both, one, solver=eg.Picard()), "full_tensor")


@check
def public_functions() -> None:
    """What looks at a problem without a meta-gradient sees all shares, too."""
    made, params, theta = problem(plain)
    one, _, _ = problem(alone)
    for name, velocity in made.velocity(params, theta, beta=0.1).items():
        expected = one.velocity(params, theta, beta=0.1)[name]
        torch.testing.assert_close(velocity, expected, rtol=1e-12, atol=1e-12)
    solver = eg.GradientDescent(lr=0.3, momentum=0.8, max_steps=20)
    estimator = eg.Contrastive(beta=1e-2)
    checks = [
        eg.check_meta_gradient(
            p, params, theta, solver=solver, estimator=estimator, directions=1, budget=60
        )
        for p in (made, one)
    ]
    assert abs(checks[0].relative_error - checks[1].relative_error) < 1e-6


@check
def out_of_step() -> None:
    """Evaluations of one loss on one rank and of another on the other are not added up."""
    made, params, theta = problem(plain)
    refused(
        lambda: made.evaluate("inner", params, theta, rank()), "others do not", kind=eg.RunError
    )


@check
def a_rank_that_dies() -> None:
    """The last check: the other process says so, and does not wait for long."""
    made, params, theta = problem(plain)
    inner, calls = made.inner_loss, [0]

    def dies(p, m):
        calls[0] += rank()
        if calls[0] == 4:
            os._exit(0)
        return inner(p, m)

    began, said = time.monotonic(), ""
    try:
        compute(eg.Bilevel(dies, made.outer_loss, group=made.group), params, theta)
    except eg.RunError as error:
        said = str(error)
    assert "rank 0 of 2 no longer reaches the others" in said
    assert time.monotonic() - began < SECONDS + 5
