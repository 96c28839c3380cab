"""What goes wrong with several processes: each of them says what."""

import os
import signal
import time

import torch
import torch.distributed as dist
from rank_toolbox import (
    FEW,
    SECONDS,
    check,
    compute,
    data,
    network,
    on_all,
    plain,
    problem,
    rank,
    refused,
    share,
)
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import equigrad as eg


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
    refused(
        lambda: compute(made, more, theta), "params 'more'", "exists on rank 1, but not on rank 0"
    )
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
    refused(lambda: compute(made, params, theta), "module tensor", "1.weight")


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
    refused(lambda: compute(own, params, theta), "inner_loss uses the name 'left'")


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
def out_of_step() -> None:
    """Evaluations of one loss on one rank and of another on the other are not added up."""
    made, params, theta = problem(plain)
    refused(
        lambda: made.evaluate("inner", params, theta, rank()),
        "other ranks do not",
        kind=eg.RunError,
    )


@check
def a_rank_that_dies() -> None:
    """The last check: the other process says so, and does not wait for long."""
    made, params, theta = problem(plain)
    inner, calls = made.inner_loss, [0]

    def dies(p, m):
        calls[0] += rank()
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(p, m)

    began, said = time.monotonic(), ""
    try:
        compute(eg.Bilevel(dies, made.outer_loss, group=made.group), params, theta)
    except eg.RunError as error:
        said = str(error)
    assert "rank 0 of 2 cannot reach the other ranks" in said
    assert time.monotonic() - began < SECONDS + 5
