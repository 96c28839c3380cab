"""Modules that belong to several processes are refused by name where they cannot be served."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import equigrad as eg


class Wrapper(nn.Module):
    """What Accelerate and Fabric make of a wrapped module."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


def wrapped_problem(net):
    params = {n: p.detach() for n, p in net.named_parameters()}
    x = torch.ones(4, 3)
    problem = eg.Bilevel(
        lambda p, m: (m["l"] * functional_call(net, p, (x,))).square().mean(),
        lambda p, m: functional_call(net, p, (x,)).mean(),
    )
    return eg.meta_gradient(
        problem, params, {"l": torch.ones(())}, solver=eg.GradientDescent(lr=0.1, max_steps=3)
    )


def refused(call, words):
    with pytest.raises(eg.ProblemError, match=words):
        call()


def one_process(rank, processes, port):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        net = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
        words = "group=torch.distributed.group.WORLD"
        refused(lambda: eg.nn.Functional(net), words)
        refused(lambda: eg.nn.ComplexSynapse(net, strength=0.1), words)
        refused(lambda: eg.FixedPoint(lambda p, m: net(p["h"]), lambda p, m: p["h"].sum()), words)
        assert wrapped_problem(Wrapper(net)).grads == wrapped_problem(net).grads
        alone = dist.new_group([rank], use_local_synchronization=True)
        own = nn.parallel.DistributedDataParallel(nn.Linear(3, 1), process_group=alone)
        assert wrapped_problem(own).grads.keys() == {"l"}
        assert wrapped_problem(net.module).grads.keys() == {"l"}
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_process, (2, port), nprocs=2)
