"""The division of classes into meta-training, validation and meta-test."""

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
    """Disjoint classes for meta-training, validation and meta-test.

    Attributes:
        train: classes of meta-training.
        validation: classes for model selection; None if none are held out.
        test: classes of the meta-test.
        note: how the classes were divided, for readers of the results.

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
        """The parts that exist, by name."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **validation, "test": self.test}


def check_disjoint(parts: Mapping[str, Sequence[str]]) -> None:
    """Check that no class is in two parts of a split.

    Args:
        parts: names of the classes in each part, by the part's name.

    Raises:
        DataError: two parts share a class.

    Example:
        >>> check_disjoint({"train": ["cat", "dog"], "test": ["fox", "dog"]})
        Traceback (most recent call last):
        equigrad.errors.DataError: train and test share 1 class: 'dog'; put it into one of them
    """
    for (one, its), (other, others) in combinations(parts.items(), 2):
        if shared := sorted(set(its) & set(others)):
            listed = ", ".join(map(repr, shared[:5])) + ", …" * (len(shared) > 5)
            kind = "class" if len(shared) == 1 else "classes"
            raise DataError(
                f"{one} and {other} share {len(shared)} {kind}: {listed}; put "
                f"{'it' if len(shared) == 1 else 'each'} into one of them"
            )


def draw_classes(
    classes: ClassCollection, counts: Sequence[int], *, seed: int
) -> list[ClassCollection]:
    """Draw several collections with no class in common.

    Args:
        classes: classes to draw from.
        counts: number of classes of each collection.
        seed: seed of the draw.

    Raises:
        ConfigurationError: there are too few classes, or a count is negative.
    """
    expect(tuple[CountFrom0, ...], counts=counts)
    if sum(counts) > len(classes):
        raise ConfigurationError(
            f"{' + '.join(map(str, counts))} classes were requested, but there are only "
            f"{len(classes)}"
        )
    order = torch.randperm(len(classes), generator=dice(seed, 0)).tolist()
    ends = accumulate(counts, initial=0)
    return [classes.select(order[start:end]) for start, end in pairwise(ends)]


def split_classes(
    classes: ClassCollection, *, train: int, validation: int, test: int, seed: int = 0
) -> ClassSplit:
    """Divide classes at random.

    Args:
        classes: classes to divide.
        train: number of classes for meta-training.
        validation: number of classes for model selection; 0 for none.
        test: number of classes for the meta-test.
        seed: seed of the draw. Keep it: meta-training under another seed would see meta-test
            classes.

    Raises:
        ConfigurationError: meta-training or meta-test would be empty, or there are too few classes.

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
