"""Batches that are cut, shared and moved; those that cannot be."""

import pytest
import torch

from equigrad.errors import ConfigurationError, ProblemError
from equigrad.tasks import TaskBatch


def numbered(tasks, support=3, query=4):
    """Every input and target is the number of its task."""
    own = torch.arange(tasks)[:, None]
    return TaskBatch(
        (own.expand(tasks, support)[..., None].float(), own.expand(tasks, support)),
        (own.expand(tasks, query)[..., None].float(), own.expand(tasks, query)),
    )


def its_tasks(batch):
    """The numbers of its tasks, which are the same in all four tensors."""
    numbers = {tuple(t[:, 0].flatten().tolist()) for t in (*batch.support, *batch.query)}
    (one,) = numbers
    return list(one)


def test_slices_cut_all_four_tensors():
    batch = numbered(5)
    assert len(batch) == 5
    assert its_tasks(batch[1:3]) == [1, 2]
    assert its_tasks(batch[-1:]) == [4]
    with pytest.raises(ProblemError, match="at least one task, got 0"):
        batch[5:]
    with pytest.raises(TypeError, match="chosen by a slice"):
        batch[0]  # pyright: ignore


@pytest.mark.parametrize("tasks", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 100, None])
def test_chunks_hold_every_task_once_and_are_alike(tasks, size):
    chunks = [its_tasks(chunk) for chunk in numbered(tasks).chunks(size)]
    assert [task for chunk in chunks for task in chunk] == list(range(tasks))
    lengths = [len(chunk) for chunk in chunks]
    assert max(lengths) <= (size or tasks)
    assert max(lengths) - min(lengths) <= 1
    assert len(chunks) == -(-tasks // (size or tasks))  # no more than it takes


@pytest.mark.parametrize(("tasks", "processes"), [(4, 1), (4, 4), (7, 3), (32, 5)])
def test_shares_hold_every_task_once_and_are_alike(tasks, processes):
    batch = numbered(tasks)
    shares = [its_tasks(batch.share(rank, processes)) for rank in range(processes)]
    assert [task for share in shares for task in share] == list(range(tasks))
    assert {len(share) for share in shares} <= {tasks // processes, -(-tasks // processes)}


def test_precision_changes_and_labels_stay_whole():
    batch = numbered(2).to("cpu", torch.float64)
    assert batch.support[0].dtype == batch.query[0].dtype == torch.float64
    assert batch.support[1].dtype == batch.query[1].dtype == torch.int64
    elsewhere = numbered(2).to("meta")
    assert {t.device.type for t in (*elsewhere.support, *elsewhere.query)} == {"meta"}
    assert elsewhere.support[0].dtype == torch.float32


def pair(tasks, inputs, targets):
    return torch.zeros(tasks, inputs, 1), torch.zeros(tasks, targets)


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        (pair(4, 5, 5), pair(3, 5, 5), "4 in support inputs, .*3 in query inputs"),
        ((torch.zeros(4, 5), torch.zeros(2, 5)), pair(4, 5, 5), "2 in support targets"),
        (pair(4, 5, 6), pair(4, 5, 5), "support .*got 5 inputs and 6 targets"),
        (pair(4, 5, 5), pair(4, 5, 1), "query .*got 5 inputs and 1 targets"),
        (pair(4, 0, 0), pair(4, 5, 5), "support .*at least one input, .* got 0 inputs"),
        (pair(0, 5, 5), pair(0, 5, 5), "at least one task, got 0"),
        ((torch.zeros(4, 5), torch.zeros(4)), pair(4, 5, 5), r"support targets .*got \(4,\)"),
    ],
)
def test_batches_that_cannot_be(support, query, message):
    with pytest.raises(ProblemError, match=message):
        TaskBatch(support, query)


def test_parts_that_cannot_be():
    batch = numbered(3)
    for size in (0, -2):
        with pytest.raises(ConfigurationError, match=f"at least one task, got {size}"):
            batch.chunks(size)
    with pytest.raises(ConfigurationError, match="3 tasks cannot be divided among 4 processes"):
        batch.share(0, 4)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigurationError, match=f"got {rank}"):
            batch.share(rank, world_size)
