"""Sinusoids: every method by its own settings on the same tasks, resumed, and what it leaves."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from rich.console import Console

from equigrad.errors import ConfigurationError, RunError
from equigrad.estimators import MAML
from equigrad.experiments.few_shot.meta_training import MetaTrainer
from equigrad.experiments.few_shot.methods import FewShotMethodName
from equigrad.experiments.few_shot.sinusoid import LOOKS, OWN, Sinusoid, compare_learners

QUIET = Console(quiet=True)


def smoke(**changes) -> Sinusoid:
    return replace(Sinusoid.preset(scale="smoke"), **changes)


def test_methods_beside_each_other(tmp_path, monkeypatch):
    few: list[FewShotMethodName] = ["contrastive-synaptic", "maml", "scratch"]
    monkeypatch.setattr(
        "equigrad.experiments.few_shot.sinusoid.OWN", {name: OWN[name] for name in few}
    )
    rows = compare_learners(smoke(), tmp_path, resume=False, console=QUIET)
    assert list(rows) == few
    for method, (row,) in rows.items():
        result = json.loads((tmp_path / method / "result.json").read_text())
        assert result["method"] == method
        assert row.test == result["metrics"]["test_mean_squared_error"]
        assert (tmp_path / method / "fits.png").exists()
    table = json.loads((tmp_path / "table.json").read_text())
    assert {method: row["test"] for method, (row,) in table.items()} == {
        method: row.test for method, (row,) in rows.items()
    }
    assert (tmp_path / "comparison.png").exists()


def test_seeds_stopped_and_resumed(tmp_path, monkeypatch):
    config = smoke(method="maml", estimator=MAML(), compare=False, seeds=2)
    learn = MetaTrainer.learn

    def fail_at_the_second(job, calls):
        if job.config.seed == 1:
            raise KeyboardInterrupt
        return learn(job, calls)

    monkeypatch.setattr(MetaTrainer, "learn", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare_learners(config, tmp_path, resume=False, console=QUIET)
    begun = []
    monkeypatch.setattr(
        MetaTrainer, "learn", lambda job, calls: begun.append(job) or learn(job, calls)
    )
    (one, other) = compare_learners(config, tmp_path, resume=True, console=QUIET)["maml"]
    assert [job.config.seed for job in begun] == [1]  # seed 0 had ended
    assert one.test != other.test
    with pytest.raises(RunError, match="seeds: there 2, here 3"):
        compare_learners(replace(config, seeds=3), tmp_path, resume=True, console=QUIET)


def test_all_methods_have_one_network_one_stream_of_tasks_and_their_own_settings():
    config = smoke(outer_steps=7, tasks=5, strength=0.5, hidden=(8,))
    jobs = {method: MetaTrainer(config.of(method, seed=3)) for method in OWN}
    for method, job in jobs.items():
        assert (job.config.outer_steps, job.config.tasks, job.config.seed) == (7, 5, 3)
        for name, weight in jobs["maml"].learner.model.module().state_dict().items():
            assert job.learner.model.module().state_dict()[name].equal(weight), method
        assert job.tasks.train == jobs["maml"].tasks.train
    assert jobs["contrastive-synaptic"].config.strength == 0.5  # asked for
    assert jobs["imaml"].config.strength == Sinusoid.preset(method="imaml").strength


def test_tasks_of_training_validation_and_test_differ():
    tasks = MetaTrainer(smoke()).tasks
    assert tasks.validation is not None
    drawn = [s.sample(1, 0).support[0] for s in (tasks.train, tasks.validation, tasks.test)]
    for one, other in combinations(drawn, 2):
        assert not one.equal(other)


def test_the_test_is_taken_after_the_steps_it_says(tmp_path):
    rows = compare_learners(
        smoke(compare=False, test_steps=5), tmp_path, resume=False, console=QUIET
    )
    (row,) = rows["contrastive-synaptic"]
    looks = dict(row.adaptation)
    assert list(looks) == list(LOOKS)
    assert looks[5] == pytest.approx(row.test, rel=1e-6)
    # without adaptation, θ itself answers
    job = MetaTrainer(smoke())
    learner, meta_params = Sinusoid.load_learner(tmp_path)
    batch = job.tasks.test.sample(job.config.test_tasks, 0)
    network = learner.model.module({n.removeprefix("center."): m for n, m in meta_params.items()})
    with torch.no_grad():
        error = (network(batch.query[0]) - batch.query[1]).square().mean().item()
    assert looks[0] == pytest.approx(error, rel=1e-5)


def test_contrast_learns_to_learn():
    config = replace(Sinusoid.preset(), test_tasks=60, test_steps=10)
    job = MetaTrainer(replace(config, outer_steps=30, average_from=None, validation_tasks=2))
    start = job.learner.model.meta_params()
    before, after = (
        job.judge(meta_params, job.tasks.test, 60).mean
        for meta_params in (start, job.learn().meta_params)
    )
    # a constant errs by A² / 2 at best, 4.25 on average; a random start stays near that for long
    assert after < before / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "contrastive-modulation"}, "no normalisation layer.*one of contrastive-syn"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, or None, got 0"),
        ({"seed": 1, "seeds": 2}, "seeds=2 means seeds 0 to 1, and seed=1 means a single run"),
        ({"hidden": (40, 0)}, r"hidden must be .*of at least 1, got \(40, 0\)"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        smoke(**changes)
