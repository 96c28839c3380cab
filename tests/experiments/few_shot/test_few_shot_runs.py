"""The harness of the few-shot experiments: every learner, by the clock, stopped and resumed."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import pytest
import torch
from rich.console import Console
from torch import nn

import equigrad as eg
from equigrad.errors import ConfigurationError, RunError
from equigrad.estimators import Estimator
from equigrad.experiments.few_shot.harness import (
    TASK_LEARNER,
    TEST,
    VALIDATION,
    FewShot,
    Tasks,
)
from equigrad.experiments.few_shot.meta_training import MetaTrainer, meta_train
from equigrad.experiments.few_shot.methods import FEW_SHOT_METHODS, FewShotMethodName
from equigrad.nn.side_by_side import Batching
from equigrad.tasks import Sinusoids
from equigrad.training import Callback
from equigrad.training.few_shot import mean_squared_error

LEARNER = eg.GradientDescent(lr=0.02, max_steps=3)
RULE = eg.Contrastive(scheme="symmetric")
QUIET = Console(quiet=True)


@dataclass(frozen=True, kw_only=True)
class Curves(FewShot):
    """Sinusoids by a few units with layer normalisation."""

    score: ClassVar[str] = "error"
    best: ClassVar[Literal["highest", "lowest"]] = "lowest"
    metric = staticmethod(mean_squared_error)
    loss = staticmethod(nn.functional.mse_loss)

    solver: eg.GradientDescent = LEARNER
    estimator: Estimator = RULE
    nudged_steps: int = 2
    outer_steps: int = 6
    tasks: int = 3
    shot: int = 5
    validate_every: int = 3
    validation_tasks: int = 4
    test_tasks: int = 6
    batching: Batching = "vmap"
    threads: int = 1

    @classmethod
    def _preset(cls, method: FewShotMethodName, **chosen: str) -> Self:
        return cls()

    @property
    def name(self) -> str:
        return "curves"

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))

    def sources(self, device: torch.device, dtype: torch.dtype) -> Tasks:
        return Tasks(
            train=Sinusoids(shots=self.shot, seed=self.seed),
            validation=Sinusoids(shots=self.shot, seed=VALIDATION),
            test=Sinusoids(shots=self.shot, seed=TEST),
            note="sinusoids",
        )


@pytest.mark.parametrize("method", FEW_SHOT_METHODS)
def test_every_method_leaves_a_whole_run(method, tmp_path):
    config = Curves.preset(method=method)
    metrics = meta_train(config, tmp_path, resume=False, console=QUIET)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"] == metrics
    assert (result["method"], result["seed"], result["tasks"]) == (method, 0, "sinusoids")
    learned = method != "scratch"
    assert result["outer_steps"] == (6 if learned else 0)
    assert ("validation_error" in metrics) == learned  # scratch learns nothing that is watched
    assert math.isfinite(metrics["test_error"])
    assert metrics["test_error_interval"] > 0
    assert not [name for name in metrics if "support" in name]  # no batch, no statistics
    learner, meta_params = Curves.load_learner(tmp_path)
    # what is loaded says of the test's tasks what the run said
    batch = Sinusoids(shots=5, seed=TEST).sample(6, 0)
    outputs = learner.predict(learner.settle(meta_params, batch), meta_params, batch)
    again = mean_squared_error(outputs, batch.query[1]).mean().item()
    assert again == pytest.approx(metrics["test_error"], rel=1e-5)


def test_what_is_kept_is_the_best_of_validation(tmp_path):
    config = replace(Curves.preset(), outer_lr=0.3, validate_every=1)
    metrics = meta_train(config, tmp_path, resume=False, console=QUIET)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics["validation_error"] == min(row["validation_error"] for row in rows)
    _, meta_params = Curves.load_learner(tmp_path)
    assert (
        MetaTrainer(config).validate(meta_params)["validation_error"] == metrics["validation_error"]
    )


class Stop(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, state, result) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = replace(Curves.preset(), decay=True, average_from=2, outer_lr=0.05)
    whole = meta_train(config, tmp_path / "whole", resume=False, console=QUIET)
    learn = MetaTrainer.learn
    monkeypatch.setattr(MetaTrainer, "learn", lambda job, calls: learn(job, [*calls, Stop(4)]))
    with pytest.raises(KeyboardInterrupt):
        meta_train(config, tmp_path / "one", resume=False, console=QUIET)
    monkeypatch.setattr(MetaTrainer, "learn", learn)
    assert meta_train(config, tmp_path / "one", resume=True, console=QUIET) == whole
    assert (
        meta_train(config, tmp_path / "one", resume=True, console=QUIET) == whole
    )  # nothing to do
    one, other = (Curves.load_learner(tmp_path / name)[1] for name in ("one", "whole"))
    assert all(one[name].equal(value) for name, value in other.items())


def test_the_clock_ends_meta_training_and_survives_a_stop(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("equigrad.training.loop.time.perf_counter", lambda: 10.0 * next(ticks))
    # a step takes 20 s, what is measured after its gradient, and after its validation
    config = replace(Curves.preset(), minutes=1.5, outer_steps=1, validate_every=1000, decay=True)
    rates: list[float] = []

    class Rates(Callback):
        acts = True  # so that it comes after the step size has fallen

        def on_step(self, state, result) -> None:
            rates.append(state.optimizer.param_groups[0]["lr"])

    learn = MetaTrainer.learn
    monkeypatch.setattr(
        MetaTrainer, "learn", lambda job, calls: learn(job, [*calls, Rates(), Stop(2)])
    )
    with pytest.raises(KeyboardInterrupt):
        meta_train(config, tmp_path, resume=False, console=QUIET)
    monkeypatch.setattr(MetaTrainer, "learn", lambda job, calls: learn(job, [*calls, Rates()]))
    meta_train(config, tmp_path, resume=True, console=QUIET)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [20, 40, 60, 80, 100]
    assert ["validation_error" in row for row in rows] == [False] * 4 + [True]
    # the second step was stopped before its rate was noted
    assert rates == pytest.approx([1e-3 * (1 - s / 90) for s in (20, 60, 80)] + [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, or None, got 0"),
        ({"minutes": 0}, "minutes must be a finite number above 0, or None, got 0"),
        ({"strength": -1}, "strength must be a finite number of at least 0, got -1"),
        ({"test_tasks": 1}, "test_tasks must be a whole number of at least 2, got 1"),
        ({"method": "maml"}, r"'maml' needs the estimator MAML, got Contrastive.*preset\(method="),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(Curves.preset(), **changes)


def test_methods_that_are_none():
    with pytest.raises(
        ConfigurationError, match=r"must be 'contrastive-modulation', .* got 'anil'"
    ):
        Curves.preset(method="anil")


def test_files_that_are_no_learner(tmp_path):
    with pytest.raises(RunError, match=r"there is no .*model\.pt"):
        Curves.load_learner(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read as a few-shot learner"):
        Curves.load_learner(tmp_path)
    torch.save({"format": TASK_LEARNER, "experiment": "omniglot"}, tmp_path / "model.pt")
    with pytest.raises(RunError, match="it is of 'omniglot', expected 'curves'"):
        Curves.load_learner(tmp_path)
