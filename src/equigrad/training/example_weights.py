"""What scores and learned weights of training examples, or of their sources, are computed from."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from equigrad.errors import DataError
from equigrad.estimators import Contrastive, Estimator
from equigrad.fields import Count, expect, require
from equigrad.nn import Functional
from equigrad.problems import Bilevel, Params
from equigrad.solvers import Solver, TorchOptimizer

ExampleLoss = Callable[[Callable[..., Any], Any], Tensor]
"""`(model, batch) -> losses`, one loss for each example; `model` is called like the module."""


@dataclass(frozen=True)
class WeightedTraining:
    """A model that trains on weighted examples, and is judged by trusted ones.

    Attributes:
        names: of the weights.
        problem: trains on the weighted examples; its θ is `weight`.
        params: where training starts.
        rule: estimates the gradient of the validation loss.
    """

    names: tuple[str, ...]
    problem: Bilevel
    params: dict[str, Tensor]
    rule: Estimator

    def meta(self, weights: Tensor) -> dict[str, Tensor]:
        """θ, where the model is."""
        return {"weight": weights.to(next(iter(self.params.values())).device)}


def weighted_training(
    model: nn.Module,
    train: Any,
    valid: Any,
    loss: ExampleLoss | None,
    *,
    solver: Solver,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    sources: Sequence[Any] | None,
    estimator: Estimator | None,
    nudged_steps: int | None,
) -> WeightedTraining:
    """Check what `example_scores` and `learn_weights` are both given, and make a problem of it."""
    expect(nn.Module, model=model)
    expect(Solver, solver=solver)
    expect(Count, batch_size=batch_size)
    expect(Count | None, nudged_steps=nudged_steps)
    expect(Callable | None, loss=loss)
    names, groups = named_weights(train, sources)
    check_data("valid", valid)
    net = Functional(model)
    problem = weighted_problem(
        net, train, valid, loss or labelled_loss, groups, batch_size, collate
    )
    return WeightedTraining(
        names, problem, net.params(), chosen_rule(estimator, solver, nudged_steps)
    )


def chosen_rule(estimator: Estimator | None, solver: Solver, nudged_steps: int | None) -> Estimator:
    """The estimator; a contrastive one has nudged phases of a constant rate, and β = 0.3."""
    estimator = Contrastive(beta=0.3) if estimator is None else estimator
    expect(Estimator, estimator=estimator)
    nudged = getattr(estimator, "nudged_solver", None)
    require(
        nudged_steps is None or (isinstance(estimator, Contrastive) and nudged is None),
        f"nudged_steps says how long the nudged phases of a Contrastive without a nudged_solver "
        f"are, and the estimator is {estimator}; leave nudged_steps out",
    )
    if not isinstance(estimator, Contrastive) or nudged is not None:
        return estimator
    require(
        solver.max_steps is not None or nudged_steps is not None,
        "a solver without max_steps does not say how long nudged phases are; give nudged_steps",
    )
    least = 2 * getattr(solver, "accumulate", 1)  # half of them make a step
    require(
        nudged_steps is None or nudged_steps >= least,
        f"nudged_steps must be at least {least}, so that half of them move the model, got "
        f"{nudged_steps}",
    )
    steps = nudged_steps or max((solver.max_steps or 0) // 5, least)
    changed: dict[str, Any] = {"max_steps": steps, "tol": None}
    if isinstance(solver, TorchOptimizer):
        changed["scheduler"] = None
    return dataclasses.replace(estimator, nudged_solver=dataclasses.replace(solver, **changed))


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
