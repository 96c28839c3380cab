"""A deep equilibrium model on MNIST: one layer of 128 neurons that settles.

    python examples/deq_mnist.py

h* = tanh(0.9 W h* + U x + b) with ‖W‖ = 1, so that there is exactly one h*, and logits are read
from it. The backward pass settles the adjoint.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

import equigrad as eg
from equigrad.experiments.data import mnist
from equigrad.experiments.data.images import Images

UNITS, EPOCHS, BATCH, RATE = 128, 6, 100, 1e-3
VALIDATION = 5000  # of the training images, to watch


class Cell(nn.Module):
    """`tanh(0.9 W h + U x + b)`, a contraction by spectral normalisation of W."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = spectral_norm(nn.Linear(UNITS, UNITS, bias=False))
        self.encode = nn.Linear(784, UNITS)

    def start(self, x: Tensor) -> Tensor:
        """All at rest."""
        return x.new_zeros(len(x), UNITS)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """One step of all neurons."""
        return torch.tanh(0.9 * self.recurrent(h) + self.encode(x))


def tensors(images: Images) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] as rows, and labels."""
    return images.pixels.flatten(1).float() / 255, images.labels


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of images that the network names rightly."""
    net.eval()
    right = [net(a).argmax(-1) == b for a, b in zip(x.split(1000), labels.split(1000), strict=True)]
    net.train()
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, and say how well it does."""
    torch.manual_seed(0)
    x, labels = tensors(mnist.load())
    split = [len(x) - VALIDATION, VALIDATION]
    (x, held_out), (labels, held_out_labels) = x.split(split), labels.split(split)
    layer = eg.nn.EquilibriumLayer(
        Cell(),
        solver=eg.Anderson(tol=1e-2, max_steps=50),
        estimator=eg.Adjoint(solver=eg.Anderson(tol=1e-2, max_steps=50)),
    )
    net = nn.Sequential(layer, nn.Linear(UNITS, 10))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    began = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
        seconds = time.perf_counter() - began
        right = accuracy(net, held_out, held_out_labels)
        print(f"epoch {epoch}: {seconds:.0f} s, {layer.phase}; validation {right:.2%}", flush=True)
    print(f"test: {accuracy(net, *tensors(mnist.load(mnist.TEST))):.2%}")


if __name__ == "__main__":
    main()
