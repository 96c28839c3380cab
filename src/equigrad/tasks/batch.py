"""A batch of tasks, each with a support set to learn from and a query set for the outer loss."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, ProblemError


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Several tasks, stacked along the first dimension.

    Attributes:
        support: inputs tasks × n × … and targets tasks × n × …, that each task learns from.
        query: likewise, with an n of its own, for the outer loss.

    Raises:
        ProblemError: numbers of tasks or of examples do not agree, or are 0.

    Example:
        >>> x, y = torch.zeros(5, 10, 1), torch.ones(5, 10, 1)
        >>> batch = TaskBatch(support=(x, y), query=(x, y))
        >>> len(batch), [len(chunk) for chunk in batch.chunks(2)]
        (5, [2, 2, 1])
        >>> batch[1:3].support[0].shape
        torch.Size([2, 10, 1])
    """

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]

    def __post_init__(self) -> None:
        for name, pair in (("support", self.support), ("query", self.query)):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ProblemError(f"{name} must be a pair (inputs, targets), got {_kind(pair)}")
        tensors = dict(
            zip(
                ("support inputs", "support targets", "query inputs", "query targets"),
                (*self.support, *self.query),
                strict=True,
            )
        )
        for name, tensor in tensors.items():
            if tensor.ndim < 2:
                raise ProblemError(
                    f"{name} must have the shape (tasks, n, …), got {tuple(tensor.shape)}"
                )
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ProblemError(
                f"all tensors of a batch must have the same number of tasks, got {listed}"
            )
        if not len(self):
            raise ProblemError("a batch must have at least one task, got 0")
        for name, (inputs, targets) in (("support", self.support), ("query", self.query)):
            if inputs.shape[1] != targets.shape[1] or not inputs.shape[1]:
                raise ProblemError(
                    f"the {name} set of a task must have at least one input, and a target for "
                    f"each, got {inputs.shape[1]} inputs and {targets.shape[1]} targets"
                )

    def __len__(self) -> int:
        return len(self.support[0])

    def __getitem__(self, tasks: slice) -> Self:
        if not isinstance(tasks, slice):
            raise TypeError(
                f"the tasks of a batch can only be chosen by a slice, batch[i:j], got {tasks!r}"
            )
        (a, b), (c, d) = self.support, self.query
        return type(self)((a[tasks], b[tasks]), (c[tasks], d[tasks]))

    def chunks(self, size: int | None) -> list[Self]:
        """Parts of at most `size` tasks, in order, whose lengths differ by at most one.

        Args:
            size: None for a single part.

        Raises:
            ConfigurationError: size < 1.
        """
        if size is not None and size < 1:
            raise ConfigurationError(
                f"a chunk must have at least one task, got {size}; use None to take all tasks at "
                f"once"
            )
        return self._parts(-(-len(self) // (size or len(self))))

    def share(self, rank: int, world_size: int) -> Self:
        """The tasks of one of several processes; shares differ by at most one task.

        Args:
            rank: rank of the process, from 0.
            world_size: number of processes.

        Raises:
            ConfigurationError: a process would have no task, or there is no such rank.
        """
        if not 0 <= rank < world_size:
            raise ConfigurationError(
                f"rank must be from 0 to {world_size - 1} for {world_size} processes, got {rank}"
            )
        if len(self) < world_size:
            raise ConfigurationError(
                f"{len(self)} tasks cannot be divided among {world_size} processes; use batches "
                f"of at least {world_size} tasks, or fewer processes"
            )
        return self._parts(world_size)[rank]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The batch on another device or in another precision; integer tensors keep their type."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        (a, b), (c, d) = self.support, self.query
        return type(self)((moved(a), moved(b)), (moved(c), moved(d)))

    def _parts(self, count: int) -> list[Self]:
        tensors = (*self.support, *self.query)
        parts = zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)
        return [type(self)((a, b), (c, d)) for a, b, c, d in parts]


def _kind(pair: object) -> str:
    return f"{len(pair)} of them" if isinstance(pair, tuple | list) else type(pair).__name__
