"""N-way K-shot tasks: labels that mean one class, no example twice, every class as often."""

import math

import pytest
import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.tasks import ClassCollection, NWayKShot


def marked(counts, side=2):
    """Images whose first pixel is their class, and whose second is their number in it."""
    classes = []
    for c, count in enumerate(counts):
        images = torch.zeros(count, 1, side, side)
        images[:, 0, 0, 0] = c
        images[:, 0, 0, 1] = torch.arange(count)
        classes.append(images)
    return classes


@pytest.mark.parametrize("counts", [(20,) * 8, (5, 7, 30, 5, 11, 6)])
def test_a_label_means_one_class_and_no_example_comes_twice(counts):
    sampler = NWayKShot(marked(counts), way=4, shot=2, queries=3)
    batch = sampler.sample(50, draw=0)
    assert batch.support[0].shape == (50, 8, 1, 2, 2)
    assert batch.query[0].shape == (50, 12, 1, 2, 2)
    for task in range(50):
        seen = {}
        for inputs, labels in (batch.support, batch.query):
            for image, label in zip(inputs[task], labels[task].tolist(), strict=True):
                seen.setdefault(label, []).append((image[0, 0, 0].item(), image[0, 0, 1].item()))
        assert sorted(seen) == [0, 1, 2, 3]
        classes = [{c for c, _ in own} for own in seen.values()]
        assert all(len(c) == 1 for c in classes)  # a label is one class, in support and query
        assert len(set.union(*classes)) == 4  # and no other label is
        for own in seen.values():
            assert len(set(own)) == 5  # 2 shots and 3 queries, all different
            assert all(number < counts[int(c)] for c, number in own)


def test_classes_and_examples_come_equally_often():
    """Of 2,000 draws each, within 4.5 deviations of a binomial; classes of unequal size."""
    counts = (5, 9, 40, 5, 5)
    batch = NWayKShot(marked(counts), way=2, shot=1, queries=1).sample(2000, draw=0)
    classes = batch.support[0][..., 0, 0, 0].long()
    share = 2 / 5
    frequency = classes.flatten().bincount(minlength=5) / 2000
    assert (frequency - share).abs().max() < 4.5 * math.sqrt(share * (1 - share) / 2000)
    # label 0 is not kept for some classes
    first = classes[:, 0].bincount(minlength=5) / 2000
    assert (first - 1 / 5).abs().max() < 4.5 * math.sqrt(0.16 / 2000)
    for images in (batch.support[0], batch.query[0]):
        own = images[classes == 2][:, 0, 0, 1].long().bincount(minlength=40) / (classes == 2).sum()
        assert (own - 1 / 40).abs().max() < 4.5 * math.sqrt(1 / 40 / (classes == 2).sum())


def test_turned_classes_are_classes_of_their_own():
    """A pixel lit in the corner goes to another corner with every turn, and comes back."""
    images = torch.zeros(2, 4, 1, 3, 3)
    images[0, :, 0, 0, 0] = 1
    images[1, :, 0, 0, 0] = 2
    sampler = NWayKShot(images, way=8, shot=1, queries=3, rotations=True)
    assert sampler.classes == 8
    batch = sampler.sample(1, draw=0)
    corners = {(0, 0), (0, 2), (2, 0), (2, 2)}
    found = {
        (image.max().item(), tuple(image[0].nonzero()[0].tolist())) for image in batch.support[0][0]
    }
    assert found == {(value, corner) for value in (1.0, 2.0) for corner in corners}
    # queries of a label are turned as its support is
    by_label = batch.query[0].reshape(1, 8, 3, 1, 3, 3)
    assert torch.equal(by_label, batch.support[0][:, :, None].expand_as(by_label))


def test_every_turn_comes_as_often():
    sampler = NWayKShot(marked((4,) * 3), way=2, shot=1, queries=1, rotations=True)
    turned = sampler.sample(2000, draw=3).support[0][:, :, 0]
    # the class is in the pixel that was first: classes 1 and 2 tell where that is
    corners = [turned[..., i, j] > 0 for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
    original = marked((4,) * 3)[1][0, 0]
    assert [original.rot90(k)[i, j].item() for k, (i, j) in enumerate(((0, 0), (1, 0)))] == [1, 1]
    share = torch.stack([corner.double().mean() for corner in corners])
    assert share.max() - share.min() < 0.08


def test_labelled_tensors_of_any_shape():
    labels = torch.tensor([3, 8] * 10)
    inputs = torch.arange(20.0)
    batch = NWayKShot.from_labels(inputs, labels, way=2, queries=9).sample(3, draw=0)
    assert batch.query[0].shape == (3, 18)
    # the parity of an input is its class
    assert torch.equal(batch.query[0] % 2, batch.support[0].repeat_interleave(9, 1) % 2)


def test_one_stacked_tensor_is_not_copied():
    images = torch.rand(5, 20, 3)
    sampler = NWayKShot(images)
    assert sampler._pool[0].data_ptr() == images.data_ptr()


@pytest.mark.parametrize(
    ("images", "knobs", "error", "message"),
    [
        (
            marked((20,) * 6),
            {"way": 1},
            ConfigurationError,
            "way must be a whole number of at least 2.*got 1",
        ),
        (
            marked((20,) * 6),
            {"shot": 0},
            ConfigurationError,
            "shot must be a whole number of at least 1.*got 0",
        ),
        (marked((20,) * 6), {"queries": 0}, ConfigurationError, "queries must be .*got 0"),
        (marked((20,) * 3), {}, ConfigurationError, "needs 5 classes, but there are 3; use"),
        (
            marked((20,)),
            {"rotations": True},
            ConfigurationError,
            "needs 5 classes, but there are 4, 4 from each of 1",
        ),
        ([], {}, ConfigurationError, "there are 0"),
        (
            marked((20, 20, 16, 15, 20, 3)),
            {},
            DataError,
            "need 16 examples of every class, but class 3 has 15, class 5 has 3; add",
        ),
        (
            ClassCollection(marked((20, 20, 4)), ("cat", "dog", "fox")),
            {"way": 2},
            DataError,
            "class 'fox' has 4",
        ),
        (marked((3,) * 15), {}, DataError, "class 9 has 3, and 5 more"),
        (
            [*marked((20,) * 5), *marked((20,), side=3)],
            {},
            DataError,
            r"class 0 have \(1, 2, 2\) and those of class 5 have \(1, 3, 3\); resize them",
        ),
        (
            [*marked((20,) * 5), marked((20,))[0].byte()],
            {},
            DataError,
            r"class 0 are torch\.float32 and those of class 5 are torch\.uint8",
        ),
        (torch.rand(6, 20, 1, 2, 3), {"rotations": True}, DataError, r"square.*\(1, 2, 3\)"),
        (torch.rand(6, 20, 4), {"rotations": True}, DataError, r"square.*\(4,\)"),
    ],
)
def test_tasks_that_cannot_be(images, knobs, error, message):
    with pytest.raises(error, match=message):
        NWayKShot(images, **knobs)


def test_labels_that_cannot_be():
    with pytest.raises(DataError, match=r"one entry for each of 4 inputs, got shape \(3,\)"):
        NWayKShot.from_labels(torch.rand(4, 2), torch.zeros(3).long())
    with pytest.raises(
        DataError, match="labels must be from 0 to 1, because 2 names are given; got 2"
    ):
        ClassCollection.from_labels(torch.rand(3, 2), torch.arange(3), ("cat", "dog"))
