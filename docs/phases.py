"""Draws phases.png: a free phase and two nudged ones of a learner with two weights."""

from pathlib import Path

import matplotlib
import torch

import equigrad as eg

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVATURE = torch.tensor([[1.0, 0.3], [0.3, 0.8]])
GOAL = torch.tensor([1.0, 0.9])
BETA = 0.4


def main() -> None:
    """Settle three times, and draw the ways."""

    def inner(params, meta):
        away = params["w"] - meta["target"]
        return 0.5 * away @ CURVATURE @ away

    def outer(params, meta):
        return 0.5 * (params["w"] - GOAL).square().sum()

    def way(start: torch.Tensor, steps: int, nudge: torch.Tensor) -> torch.Tensor:
        problem = eg.Bilevel(lambda p, m: inner(p, m) + nudge @ p["w"], outer)
        places = [start]
        for _ in range(steps):
            place = {"w": places[-1]}
            solver = eg.GradientDescent(lr=0.25, max_steps=1)
            places.append(eg.settle(problem, place, meta, solver=solver).params["w"])
        return torch.stack(places)

    meta = {"target": torch.zeros(2)}
    free = way(torch.tensor([-1.7, 0.9]), 60, torch.zeros(2))
    force = BETA * (free[-1] - GOAL)  # β ∂L_out/∂w at the free solution
    ways = {
        "free phase: minimise L_in": (free, "#0072B2", "o"),
        "nudged phase: minimise L_in + β f·w": (way(free[-1], 40, force), "#D55E00", "^"),
        "nudged phase: minimise L_in − β f·w": (way(free[-1], 40, -force), "#009E73", "v"),
    }
    side = torch.linspace(-2, 1.6, 121)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    height = 0.5 * (grid @ CURVATURE * grid).sum(-1)
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.contour(side, side, height.sqrt(), levels=12, colors="0.8", linewidths=0.8)
    for label, (places, colour, marker) in ways.items():
        axes.plot(*places.T, marker=marker, ms=4, lw=1.2, color=colour, label=label)
    axes.plot(*GOAL, "*", ms=15, color="black", label="where L_out is least", ls="none")
    axes.set(xlabel="weight 1", ylabel="weight 2", xlim=(-2, 1.6), ylim=(-1.0, 1.4))
    axes.set_title("Train, train again slightly nudged, and contrast", loc="left", fontsize=11)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(Path(__file__).parent / "phases.png", dpi=160)


if __name__ == "__main__":
    main()
