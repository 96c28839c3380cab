"""The problem that learns weights of training examples, or of their sources."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from equigrad.errors import DataError
from equigrad.nn import Functional
from equigrad.problems import Bilevel, Params

ExampleLoss = Callable[[Callable[..., Any], Any], Tensor]
"""`(model, batch) -> losses`, one loss for each example; `model` is called like the module."""


def weighted_problem(
    net: Functional,
    train: Any,
    valid: Any,
    loss: ExampleLoss,
    groups: Tensor,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
) -> Bilevel:
    """A bilevel problem with a weighted training loss inside and a validation loss outside."""

    def losses(params: Params, batch: tuple[Tensor, Any]) -> Tensor:
        numbers, examples = batch
        found: Any = loss(partial(net, params), examples)
        if not isinstance(found, Tensor) or found.shape != numbers.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"loss must give one number for each of {len(numbers)} examples, got {shape}; "
                f"reduction='none' keeps them apart"
            )
        return found

    def inner(params: Params, meta: Params, batch: tuple[Tensor, Any]) -> Tensor:
        weights = meta["weight"]
        rows = groups.to(weights.device).index_select(0, batch[0])
        return (weights.index_select(0, rows) * losses(params, batch)).mean()

    def outer(params: Params, meta: Params, batch: tuple[Tensor, Any]) -> Tensor:
        return losses(params, batch).mean()

    def numbered(items: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([i for i, _ in items]), collate([example for _, example in items])

    def loader(data: Any, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            _Numbered(data), batch_size=batch_size, shuffle=shuffle, collate_fn=numbered
        )

    return Bilevel(
        inner,
        outer,
        inner_batches=loader(train, True),
        outer_batches=loader(valid, False),
        modules=(net.model,),
    )


class _Numbered(Dataset[Any]):
    """The examples of a dataset together with their indices."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._data[index]


def named_weights(train: Any, sources: Sequence[Any] | None) -> tuple[tuple[str, ...], Tensor]:
    """Names of the weights, and the weight that each example belongs to."""
    check_data("train", train)
    if sources is None:
        return tuple(map(str, range(len(train)))), torch.arange(len(train))
    if len(sources) != len(train):
        raise DataError(f"sources name {len(sources)} examples, and train has {len(train)}")
    names = list(dict.fromkeys(map(str, sources)))
    return tuple(names), torch.tensor([names.index(str(source)) for source in sources])


def check_data(what: str, data: Any) -> None:
    """Refuse data without examples that can be indexed."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"{what} must have a length and examples by number, got {type(data).__name__}"
        )
    if len(data) == 0:
        raise DataError(f"{what} has no examples")


def labelled_loss(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of each example for a model of the package transformers.

    For a language model it is the loss of the next token, averaged over tokens with a label other
    than -100.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise DataError(
            f"batches have no 'labels', which the loss of a model of transformers needs, got "
            f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}; give loss="
        )
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits.float(), batch["labels"]
    if logits.ndim == 2:
        return cross_entropy(logits, labels, reduction="none")
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
