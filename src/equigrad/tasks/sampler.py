"""Where tasks come from."""

import hashlib
from typing import Protocol, runtime_checkable

import torch

from equigrad.tasks.batch import TaskBatch


@runtime_checkable
class TaskSampler(Protocol):
    """Anything that draws batches of tasks.

    A sampler has no state: what it draws depends on its own seed and on the number of the draw. So
    a resumed run, or another process, sees the tasks that this one would have seen.
    """

    def sample(self, tasks: int, draw: int) -> TaskBatch:
        """Draw a batch.

        Args:
            tasks: how many.
            draw: the number of the outer step.
        """
        ...


def dice(seed: int, draw: int) -> torch.Generator:
    """A generator for one draw of a sampler, unrelated to that of any other seed or draw.

    The pair is hashed: of sums such as seed + draw, draw 1 of seed 0 would be draw 0 of seed 1. It
    is one of the CPU, so that the same tasks are drawn whatever device their data are on.

    Example:
        >>> dice(0, 1).initial_seed() == dice(1, 0).initial_seed()
        False
    """
    digest = hashlib.sha256(f"{seed} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
