"""The interface of task samplers, and their random generators."""

import hashlib
from typing import Protocol, runtime_checkable

import torch

from equigrad.tasks.batch import TaskBatch


@runtime_checkable
class TaskSampler(Protocol):
    """A source of batches of tasks.

    A sampler has no state: a draw depends only on the sampler's seed and on the number of the draw,
    so that a resumed run, or another process, sees the same tasks.
    """

    def sample(self, tasks: int, draw: int) -> TaskBatch:
        """Draw a batch.

        Args:
            tasks: number of tasks.
            draw: number of the outer step.
        """
        ...


def dice(seed: int, draw: int) -> torch.Generator:
    """A random generator for one draw of a sampler, independent of any other seed or draw.

    The pair is hashed, since with a sum such as seed + draw, draw 1 of seed 0 would equal draw 0 of
    seed 1. The generator is on the CPU, so that the tasks do not depend on the data's device.

    Example:
        >>> dice(0, 1).initial_seed() == dice(1, 0).initial_seed()
        False
    """
    digest = hashlib.sha256(f"{seed} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
