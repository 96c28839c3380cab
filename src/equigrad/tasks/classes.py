"""Collections of labelled examples, one tensor for each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, overload

import torch
from torch import Tensor

from equigrad.errors import DataError


@dataclass(frozen=True, eq=False)
class ClassCollection(Sequence[Tensor]):
    """A sequence of classes: the examples of each, a tensor n × …, and its name.

    Attributes:
        examples: one tensor for each class, n × …, with its own n; or classes × n × ….
        names: names of the classes, all different.
        notes: remarks for the user.

    Raises:
        DataError: there are more or fewer names than classes, or two classes have the same name.

    Example:
        >>> collection = ClassCollection(torch.zeros(2, 20, 1, 28, 28), ("alpha", "beta"))
        >>> len(collection), collection[1].shape, collection[1:].names
        (2, torch.Size([20, 1, 28, 28]), ('beta',))
    """

    examples: Sequence[Tensor] | Tensor
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.examples) != len(self.names):
            raise DataError(f"there are {len(self.examples)} classes, but {len(self.names)} names")
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise DataError(
                f"class names must be different, but {twice[0]!r} occurs more than once"
            )

    @classmethod
    def from_labels(cls, inputs: Tensor, labels: Tensor, names: Sequence[str] = ()) -> Self:
        """Sort labelled examples by class.

        Args:
            inputs: n × ….
            labels: n whole numbers.
            names: names of the classes 0, 1, …; by default, the labels that occur.

        Raises:
            DataError: the numbers of labels and inputs differ, or a label has no name.

        Example:
            >>> inputs, labels = torch.arange(5.0), torch.tensor([7, 3, 7, 7, 3])
            >>> collection = ClassCollection.from_labels(inputs, labels)
            >>> collection.names, collection[1].tolist()
            (('3', '7'), [0.0, 2.0, 3.0])
        """
        if labels.shape != inputs.shape[:1]:
            raise DataError(
                f"labels must have one entry for each of {len(inputs)} inputs, got shape "
                f"{tuple(labels.shape)}"
            )
        found = labels.unique().tolist()
        if names and (nameless := set(found) - set(range(len(names)))):
            raise DataError(
                f"labels must be from 0 to {len(names) - 1}, because {len(names)} names are "
                f"given; got {min(nameless)}"
            )
        present = list(range(len(names))) if names else found
        return cls(
            [inputs[labels == label] for label in present],
            tuple(names) or tuple(str(label) for label in present),
        )

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Tensor | Self:
        if isinstance(index, slice):
            return type(self)(self.examples[index], self.names[index], self.notes)
        return self.examples[index]

    def select(self, indices: Sequence[int]) -> Self:
        """The classes with these indices, in this order."""
        if isinstance(self.examples, Tensor):
            examples = self.examples[torch.tensor(indices, dtype=torch.long)]
        else:
            examples = [self.examples[i] for i in indices]
        return type(self)(examples, tuple(self.names[i] for i in indices), self.notes)
