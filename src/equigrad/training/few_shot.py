"""Meta-training on batches of tasks, and evaluation on new tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError
from equigrad.evaluation import check_tensors
from equigrad.fields import Count, CountFrom0, CountFrom2, expect, require
from equigrad.gradient import MetaGradient
from equigrad.problems import Params
from equigrad.tasks import FewShotLearner, TaskSampler
from equigrad.tasks.learner import Statistics
from equigrad.training.loop import Callback, OuterState, descend
from equigrad.training.processes import InStep, agreed, gathered, place, shared_meta_gradient
from equigrad.wording import shown

Metric = Callable[[Tensor, Tensor], Tensor]
"""`(outputs, targets) -> scores`: both tasks × n × …, one score for each task."""


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Percentage of a task's queries whose largest output is that of their class.

    Example:
        >>> outputs = torch.tensor([[[2.0, 1.0], [3.0, 0.0]]])
        >>> accuracy(outputs, torch.tensor([[0, 1]]))
        tensor([50.])
    """
    return 100 * (outputs.argmax(-1) == targets).float().mean(1)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """A task's mean squared error.

    Example:
        >>> mean_squared_error(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]))
        tensor([5.])
    """
    return (outputs - targets).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Score:
    """The score on a number of tasks.

    Attributes:
        mean: mean over tasks.
        interval: half the width of the 95 % confidence interval of the mean, `1.96 s / √n` with the
            standard deviation s of n tasks.
        tasks: number of tasks.
    """

    mean: float
    interval: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.interval:.2g} ({self.tasks} tasks)"


def judge(
    learner: FewShotLearner,
    meta_params: Params,
    sampler: TaskSampler,
    metric: Metric,
    *,
    tasks: int = 600,
    at_once: int = 20,
    statistics: Statistics | None = None,
    steps: int | None = None,
) -> Score:
    """Learn new tasks at fixed θ, and score the outputs for their query sets.

    Several processes share the draws (`equigrad.training.processes`), and return the same score.

    Args:
        learner: the learner of a task.
        meta_params: θ.
        sampler: sampler of the tasks; its first draws are used, which are the same in every call.
        metric: computes one score for each task.
        tasks: number of tasks to draw.
        at_once: number of tasks to draw at a time.
        statistics: statistics of batch normalisation, instead of the learner's own setting.
        steps: the most adaptation steps, instead of the solver's limit; 0 for none.

    Raises:
        ConfigurationError: there are fewer than two tasks, or at_once < 1.
    """
    expect(FewShotLearner, learner=learner)
    expect(TaskSampler, sampler=sampler)
    expect(Callable, metric=metric)
    expect(CountFrom2, tasks=tasks)
    expect(Count, at_once=at_once)
    expect(CountFrom0 | None, steps=steps)
    check_tensors("meta_params", meta_params)
    like = next(iter(meta_params.values()))
    here, scores = place(), {}
    draws = list(enumerate(range(0, tasks, at_once)))
    for draw, first in draws[here.rank :: here.world_size]:
        batch = sampler.sample(min(at_once, tasks - first), draw).to(like.device, like.dtype)
        params = learner.settle(meta_params, batch, steps=steps)
        outputs = learner.predict(params, meta_params, batch, statistics=statistics)
        scores[draw] = metric(outputs, batch.query[1]).cpu()
    for others in gathered(scores):
        scores |= others
    every = torch.cat([scores[draw] for draw, _ in draws]).double()
    interval = 1.96 * every.std().item() / math.sqrt(tasks)
    return Score(every.mean().item(), interval, tasks)


def learn_tasks(
    learner: FewShotLearner,
    meta_params: dict[str, Tensor],
    sampler: TaskSampler,
    *,
    tasks: int,
    optimizer: torch.optim.Optimizer,
    steps: float,
    limit: float = math.inf,
    average_from: int | None = None,
    validate: Callable[[Params], Mapping[str, float]] | None = None,
    validate_every: int = 100,
    keep_best: Literal["highest", "lowest"] | None = None,
    callbacks: Sequence[Callback] = (),
) -> OuterState:
    """Learn θ from a stream of tasks, one batch in each outer step.

    Several processes share every batch (`equigrad.training.processes`) and take the same steps.
    They start with the state of the first process, which alone runs callbacks that do not act on
    the state.

    Args:
        learner: estimates the meta-gradient of a batch.
        meta_params: θ, leaves that require a gradient; updated in place.
        sampler: sampler of the tasks; outer step t uses its draw t.
        tasks: number of tasks in a batch.
        optimizer: optimiser of the values of `meta_params`.
        steps: total number of outer steps, including those before a resume; `math.inf` if only time
            ends the loop.
        limit: seconds after which no further step begins, including those before a resume and those
            of validation.
        average_from: step from which the mean of θ over all steps (Polyak and Juditsky 1992) is
            kept as `copies["average"]`; a loop that ends earlier has none.
        validate: computes metrics of θ, or of its average if there is one, every `validate_every`
            steps and at the end; the first metric selects the best θ.
        validate_every: number of steps between two validations.
        keep_best: whether to keep the θ with the highest or lowest first metric as
            `copies["best"]`.
        callbacks: watch the loop.

    Returns:
        The state after the last step; `chosen(state)` is the learned θ.

    Raises:
        ConfigurationError: a count < 1, or keep_best without validate.
    """
    expect(FewShotLearner, learner=learner)
    expect(TaskSampler, sampler=sampler)
    check_tensors("meta_params", meta_params)
    expect(tuple[Callback, ...], callbacks=callbacks)
    expect(Count, tasks=tasks, validate_every=validate_every)
    expect(CountFrom0 | None, average_from=average_from)
    expect(Callable | None, validate=validate)
    expect(Literal["highest", "lowest"] | None, keep_best=keep_best)
    require(
        keep_best is None or validate is not None,
        f"keep_best={keep_best!r} needs validate, a function that scores θ",
    )
    like = next(iter(meta_params.values()))

    def gradient(state: OuterState) -> MetaGradient:
        batch = sampler.sample(tasks, state.step).to(like.device, like.dtype)
        return shared_meta_gradient(learner, meta_params, batch)

    def evaluate(state: OuterState, result: MetaGradient) -> Mapping[str, float]:
        if average_from is not None and state.step >= average_from:
            _average(state, state.step - average_from + 1)
        done = state.step + 1
        state.ends = agreed(state.ends)
        if validate is None or not (done % validate_every == 0 or state.ends):
            return {}
        now = state.copies.get("average", state.meta_params)
        metrics = validate(now)
        if not isinstance(metrics, Mapping) or not metrics:
            raise ConfigurationError(
                f"validate must return a dictionary with at least one metric, got {shown(metrics)}"
            )
        name, score = next(iter(metrics.items()))
        before = [float(row[name]) for row in state.history if name in row]
        sign = 1 if keep_best == "highest" else -1
        better = all(sign * score > sign * b for b in before if not math.isnan(b))
        if keep_best is not None and better and not math.isnan(score):
            state.copies["best"] = {n: m.detach().clone() for n, m in now.items()}
        return metrics

    watching = [c for c in callbacks if not c.acts and place().leads]
    acting = [c for c in callbacks if c.acts]  # run after `InStep` has set the clock

    return descend(
        gradient,
        meta_params,
        optimizer=optimizer,
        steps=steps,
        limit=limit,
        evaluate=evaluate,
        callbacks=[*watching, InStep(), *acting],
    )


def chosen(state: OuterState) -> dict[str, Tensor]:
    """The learned θ: the best if it was kept, else the average, else the last."""
    last = {name: m.detach() for name, m in state.meta_params.items()}
    return state.copies.get("best", state.copies.get("average", last))


@torch.no_grad()
def _average(state: OuterState, count: int) -> None:
    """Add θ to a running mean."""
    if count == 1:
        state.copies["average"] = {n: m.detach().clone() for n, m in state.meta_params.items()}
    for name, mean in state.copies["average"].items():
        mean += (state.meta_params[name] - mean) / count
