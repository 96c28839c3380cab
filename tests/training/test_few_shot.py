"""Meta-training: averages, the best by validation, resuming, and honest intervals."""

import math
import random
import time
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import equigrad as eg
from equigrad.nn import ComplexSynapse
from equigrad.nn.side_by_side import Batching
from equigrad.tasks import FewShotLearner, Sinusoids
from equigrad.training.few_shot import chosen, judge, learn_tasks, mean_squared_error


def learner(*layers: nn.Module, batching: Batching = "grouped") -> FewShotLearner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), *layers, nn.Linear(10, 1))
    return FewShotLearner(
        model=ComplexSynapse(net, 0.1, center="init", learn=("center",)),
        loss=nn.functional.mse_loss,
        solver=eg.GradientDescent(lr=0.05, max_steps=10),
        estimator=eg.Contrastive(beta=0.1),
        batching=batching,
    )


def run(steps: int, callbacks=(), layers=(), batching: Batching = "grouped", **options):
    one = learner(*layers, batching=batching)
    meta_params = one.model.meta_params()
    optimizer = torch.optim.Adam(meta_params.values(), lr=0.01)
    return learn_tasks(
        one,
        meta_params,
        Sinusoids(seed=1),
        tasks=4,
        optimizer=optimizer,
        steps=steps,
        callbacks=callbacks,
        **options,
    )


class Recorder(eg.training.Callback):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step(self, state, result) -> None:
        self.seen.append(state.meta_params["center.0.weight"].detach().clone())


def test_the_average_is_the_mean_from_its_first_step_on() -> None:
    recorder = Recorder()
    state = run(6, [recorder], average_from=2)
    mean = torch.stack(recorder.seen[2:]).mean(0)
    torch.testing.assert_close(state.copies["average"]["center.0.weight"], mean)
    assert chosen(state) is state.copies["average"]
    last = chosen(run(3))["center.0.weight"]
    assert last.equal(recorder.seen[2])


@pytest.mark.parametrize(("keep", "best"), [("highest", 2), ("lowest", 4)])
def test_the_best_by_validation_is_kept(keep, best) -> None:
    scores = iter([3.0, 5.0, 4.0, 1.0])
    recorder = Recorder()
    state = run(
        7,
        [recorder],
        validate=lambda theta: {"score": next(scores), "other": 0.0},
        validate_every=2,
        keep_best=keep,
    )
    step = {2: 3, 4: 6}[best]
    assert chosen(state)["center.0.weight"].equal(recorder.seen[step])
    # after steps 2, 4, 6 and the last, the seventh
    assert ["score" in row for row in state.history] == [False, True] * 3 + [True]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path) -> None:
    def validate(theta: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"size": float(theta["center.0.weight"].norm())}

    options = {
        "average_from": 1,
        "validate": validate,
        "validate_every": 2,
        "keep_best": "highest",
    }
    whole = run(6, **options)
    path = tmp_path / "checkpoint.pt"
    run(3, [eg.training.Checkpoint(path)], **options)
    resumed = run(6, [eg.training.Checkpoint(path, resume=True)], **options)
    for what in ("average", "best"):
        for name, value in whole.copies[what].items():
            assert resumed.copies[what][name].equal(value)
    assert all(resumed.meta_params[n].equal(m) for n, m in whole.meta_params.items())


class Jitter(nn.Module):
    """Noise in place of dropout, one number a call from each generator that a module may use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * numpy.random.rand())


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.AlphaDropout(0.2), Jitter()])
@pytest.mark.parametrize("stopped", [1, 3])
def test_a_stopped_run_with_noise_goes_on_to_the_same_bits(tmp_path, layer, stopped) -> None:
    options = {"layers": [layer], "batching": "loop"}
    path = tmp_path / "checkpoint.pt"
    whole = run(6, **options)
    run(stopped, [eg.training.Checkpoint(path)], **options)
    resumed = run(6, [eg.training.Checkpoint(path, resume=True)], **options)
    assert all(resumed.meta_params[n].equal(m) for n, m in whole.meta_params.items())


def test_scores_are_means_over_tasks_with_their_interval() -> None:
    one, sampler = learner(), Sinusoids(seed=7)
    meta_params = one.model.meta_params()
    score = judge(one, meta_params, sampler, mean_squared_error, tasks=7, at_once=3)
    each = []
    for draw, count in enumerate((3, 3, 1)):
        batch = sampler.sample(count, draw)
        for task in range(count):
            x, y = (t[task] for t in batch.support)
            v, w = (t[task] for t in batch.query)
            each.append((one.adapt(meta_params, (x, y))(v) - w).square().mean().item())
    mean = sum(each) / 7
    spread = math.sqrt(sum((e - mean) ** 2 for e in each) / 6)
    assert score.mean == pytest.approx(mean, rel=1e-5)
    assert score.interval == pytest.approx(1.96 * spread / math.sqrt(7), rel=1e-4)
    assert str(score).endswith("(7 tasks)")


def test_bad_counts_are_named() -> None:
    with pytest.raises(
        eg.ConfigurationError, match=r"validate_every must be a whole number of at least 1, got 0"
    ):
        run(1, validate_every=0)
    with pytest.raises(eg.ConfigurationError, match="needs validate"):
        run(1, keep_best="lowest")
    with pytest.raises(eg.ConfigurationError, match="tasks must be a whole number of at least 2"):
        judge(learner(), {}, Sinusoids(), mean_squared_error, tasks=1)


def learned(**changed) -> object:
    one = learner()
    theta = one.model.meta_params()
    given: Any = {
        "learner": one,
        "meta_params": theta,
        "sampler": Sinusoids(seed=1),
        "tasks": 2,
        "optimizer": torch.optim.SGD(theta.values(), lr=0.1),
        "steps": 1,
    } | changed
    return learn_tasks(**given)


def judged(**changed) -> object:
    one = learner()
    given: Any = {
        "learner": one,
        "meta_params": one.model.meta_params(),
        "sampler": Sinusoids(seed=1),
        "metric": mean_squared_error,
        "tasks": 2,
    } | changed
    return judge(**given)


@pytest.mark.parametrize(
    ("call", "name", "value", "message"),
    [
        *(
            (call, *rest)
            for call in (learned, judged)
            for rest in (
                ("learner", None, "learner must be a FewShotLearner, got None"),
                ("learner", nn.Linear(1, 1), "learner must be a FewShotLearner"),
                ("sampler", 3, "sampler must be a TaskSampler, got 3"),
                ("sampler", None, "sampler must be a TaskSampler, got None"),
                ("meta_params", None, "meta_params must be a dictionary from names to tensors"),
                ("meta_params", {}, "meta_params is empty"),
                ("tasks", math.nan, "tasks must be a whole number"),
                ("steps", math.nan, "steps must be a whole number"),
            )
        ),
        (judged, "metric", 3, "metric must be a function, got 3"),
        (learned, "callbacks", 3, "each a Callback, got 3"),
        (learned, "callbacks", [3], "each a Callback, got"),
        (learned, "callbacks", None, "each a Callback, got None"),
        (learned, "optimizer", None, "optimizer must be an Optimizer, got None"),
        (learned, "limit", math.nan, "limit must be a finite number above 0 or math.inf"),
        (learned, "validate", lambda theta: {}, "validate must return a dictionary with at least"),
        (learned, "validate", lambda theta: None, "validate must return a dictionary"),
    ],
)
def test_what_nothing_can_be_learned_with_is_named(call, name, value, message) -> None:
    with pytest.raises(eg.EquigradError, match=message):
        call(**{name: value})


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    scores = iter([math.nan, 5.0, math.nan, 4.0])
    recorder = Recorder()
    state = run(
        4,
        [recorder],
        validate=lambda theta: {"score": next(scores)},
        validate_every=1,
        keep_best="highest",
    )
    assert chosen(state)["center.0.weight"].equal(recorder.seen[1])
    with pytest.raises(
        eg.ConfigurationError, match="keep_best must be 'highest', 'lowest' or None"
    ):
        run(1, validate=lambda theta: {"score": 0.0}, keep_best="max")


def test_a_loop_that_the_clock_ends_validates_its_last_step() -> None:
    def slow(theta: object) -> dict[str, float]:
        time.sleep(0.06)
        return {"score": 0.0}

    state = run(10**6, limit=0.2, validate=slow, validate_every=1)
    assert "score" in state.history[-1]
    state = run(10**6, limit=0.2, validate=slow, validate_every=10**6)
    assert ["score" in row for row in state.history] == [False] * (state.step - 1) + [True]
