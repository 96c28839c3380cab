"""What two processes have to leave alone, and what they share beside gradients."""

import resource
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from rank_toolbox import (
    FEW,
    agree,
    alone,
    check,
    compute,
    data,
    fsdp,
    fully_sharded,
    laid_out,
    mesh,
    network,
    on_all,
    plain,
    problem,
    rank,
    refused,
    same,
    sharded,
    share,
    whole,
    wrapped,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import (
    DTensor,
)
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import equigrad as eg
from equigrad.nn import Functional
from equigrad.training import Checkpoint, learn


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
    for steps in (10, 10, 80):  # the first one finds memory for its tools
        solver = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=steps)
        nudged = eg.GradientDescent(lr=0.1, momentum=0.9, max_steps=5)
        estimator = eg.Contrastive(nudged_solver=nudged)
        theta = {"s": torch.ones((), dtype=torch.float64)}
        compute(made, wide, theta, solver=solver, estimator=estimator)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[2] < peaks[1] + 20, peaks


@check
def shards() -> None:
    """What is sharded is refused where it cannot be served, and else goes on like anything."""
    made, params, theta = problem(sharded)
    settled = eg.settle(made, params, theta, solver=FEW)
    assert all(isinstance(p, DTensor) for p in settled.params.values())
    onward, anew = (compute(made, params, theta, settled=s) for s in (settled, None))
    torch.testing.assert_close(onward.grads, anew.grads, rtol=1e-12, atol=0)
    both = laid_out({"a": torch.ones(2)}, sharded)
    grouped = eg.Bilevel(made.inner_loss, made.outer_loss, group=dist.group.WORLD)
    refused(lambda: compute(grouped, params, theta), "share one loss over all processes")
    still = eg.FixedPoint(lambda p, m: {"a": 0.5 * p["a"] + m["b"]}, lambda p, m: p["a"].sum())
    one = {"b": torch.ones(2)}
    refused(lambda: eg.meta_gradient(still, both, one, solver=eg.Picard()), "full_tensor")


def forward_and_backward(net: nn.Module) -> dict:
    """Gradients as the module's own engine makes them."""
    xs, ys, *_ = share(data(), plain)
    net.zero_grad()
    (net(xs) - ys).square().mean().backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    return whole(grads)


@check
def sharded_modules_are_untouched() -> None:
    """A module of fully_shard trains as ever and holds its shards, also where a loss failed."""
    net, _ = fully_sharded()
    expected = forward_and_backward(fully_sharded()[0])
    for fails in (False, True):
        held = {n: id(p) for n, p in net.named_parameters()}
        hooks = [id(m._forward_hooks) for m in net.modules()]
        made, params, theta = problem(lambda: (net, None))
        if fails:
            inner, calls = made.inner_loss, [0]

            def spoilt(p, m, inner=inner, calls=calls):
                calls[0] += 1
                if calls[0] == 5:
                    raise OSError("gone")
                return inner(p, m)

            own = eg.Bilevel(spoilt, made.outer_loss)
            refused(lambda own=own, p=params, m=theta: compute(own, p, m), "gone", kind=OSError)
        else:
            compute(made, params, theta, estimator=eg.ConjugateGradient(max_iterations=2))
        assert {n: id(p) for n, p in net.named_parameters()} == held
        assert [id(m._forward_hooks) for m in net.modules()] == hooks
        assert all(isinstance(p, DTensor) for p in net.parameters())
        torch.testing.assert_close(forward_and_backward(net), expected, rtol=0, atol=0)


@check
def frozen_shards() -> None:
    """What is frozen, or is no part of φ, is whole while the losses compute (adapters)."""
    grads = []
    for engine in (fully_sharded, plain, alone):
        torch.manual_seed(1)
        last = nn.Linear(2, 2).double().requires_grad_(False)
        net, group = engine()
        net = nn.Sequential(net, fsdp(last) if engine is fully_sharded else last)
        xs, ys, vs, ws = share(data(), engine)
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
        params = {n: p.detach() for n, p in net.named_parameters() if n == "0.0.weight"}
        found = compute(made, params, {"l": torch.tensor(-1.0, dtype=torch.float64)})
        grads.append(found.grads["l"])
        if engine is fully_sharded:
            frozen = {**params, "1.bias": last.bias}
            refused(
                lambda made=made, p=frozen: compute(made, p, {"l": torch.tensor(-1.0).double()}),
                "1.bias",
                "frozen",
            )
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-10, atol=0)
    torch.testing.assert_close(grads[1], grads[2], rtol=1e-10, atol=0)


class Tied(nn.Module):
    """The same matrix goes in and comes out, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(3, 3, bias=False).double() for _ in range(2))
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


@check
def tied_shards_and_shards_of_one_process() -> None:
    """Tied weights stay one tensor; one process alone is served by the same script."""
    grads = []
    # every rank has to make all groups
    own = [DeviceMesh("cpu", [r]) for r in range(dist.get_world_size())][rank()]
    for where in (None, mesh(), own):
        net = Tied() if where is None else fsdp(Tied(), mesh=where)
        xs, _, vs, _ = share(data(), fully_sharded if where is mesh() else alone)
        made = eg.Bilevel(
            lambda p, m, net=net, xs=xs: (
                (functional_call(net, p, (xs,)) - xs).square().mean()
                + m["l"].exp() * sum(w.square().sum() for w in p.values())
            ),
            lambda p, m, net=net, vs=vs: (functional_call(net, p, (vs,)) - vs).square().mean(),
        )
        params = {n: p.detach() for n, p in net.named_parameters()}
        grads.append(
            compute(made, params, {"l": torch.tensor(-1.0, dtype=torch.float64)}).grads["l"]
        )
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-10, atol=0)


@check
def shards_that_are_not_served() -> None:
    """By name: other precision, other meshes, copies, maps, compiled steps, mixtures."""
    made, params, theta = problem(fully_sharded)
    compiled = eg.GradientDescent(lr=0.1, max_steps=30, compile=True)
    refused(lambda: compute(made, params, theta, solver=compiled), "compile=True")
    net, _ = fully_sharded()
    refused(lambda: eg.nn.Functional(net), "FSDP", "before it is wrapped")
    refused(
        lambda: eg.FixedPoint(lambda p, m: {"h": net(p["h"])}, lambda p, m: p["h"].sum()), "FSDP"
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    low = fsdp(network(), mp_policy=policy)
    refused(lambda: problem(lambda: (low, None)), "without mp_policy", "torch.autocast")
    cpu = fsdp(network(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    refused(lambda: problem(lambda: (cpu, None)), "without offload_policy")
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    both = fsdp(network(), mesh=grid)
    refused(lambda: problem(lambda: (both, None)), "mesh of 2 dimensions")


@check
def resume_across_ranks() -> None:
    """A loop that was stopped goes on with the same bits on all ranks, or says who is elsewhere."""
    folder = Path(on_all(tempfile.mkdtemp())[0])

    def learned(steps: int, path: Path | None, resume: bool = False) -> float:
        made, params, theta = problem(plain)
        theta = {n: t.requires_grad_() for n, t in theta.items()}
        learn(
            made,
            params,
            theta,
            solver=FEW,
            estimator=eg.Contrastive(beta=1e-2),
            optimizer=torch.optim.Adam(theta.values(), lr=0.1),
            steps=steps,
            callbacks=[] if path is None else [Checkpoint(path, resume=resume)],
        )
        return theta["l"].item()

    whole = learned(4, None)
    learned(2, folder / f"{rank()}.pt")
    resumed = learned(4, folder / f"{rank()}.pt", resume=True)
    assert on_all(resumed) == on_all(whole)
    learned(2, folder / "one.pt" if rank() == 0 else None)
    alone_there = folder / ("one.pt" if rank() == 0 else "none.pt")
    refused(lambda: learned(4, alone_there, resume=True), "meta_params 'l' differs")


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


class Ridge(nn.Module):
    """Features are learned so that a ridge regression on them predicts well."""

    def __init__(self) -> None:
        super().__init__()
        self.features = network()
        self.log_strength = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        fit = eg.argmin(
            lambda p, m: (
                (m["f"] @ p["w"] - y).square().mean() + m["s"].exp() * p["w"].square().sum()
            ),
            {"w": x.new_zeros(2, 2)},
            {"f": self.features(x), "s": self.log_strength},
            solver=eg.LBFGS(tol=1e-10),
        )
        return (self.features(x) @ fit["w"] - y.roll(1, 0)).square().mean()


@check
def an_argmin_in_a_network_that_is_wrapped() -> None:
    """Each rank settles on its own data; DDP averages what comes back, as of any layer."""
    x, y, _, _ = data()
    halves = [slice(0, 4), slice(4, 8)]
    torch.manual_seed(0)
    one = Ridge()
    torch.stack([one(x[half], y[half]) for half in halves]).mean().backward()
    torch.manual_seed(0)
    spread = DistributedDataParallel(Ridge())
    mine = halves[rank()]
    spread(x[mine], y[mine]).backward()
    for p, q in zip(one.parameters(), spread.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
