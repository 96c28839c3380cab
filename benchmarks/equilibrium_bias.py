"""How far equilibrium propagation is from the gradient, by scheme and nudging strength β.

A Hopfield network of 8-12-10-4 tanh neurons on random inputs, in float64, against the implicit
gradient by GMRES.

    python benchmarks/equilibrium_bias.py [--figure docs/equilibrium-bias.png]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import equigrad as eg
from equigrad.estimators import Estimator
from equigrad.experiments.runs.figures import COLORS, save

BETAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
SCHEMES: dict[str, dict[str, object]] = {
    "forward, 2 points": {"scheme": "forward"},
    "forward, 3 points": {"scheme": "forward", "points": 3},
    "symmetric, 2 points": {"scheme": "symmetric"},
    "symmetric, 4 points": {"scheme": "symmetric", "points": 4},
    "holomorphic, 4 points": {"scheme": "holomorphic", "points": 4},
    "holomorphic, 6 points": {"scheme": "holomorphic", "points": 6},
    "holomorphic, 10 points": {"scheme": "holomorphic", "points": 10},
}


class Network:
    """The network, its data, and the gradient that is to be had."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = eg.nn.Hopfield.fully_connected(
            [8, 12, 10, 4], activation="tanh", readout="cross-entropy"
        ).double()
        self.x, self.y = torch.randn(20, 8).double(), torch.arange(20) % 4
        self.exact = self.gradient(eg.GMRES(tol=1e-13))

    def gradient(self, estimator: Estimator) -> Tensor:
        """What an estimator says, of all parameters."""
        grads = eg.meta_gradient(
            self.net.problem(self.x, self.y),
            self.net.start(self.x),
            dict(self.net.named_parameters()),
            solver=eg.Anderson(tol=1e-12, max_steps=2000),
            estimator=estimator,
        ).grads
        return torch.cat([grad.flatten() for grad in grads.values()])

    def error(self, gradient: Tensor) -> float:
        """Relative to the gradient that is to be had."""
        return ((gradient - self.exact).norm() / self.exact.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = Network()
    found: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for name, options in SCHEMES.items():
        for beta in BETAS:
            estimator = eg.Contrastive(beta=beta, nudge="loss", **options)  # pyright: ignore
            found[name].append(network.error(network.gradient(estimator)))
    print(f"| β | {' | '.join(f'{beta:g}' for beta in BETAS)} |")
    print("| --- |" + " ---: |" * len(BETAS))
    for name, errors in found.items():
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |")
    if arguments.figure is not None:
        draw(arguments.figure, found)


def draw(path: Path, found: dict[str, list[float]]) -> None:
    """Error against β, a line a scheme."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    markers = {"forward": "o", "symmetric": "s", "holomorphic": "^"}
    for (name, errors), color in zip(found.items(), COLORS, strict=True):
        marker = markers[name.split(",")[0]]
        axes.loglog(BETAS, errors, marker=marker, markersize=4, color=color, label=name)
    axes.set(xlabel="nudging strength β", ylabel="relative error of the gradient")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


if __name__ == "__main__":
    main()
