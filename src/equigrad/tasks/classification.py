"""N-way K-shot classification tasks."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.fields import Checked, Count, CountFrom2, expect
from equigrad.tasks.batch import TaskBatch
from equigrad.tasks.classes import ClassCollection
from equigrad.tasks.sampler import dice

TURNS = 4
"""Number of rotations of a square image: by 0°, 90°, 180° and 270°."""


@dataclass(frozen=True, eq=False)
class NWayKShot(Checked):
    """A sampler of tasks with `way` random classes and `shot` support examples of each.

    The classes of a task have the labels 0 … way-1, in random order, and its examples are sorted by
    label. No example is used twice in a task.

    Attributes:
        images_by_class: one tensor for each class, n × …; or classes × n × …. Error messages use
            the names of a `ClassCollection`.
        way: number of classes of a task.
        shot: number of support examples of each class.
        queries: number of query examples of each class.
        rotations: whether every class counts as four, rotated counter-clockwise by 0°, 90°, 180°
            and 270° (Santoro et al. 2016); class c rotated k times has the index c + k · (number of
            given classes). The rotated images are stored, which takes four times the memory.
        seed: seed of the tasks.

    Raises:
        ConfigurationError: there are fewer than two classes in a task, or more than exist; or no
            support or query examples.
        DataError: a class has fewer than shot + queries examples, examples differ in shape or
            dtype, or images to be rotated are not square.

    Example:
        >>> sampler = NWayKShot(torch.rand(8, 20, 1, 28, 28), rotations=True)
        >>> sampler.classes
        32
        >>> batch = sampler.sample(tasks=2, draw=0)
        >>> batch.support[0].shape, batch.support[1][0]
        (torch.Size([2, 5, 1, 28, 28]), tensor([0, 1, 2, 3, 4]))
        >>> batch.query[0].shape
        torch.Size([2, 75, 1, 28, 28])
    """

    images_by_class: Sequence[Tensor] | Tensor = field(repr=False)
    _: KW_ONLY
    way: CountFrom2 = 5
    shot: Count = 1
    queries: Count = 15
    rotations: bool = False
    seed: int = 0

    @classmethod
    def from_labels(cls, inputs: Tensor, labels: Tensor, **knobs: Any) -> Self:
        """A sampler from examples n × … and n whole-number labels; takes all further arguments.

        Raises:
            DataError: the numbers of labels and inputs differ, or as for the class itself.

        Example:
            >>> inputs, labels = torch.rand(60, 3), torch.arange(60) % 3
            >>> NWayKShot.from_labels(inputs, labels, way=2).classes
            3
        """
        return cls(ClassCollection.from_labels(inputs, labels), **knobs)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.images_by_class):
            self._check_shapes()
        if self.classes < self.way:
            turned = f", {TURNS} from each of {len(self.images_by_class)}" if self.rotations else ""
            raise ConfigurationError(
                f"a {self.way}-way task needs {self.way} classes, but there are "
                f"{self.classes}{turned}; use a smaller way, or more classes"
            )
        needed = self.shot + self.queries
        counts = enumerate(map(len, self.images_by_class))
        if few := [f"{self._name(c)} has {n}" for c, n in counts if n < needed]:
            more = f", and {len(few) - 10} more" if len(few) > 10 else ""
            raise DataError(
                f"{self.shot} shots and {self.queries} queries need {needed} examples of every "
                f"class, but {', '.join(few[:10])}{more}; add examples, leave the class out, or "
                f"use fewer shots or queries"
            )

    @property
    def classes(self) -> int:
        """The number of classes that tasks are drawn from, including rotated ones."""
        return len(self.images_by_class) * (TURNS if self.rotations else 1)

    def sample(self, tasks: int, draw: int) -> TaskBatch:
        """Draw a batch: inputs tasks × way·shot × … and tasks × way·queries × …, with labels.

        Raises:
            ConfigurationError: tasks < 1.
        """
        expect(Count, tasks=tasks)
        generator = dice(self.seed, draw)
        examples, starts, counts = self._pool
        classes = torch.rand(tasks, self.classes, generator=generator).topk(self.way).indices
        # the largest random numbers are a draw without replacement; missing examples get -1
        most = int(counts.max())
        ranks = torch.rand(tasks, self.way, most, generator=generator)
        ranks = ranks.where(torch.arange(most) < counts[classes][..., None], -1.0)
        drawn = ranks.topk(self.shot + self.queries).indices + starts[classes][..., None]

        def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
            inputs = examples.index_select(0, rows.flatten().to(examples.device))
            labels = torch.arange(self.way, device=examples.device).repeat_interleave(rows.shape[2])
            return inputs.reshape(tasks, -1, *examples.shape[1:]), labels.repeat(tasks, 1)

        return TaskBatch(support=pair(drawn[..., : self.shot]), query=pair(drawn[..., self.shot :]))

    @cached_property
    def _pool(self) -> tuple[Tensor, Tensor, Tensor]:
        """All examples in a row, with the start and the number of those of each class."""
        given = self.images_by_class
        examples = given.flatten(0, 1) if isinstance(given, Tensor) else torch.cat(list(given))
        counts = torch.tensor([len(images) for images in given])
        if self.rotations:
            examples = torch.cat([examples.rot90(turns, (-2, -1)) for turns in range(TURNS)])
            counts = counts.repeat(TURNS)
        return examples, counts.cumsum(0) - counts, counts

    def _check_shapes(self) -> None:
        first = self.images_by_class[0]
        for c, images in enumerate(self.images_by_class):
            if images.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"all examples must have the same shape, but those of {self._name(0)} have "
                    f"{tuple(first.shape[1:])} and those of {self._name(c)} have "
                    f"{tuple(images.shape[1:])}; resize them"
                )
            if images.dtype != first.dtype:
                raise DataError(
                    f"all examples must have the same dtype, but those of {self._name(0)} are "
                    f"{first.dtype} and those of {self._name(c)} are {images.dtype}; convert them"
                )
        shape = first.shape[1:]
        if self.rotations and (len(shape) < 2 or shape[-1] != shape[-2]):
            raise DataError(
                f"only square images can be rotated, got examples of shape {tuple(shape)}; make "
                f"them square, or use rotations=False"
            )

    def _name(self, c: int) -> str:
        given = self.images_by_class
        return f"class {given.names[c]!r}" if isinstance(given, ClassCollection) else f"class {c}"
