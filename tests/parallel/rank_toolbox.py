"""The engines, problems and comparisons that the checks of two processes share."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace
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
from equigrad.nn import ComplexSynapse

CHECKS: dict[str, Callable[[], None]] = {}
RANKS, SECONDS = 2, 20.0


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 3), (8, 2), (4, 3), (4, 2)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def network() -> nn.Sequential:
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


def fsdp(net: nn.Module, **settings: Any) -> nn.Module:
    fully_shard(net, **({"mesh": mesh()} | settings))
    return net


def fully_sharded() -> tuple[nn.Module, Any]:
    net = network()
    fsdp(net[0])
    return fsdp(net), None


ENGINES = {
    "plain": plain,
    "DDP": wrapped,
    "accelerate": accelerated,
    "fabric": fabricated,
    "DTensor": sharded,
    "FSDP2": fully_sharded,
}


def share(tensors: list[torch.Tensor], engine: Callable) -> list[torch.Tensor]:
    """The data of this rank."""
    if engine is sharded:
        return [distribute_tensor(t, mesh(), [Replicate()]) for t in tensors]
    return tensors if engine is alone else [t[dist.get_rank() :: RANKS] for t in tensors]


def laid_out(tensors: dict, engine: Callable) -> dict:
    """On shards, one tensor in two, where that is the engine."""
    if engine not in (sharded, fully_sharded):
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
    return made, laid_out(params, engine) if engine is sharded else params, theta


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
    group = None if engine in (alone, sharded, fully_sharded) else dist.group.WORLD
    center = {n: torch.zeros_like(p) for n, p in inside.named_parameters()}
    synapse = ComplexSynapse(inside, 0.3, center, learn=("center",))
    net = fully_sharded()[0] if engine is fully_sharded else None

    def call(p, x):
        return synapse(p, x) if net is None else functional_call(net, p, (x,))

    made = eg.Bilevel(
        lambda p, m: (call(p, xs) - ys).square().mean(),
        lambda p, m: (call(p, vs) - ws).square().mean(),
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
