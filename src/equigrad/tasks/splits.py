"""Classes divided between meta-training, validation and meta-test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.fields import Count, CountFrom0, expect
from equigrad.tasks.classes import ClassCollection
from equigrad.tasks.sampler import dice


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassSplit:
    """What meta-training sees, what models are chosen by, and what neither saw.

    Attributes:
        train: classes of meta-training.
        validation: classes that models are chosen by; None where none are held out.
        test: classes of the meta-test.
        note: how the classes were divided, for whoever reads the numbers.

    Raises:
        DataError: two parts share a class.
    """

    train: ClassCollection
    validation: ClassCollection | None
    test: ClassCollection
    note: str = ""

    def __post_init__(self) -> None:
        check_disjoint({name: part.names for name, part in self.parts.items()})

    @property
    def parts(self) -> dict[str, ClassCollection]:
        """The parts that there are, by name."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **validation, "test": self.test}


def check_disjoint(parts: Mapping[str, Sequence[str]]) -> None:
    """Check that no class is in two parts of a split.

    Args:
        parts: names of the classes, by name of the part.

    Raises:
        DataError: two parts share a class.

    Example:
        >>> check_disjoint({"train": ["cat", "dog"], "test": ["fox", "dog"]})
        Traceback (most recent call last):
        equigrad.errors.DataError: train and test share 1 class: 'dog'; a class belongs to one part
    """
    for (one, its), (other, others) in combinations(parts.items(), 2):
        if shared := sorted(set(its) & set(others)):
            listed = ", ".join(map(repr, shared[:5])) + ", …" * (len(shared) > 5)
            kind = "class" if len(shared) == 1 else "classes"
            raise DataError(
                f"{one} and {other} share {len(shared)} {kind}: {listed}; a class belongs to one "
                f"part"
            )


def draw_classes(
    classes: ClassCollection, counts: Sequence[int], *, seed: int
) -> list[ClassCollection]:
    """Draw several collections, none of which share a class.

    Args:
        classes: to draw from.
        counts: how many for each collection.
        seed: draws them.

    Raises:
        ConfigurationError: there are fewer classes, or a count is negative.
    """
    expect(tuple[CountFrom0, ...], counts=counts)
    if sum(counts) > len(classes):
        raise ConfigurationError(
            f"{' + '.join(map(str, counts))} classes were asked for, and there are {len(classes)}"
        )
    order = torch.randperm(len(classes), generator=dice(seed, 0)).tolist()
    ends = accumulate(counts, initial=0)
    return [classes.select(order[start:end]) for start, end in pairwise(ends)]


def split_classes(
    classes: ClassCollection, *, train: int, validation: int, test: int, seed: int = 0
) -> ClassSplit:
    """Divide classes at random.

    Args:
        classes: to divide.
        train: how many for meta-training.
        validation: how many to choose models by; 0 for none.
        test: how many for the meta-test.
        seed: draws them; keep it, for meta-training under another one has seen the meta-test.

    Raises:
        ConfigurationError: meta-training or meta-test would be empty, or there are fewer classes.

    Example:
        >>> classes = ClassCollection(torch.rand(10, 20, 4), tuple("abcdefghij"))
        >>> split = split_classes(classes, train=6, validation=0, test=4)
        >>> split.validation, split.note
        (None, '6 classes for meta-training, 0 for validation, 4 for the meta-test, seed 0')
    """
    expect(Count, train=train, test=test)
    learned, held_out, unseen = draw_classes(classes, (train, validation, test), seed=seed)
    return ClassSplit(
        train=learned,
        validation=held_out if validation else None,
        test=unseen,
        note=(
            f"{train} classes for meta-training, {validation} for validation, {test} for the "
            f"meta-test, seed {seed}"
        ),
    )
