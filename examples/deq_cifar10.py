"""A convolutional deep equilibrium model on CIFAR-10: a residual block that settles.

    python examples/deq_cifar10.py

The image is encoded once. A `ResidualCell` is fed with this code at every step until it rests, and
logits are read from the pooled h*. `equigrad run equilibrium --setting cifar-implicit` trains
a similar network by every method that serves it.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import equigrad as eg
from equigrad.experiments.data import cifar10
from equigrad.experiments.data.images import Images

CHANNELS, GROUPS = 32, 8
TRAINING, EPOCHS, BATCH, RATE = 10_000, 2, 50, 1e-3  # a small budget: a fifth of the images


def tensors(images: Images) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1], and labels."""
    return images.pixels.float() / 127.5 - 1, images.labels


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of images that the network names rightly."""
    net.eval()
    right = [net(a).argmax(-1) == b for a, b in zip(x.split(200), labels.split(200), strict=True)]
    net.train()
    return torch.cat(right).float().mean().item()


def main() -> None:
    """Train, and say how well it does."""
    torch.manual_seed(0)
    x, labels = (t[:TRAINING] for t in tensors(cifar10.load()))
    test_x, test_labels = tensors(cifar10.load(cifar10.TEST))
    layer = eg.nn.EquilibriumLayer(
        eg.nn.ResidualCell(CHANNELS, groups=GROUPS),
        solver=eg.Anderson(tol=1.0, max_steps=15),  # of a norm of about 90
        estimator=eg.PhantomGradient(steps=3, damping=0.8),
        unsettled="ignore",  # looked at in what is printed
    )
    net = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1),
        nn.GroupNorm(GROUPS, CHANNELS),
        layer,
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * CHANNELS, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    began = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), labels[batch]).backward()
            optimizer.step()
        print(f"epoch {epoch}: {time.perf_counter() - began:.0f} s, {layer.phase}", flush=True)
    print(f"test: {accuracy(net, test_x, test_labels):.2%}")


if __name__ == "__main__":
    main()
