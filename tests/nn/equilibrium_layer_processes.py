"""Run by test_equilibrium_layer.py: two processes under DistributedDataParallel, and one."""

import tempfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import equigrad as eg


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3).double()

    def forward(self, h, x):
        return torch.tanh(0.5 * self.linear(h) + x)


def network() -> nn.Module:
    solver, adjoint = eg.Anderson(tol=1e-12), eg.Adjoint(solver=eg.Anderson(tol=1e-12))
    layer = eg.nn.EquilibriumLayer(Cell(), solver=solver, estimator=adjoint)
    return nn.Sequential(nn.Linear(3, 3).double(), layer, nn.Linear(3, 1).double())


def learn(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def work(rank: int, folder: str, x: torch.Tensor) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/meet"
    distributed.init_process_group("gloo", rendezvous, world_size=2, rank=rank)
    learned = learn(DistributedDataParallel(network()), x[rank::2])
    if rank == 0:
        torch.save(learned, Path(folder) / "learned.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(1)
    x = torch.randn(8, 3).double()
    with tempfile.TemporaryDirectory() as folder:
        start_processes(work, (folder, x), nprocs=2, start_method="fork")
        together = torch.load(Path(folder) / "learned.pt")
    alone = learn(network(), x)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    print("same")
