"""Sinusoid regression tasks (Finn, Abbeel, Levine 2017, section 5.1)."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from equigrad.fields import Checked, Count, Rule, expect
from equigrad.tasks.batch import TaskBatch
from equigrad.tasks.sampler import dice

Range = Annotated[tuple[float, float], Rule(", the least first", lambda r: r[0] <= r[1])]


@dataclass(frozen=True, kw_only=True)
class Sinusoids(Checked):
    """A sampler of regression tasks, each with a few points of a curve y = A sin(x - p).

    Amplitude A, phase p and inputs x are uniform in their ranges.

    Attributes:
        shots: number of support points.
        queries: number of query points.
        amplitude: smallest and largest A.
        phase: smallest and largest p.
        inputs: smallest and largest x.
        seed: seed of the tasks; use different ones for meta-training, validation and test.

    Raises:
        ConfigurationError: fewer than one point, or an invalid range.

    Example:
        >>> batch = Sinusoids(shots=5).sample(tasks=3, draw=0)
        >>> batch.support[0].shape, batch.query[1].shape
        (torch.Size([3, 5, 1]), torch.Size([3, 10, 1]))
    """

    shots: Count = 10
    queries: Count = 10
    amplitude: Range = (0.1, 5.0)
    phase: Range = (0.0, math.pi)
    inputs: Range = (-5.0, 5.0)
    seed: int = 0

    def sample(self, tasks: int, draw: int) -> TaskBatch:
        """Draw a batch with inputs and targets of shape tasks × points × 1.

        Raises:
            ConfigurationError: tasks < 1.
        """
        expect(Count, tasks=tasks)
        generator = dice(self.seed, draw)

        def uniform(ends: tuple[float, float], points: int) -> Tensor:
            drawn = torch.rand(tasks, points, 1, generator=generator)
            return ends[0] + (ends[1] - ends[0]) * drawn

        amplitude, phase = uniform(self.amplitude, 1), uniform(self.phase, 1)
        x = uniform(self.inputs, self.shots + self.queries)
        y = amplitude * (x - phase).sin()
        k = self.shots
        return TaskBatch(support=(x[:, :k], y[:, :k]), query=(x[:, k:], y[:, k:]))


def curves(batch: TaskBatch, inputs: Tensor) -> Tensor:
    """The sinusoid of every task, evaluated at other inputs.

    A sin(x - p) = a sin x + b cos x is linear in a and b, so that a task's points determine it.

    Args:
        batch: tasks of sinusoids, with at least two points each.
        inputs: points.

    Returns:
        Tasks × points.

    Example:
        >>> batch = Sinusoids(shots=2).sample(tasks=1, draw=0)
        >>> x, y = batch.query
        >>> torch.allclose(curves(batch, x.flatten()), y[..., 0], atol=1e-3)
        True
    """
    x, y = (torch.cat(pair, 1).double() for pair in zip(batch.support, batch.query, strict=True))

    def waves(x: Tensor) -> Tensor:
        return torch.stack([x.sin(), x.cos()], -1)

    weights = torch.linalg.lstsq(waves(x[..., 0]), y).solution
    return (waves(inputs.double()) @ weights)[..., 0].to(inputs.dtype)
