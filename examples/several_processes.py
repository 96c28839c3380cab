"""Which labels are wrong? A weight for each example, learned by one process or by several.

    python examples/several_processes.py
    torchrun --nproc-per-node 2 examples/several_processes.py
    accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py

All three print the same. Each process computes with its share of the examples alone; what it has in
common with the others is the network and the weights, and equigrad keeps these in step.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.problems import Params

EXAMPLES, TRUSTED, FLIPPED, OUTER_STEPS = 256, 64, 0.4, 15


def made_up(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of the plane, inside of a circle or outside."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x.norm(dim=1) > 1.2).long()


def main() -> None:
    """Join the other processes, if there are any."""
    if "RANK" not in os.environ:
        learn(None)
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")  # by a launcher
    learn(dist.group.WORLD)
    gc.collect()  # whatever holds the group, so that its threads end before Python does
    dist.barrier()
    dist.destroy_process_group()


def learn(group: dist.ProcessGroup | None) -> None:
    """Learn the weights, and say how well they tell flipped labels from true ones."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    (x, y), (v, w) = made_up(EXAMPLES, seed=0), made_up(TRUSTED, seed=1)
    flipped = torch.rand(EXAMPLES, generator=torch.Generator().manual_seed(2)) < FLIPPED
    y = torch.where(flipped, 1 - y, y)
    mine = torch.arange(rank, EXAMPLES, size)  # equal shares
    xs, ys, vs, ws = (t.to(device) for t in (x[mine], y[mine], v[rank::size], w[rank::size]))
    mine = mine.to(device)

    torch.manual_seed(0)  # the same network everywhere
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)

    def inner_loss(params: Params, meta_params: Params) -> Tensor:
        losses = cross_entropy(functional_call(net, params, (xs,)), ys, reduction="none")
        weights = torch.sigmoid(meta_params["weights"])[mine]
        decay = sum(p.square().sum() for p in params.values())
        return (weights * losses).mean() + 1e-3 * decay

    def outer_loss(params: Params, meta_params: Params) -> Tensor:
        return cross_entropy(functional_call(net, params, (vs,)), ws)

    problem = eg.Bilevel(inner_loss, outer_loss, group=group)
    solver = eg.GradientDescent(lr=0.5, momentum=0.9, nesterov=True, max_steps=60)
    weights = nn.Parameter(torch.zeros(EXAMPLES, device=device))
    optimizer = torch.optim.Adam([weights], lr=0.3)
    start = {name: p.detach() for name, p in net.named_parameters()}
    for step in range(OUTER_STEPS):
        result = eg.meta_gradient(
            problem, start, {"weights": weights}, solver=solver, estimator=eg.Contrastive(beta=0.1)
        )
        result.assign()  # the same on every rank, so that the optimizers stay in step
        optimizer.step()
        if rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1:2d}: loss on trusted examples {result.outer_loss:.4f}")
    if rank == 0:
        bad, good = weights[flipped].detach(), weights[~flipped].detach()
        share = (bad[:, None] < good).float().mean().item()
        print(f"a flipped example weighs less than a true one in {share:.0%} of pairs")


if __name__ == "__main__":
    main()
