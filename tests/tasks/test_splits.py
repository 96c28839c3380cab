"""Classes on one side of a split alone."""

import pytest
import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.tasks import ClassCollection, ClassSplit, split_classes

NAMES = tuple("abcdefghij")


def collection(as_list):
    """Ten classes; every example is the number of its class."""
    examples = torch.arange(10.0)[:, None].expand(10, 3)
    return ClassCollection(list(examples) if as_list else examples, NAMES)


@pytest.mark.parametrize("as_list", [True, False])
def test_every_class_is_on_one_side(as_list):
    split = split_classes(collection(as_list), train=5, validation=2, test=3, seed=1)
    parts = split.parts.values()
    assert [len(part) for part in parts] == [5, 2, 3]
    assert sorted(name for part in parts for name in part.names) == list(NAMES)
    for part in parts:  # names and examples were moved together
        assert [NAMES.index(name) for name in part.names] == [int(own[0]) for own in part]


def test_the_seed_draws_the_split():
    def drawn(seed):
        return split_classes(collection(False), train=5, validation=0, test=4, seed=seed)

    assert drawn(1).test.names == drawn(1).test.names
    assert drawn(1).test.names != drawn(2).test.names
    assert drawn(1).validation is None
    assert "seed 1" in drawn(1).note


def test_collections_are_sequences():
    classes = collection(True)
    assert classes[2:4].names == ("c", "d")
    assert [int(own[0]) for own in classes[2:4]] == [2, 3]


def test_shared_classes_are_refused():
    classes = collection(False)
    with pytest.raises(DataError, match="train and test share 2 classes: 'd', 'e'"):
        ClassSplit(train=classes[:5], validation=None, test=classes[3:])
    with pytest.raises(DataError, match="validation and test share 1 class: 'f'"):
        ClassSplit(train=classes[:3], validation=classes[4:6], test=classes[5:])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 2, 3), "train must be a whole number of at least 1.*got 0"),
        ((3, 2, 0), "test must be a whole number of at least 1.*got 0"),
        ((3, -1, 3), "at least 0, got \\(3, -1, 3\\)"),
        ((6, 2, 3), r"6 \+ 2 \+ 3 classes were requested, but there are only 10"),
    ],
)
def test_splits_that_cannot_be(counts, message):
    train, validation, test = counts
    with pytest.raises(ConfigurationError, match=message):
        split_classes(collection(False), train=train, validation=validation, test=test)


def test_names_that_cannot_be():
    with pytest.raises(DataError, match="2 classes, but 1 names"):
        ClassCollection(torch.rand(2, 3), ("a",))
    with pytest.raises(DataError, match="'a' occurs more than once"):
        ClassCollection(torch.rand(3, 3), ("a", "b", "a"))
