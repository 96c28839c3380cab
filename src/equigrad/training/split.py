"""The division of data into training, validation and test set."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.fields import expect
from equigrad.training.folds import Folds
from equigrad.training.targets import Classes, Target


@dataclass(frozen=True)
class Split:
    """A training, a validation and a test set: inputs and targets.

    Attributes:
        train: the training set of the learner.
        validation: the validation set of the meta-parameters.
        test: data that neither has seen; None if there are none.
        target: the kind of target.
        encoding: the encoding of the user's data as inputs, which a saved model needs.
        inputs: names of the inputs, if they have any.
        note: a remark for readers of the results.
        folds: how rows are used for both training and validation; `train` and `validation` are then
            the same rows.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    target: Target = field(default_factory=Classes)
    encoding: Any = None
    inputs: Sequence[str] = ()
    note: str = ""
    folds: Folds | None = None

    @property
    def judges(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The set that a network is scored on."""
        test = {} if self.test is None else {"test": self.test}
        return {"validation": self.validation, **test}

    @property
    def digest(self) -> str:
        """A checksum of all data."""
        return digest_of(tensor for part in (self.train, *self.judges.values()) for tensor in part)


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A checksum of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Rows:
    """The rows of each part: indices, in an order drawn by the seed."""

    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def seen(self) -> Tensor:
        """The rows of the training and the validation set."""
        return torch.cat([self.train, self.validation])


def divide(
    groups: Tensor,
    *,
    test_share: float,
    training_share: float,
    samples: int | None,
    seed: int,
    names: Sequence[str] = (),
) -> Rows:
    """Draw the rows of each part, so that every group has its share of every part.

    Args:
        groups: the class of every row, or zero for all rows.
        test_share: share of the rows for the test set; 0 for none.
        training_share: share of the others for the training set; the rest are for validation.
        samples: number of rows for training and validation together, at least two of every group;
            None for all that are not in the test set.
        seed: seed of the draw.
        names: names of the groups, for error messages.

    Raises:
        ConfigurationError: samples is larger than the number of rows, or less than two a group.
        DataError: a group has too few rows to be in every part, or there is only one class.

    Example:
        >>> groups = torch.tensor([0] * 10 + [1] * 5)
        >>> rows = divide(groups, test_share=0.2, training_share=0.5, samples=None, seed=0)
        >>> len(rows.train), len(rows.validation), len(rows.test)
        (6, 6, 3)
    """
    expect(int, seed=seed)
    present, counts = (found.tolist() for found in groups.unique(return_counts=True))
    parts = 2 + (test_share > 0)
    few = [(g, n) for g, n in zip(present, counts, strict=True) if n < parts]
    if few:
        needed = "training, validation and test" if parts > 2 else "training and validation"
        lacking = f"too few rows for {needed}, each of which needs one"
        if not names:
            raise DataError(f"the data have {lacking}: {len(groups)}; add rows")
        listed = ", ".join(f"{names[g]} ({n})" for g, n in few[:10])
        raise DataError(f"classes have {lacking}: {listed}; add rows, or leave out these classes")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))

    def drawn(rows: Tensor, wanted: Callable[[list[int]], list[int]]) -> tuple[Tensor, Tensor]:
        """As many rows of every group as its count says, and the other rows."""
        own_rows = [rows[groups[rows] == group] for group in present]
        counts = wanted([len(own) for own in own_rows])
        taken = [own[:n] for own, n in zip(own_rows, counts, strict=True)]
        chosen = torch.isin(rows, torch.cat(taken))
        return rows[chosen], rows[~chosen]

    def part(share: float, leave: int) -> Callable[[list[int]], list[int]]:
        """A share of every group: at least one row, and at most all but `leave`."""
        return lambda counts: [min(max(1, round(share * n)), n - leave) for n in counts]

    test, rest = drawn(order, part(test_share, 2)) if test_share > 0 else (order[:0], order)
    if samples is not None:
        if samples > len(rest):
            raise ConfigurationError(
                f"{samples} samples were requested, but there are only {len(rest)} apart from the "
                f"{len(test)} for testing"
            )
        if samples < 2 * len(present):
            raise ConfigurationError(
                f"samples must be at least {2 * len(present)}, one for training and one for "
                f"validation{' of each class' if len(present) > 1 else ''}, got {samples}"
            )
        rest, _ = drawn(rest, lambda counts: apportioned(samples, counts, least=2))
    train, validation = drawn(rest, part(training_share, 1))
    return Rows(train, validation, test)


def held_back(groups: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random share of the rows of every group, held out for testing, and the other rows.

    Example:
        >>> [len(rows) for rows in held_back(torch.tensor([0] * 10 + [1] * 5), 0.2, seed=0)]
        [3, 12]
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    own = [order[groups[order] == group] for group in groups.unique()]
    held = torch.cat([rows[: max(1, round(share * len(rows)))] for rows in own])
    chosen = torch.isin(order, held)
    return order[chosen], order[~chosen]


def apportioned(total: int, counts: Sequence[int], *, least: int) -> list[int]:
    """The numbers of rows of every group that add up to `total`, by largest remainders.

    Every group has at least `least` rows.

    Example:
        >>> apportioned(10, [76, 4], least=2), apportioned(8, [8, 8, 8], least=2)
        ([8, 2], [3, 3, 2])
    """
    quotas = [total * count / sum(counts) for count in counts]
    rows = [max(least, int(quota)) for quota in quotas]

    def lacking(group: int) -> float:
        return quotas[group] - rows[group]

    while sum(rows) < total:
        rows[max(range(len(rows)), key=lacking)] += 1
    while sum(rows) > total:
        rows[min((g for g, n in enumerate(rows) if n > least), key=lacking)] -= 1
    return rows
