"""References that owe nothing to the estimators under test, and the command line in-process."""

from typing import Any

import torch
from torch import Tensor, nn

from equigrad.cli import main
from equigrad.evaluation import Evaluation
from equigrad.experiments.data.images import Images
from equigrad.nn import ComplexSynapse
from equigrad.problems import Bilevel, Params, Problem
from equigrad.solvers import Solver


def resolved_outer_loss(
    problem: Problem, params: Params, meta_params: Params, solver: Solver
) -> float:
    """The outer loss where the inner problem settles."""
    torch.manual_seed(0)
    with Evaluation(problem, params, meta_params) as evaluation:
        return evaluation.outer_loss(evaluation.settle(solver)).item()


def directional_derivative(
    problem: Problem,
    params: Params,
    meta_params: Params,
    solver: Solver,
    direction: Params,
    step: float,
) -> float:
    """Central difference of the re-solved outer loss along a direction in θ."""

    def at(sign: int) -> float:
        moved = {n: m.detach() + sign * step * direction[n] for n, m in meta_params.items()}
        return resolved_outer_loss(problem, params, moved, solver)

    return (at(1) - at(-1)) / (2 * step)


def along(grads: Params, direction: Params) -> float:
    return sum(float((grads[n].double() * direction[n].double()).sum()) for n in direction)


def random_direction(meta_params: Params, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(m.shape, generator=generator, dtype=m.dtype) for n, m in meta_params.items()
    }


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y against log x."""
    log_x, log_y = (torch.tensor(v, dtype=torch.float64).log() for v in (x, y))
    log_x, log_y = log_x - log_x.mean(), log_y - log_y.mean()
    return ((log_x * log_y).sum() / log_x.square().sum()).item()


def call_main(*words: object, capsys: Any) -> tuple[int, str]:
    """The command line in this process: exit code, and all it said in one line."""
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, " ".join((out + err).replace("│", " ").split())


def small_network(strength: float = 0.05) -> tuple[Bilevel, ComplexSynapse]:
    """A tanh network with a strength and a centre for every weight."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    v, w = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    synapse = ComplexSynapse(net, strength=strength, learn=("strength", "center"))
    problem = Bilevel(
        lambda p, m: (synapse(p, x) - y).square().mean(),
        lambda p, m: (synapse(p, v) - w).square().mean(),
        regularizer=synapse,
    )
    return problem, synapse


def made_up(count: int, channels: int, side: int, seed: int) -> Images:
    """Ten patterns, an image being one of them under noise."""
    patterns = torch.rand(10, channels, side, side, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.rand(count, channels, side, side, generator=generator)
    return Images((255 * (0.25 * patterns[labels] + 0.75 * noise)).to(torch.uint8), labels)
