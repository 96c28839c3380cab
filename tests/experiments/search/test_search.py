"""Searches: killed and gone on with, with trials that fail, are stopped or are lost."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="searches need the extra 'search'")

from equigrad.experiments.search import ray_trials, search
from equigrad.experiments.search.trials import Trial, preset
from equigrad.experiments.strengths.digits import Digits
from equigrad.experiments.strengths.strength_learning import StrengthTrainer
from helpers import call_main

COMMAND = ["search", "digits", "--scale", "smoke", "--device", "cpu", "--out", "mine"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def give_space(folder, **domains):
    (folder / "space.json").write_text(json.dumps(domains))
    return ["--space", "space.json"]


def table(folder):
    return list(csv.DictReader((folder / "mine" / "trials.csv").read_text().splitlines()))


def equigrad(*words):
    return subprocess.Popen(
        [sys.executable, "-c", "from equigrad.cli import main; main()", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_search_goes_on(folder, capsys):
    """One trial at a time, in the order that the seed draws: the good rate first."""
    words = [*COMMAND, *give_space(folder, **{"solver.lr": [1e-6, 1e9, 0.03]}), "--seed", "101"]
    words += ["--parallel", "1", "--grace-period", "1", "--reduction-factor", "2"]
    first = folder / "mine" / "trials" / "000"
    killed = equigrad(*words)
    deadline = time.monotonic() + 300
    while not (first / "trial.json").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (folder / "mine" / "best.json").exists()
    ended = {path: path.stat().st_mtime_ns for path in first.iterdir()}

    resumed = equigrad(*words, "--resume")
    said, complaints = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, complaints
    assert complaints == ""
    assert "1 whole, 1 stopped, 1 failed" in said
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == ended
    rows = {float(row["solver.lr"]): row for row in table(folder)}
    # the scheduler was told of the trial that had ended before the kill
    assert (rows[0.03]["status"], rows[1e-6]["status"]) == ("whole", "stopped")
    assert (rows[0.03]["outer_steps"], rows[1e-6]["outer_steps"]) == ("3", "1")
    assert rows[1e9]["error"].startswith("SettlingError: the phase with β = 0 diverged")
    assert not any("test" in column for column in rows[0.03])

    # what was best is what a run of it finds
    run = ["run", "digits", "--config", "mine/best.json", "--seed", "101", "--no-compare"]
    assert call_main(*run, "--out", "best", capsys=capsys)[0] == 0
    metrics = json.loads((folder / "best" / "result.json").read_text())["metrics"]
    assert metrics["validation_accuracy"] == float(rows[0.03]["validation"])
    assert json.loads((folder / "mine" / "best.json").read_text())["config"]["seed"] == 0


def trial_of(folder, **options):
    config = preset(Digits, scale="smoke").experiment
    (folder / "trial").mkdir()
    return Trial(number=0, point={}, config=config, folder=folder / "trial", **options)


def test_a_trial_goes_on_where_it_was_stopped(folder, monkeypatch):
    trial, told = trial_of(folder), []
    trial.config = replace(trial.config, checkpoint_every=1)

    def report(row, stop_after):
        told.append(row)
        if len(told) == stop_after:
            raise SystemExit  # as Ray ends a trial

    monkeypatch.setattr(ray_trials.tune, "report", lambda row: report(row, 2))
    with pytest.raises(SystemExit):
        ray_trials.attempt({"number": 0}, {0: trial})
    before, told[:] = list(told), []
    monkeypatch.setattr(ray_trials.tune, "report", lambda row: report(row, None))
    ray_trials.attempt({"number": 0}, {0: trial})
    assert [row["outer_step"] for row in told] == [0, 1, 2, 3]
    assert told[0] == before[0]  # what is known is told, not computed again
    whole, end = StrengthTrainer(trial.config, trial.config.seed).learn("contrastive")
    accuracies = [row["validation_accuracy"] for row in whole.state.history]
    assert [row["validation"] for row in told] == [*accuracies, end.validation]


def test_a_full_disk_is_no_fault_of_the_point(folder, monkeypatch):
    told = []
    monkeypatch.setattr(ray_trials.tune, "report", told.append)
    trial = trial_of(folder)
    (trial.folder / "checkpoint.pt").write_bytes(b"junk")
    ray_trials.attempt({"number": 0}, {0: trial})
    assert [*told[0]] == ["lost"]
    assert "RunError" in told[0]["lost"]
    assert "Traceback" in (trial.folder / "error.txt").read_text()


@pytest.fixture
def without_ray(monkeypatch):
    """Trials that end as their learning rate says."""
    ends = {0.1: ("whole", 3, 90.0), 0.2: ("stopped", 1, 99.0), 0.3: ("failed", 0, None)}
    ends |= {0.4: ("whole", 3, 80.0), 0.5: ("lost", 0, None)}

    def run_trials(config, trials, out, changed):
        for trial in trials:
            if not trial.ended:
                trial.status, steps, accuracy = ends[trial.point["solver.lr"]]
                trial.history = [] if accuracy is None else [(steps, accuracy)]
                trial.error = "" if accuracy else "SettlingError: diverged"
                changed(trial)

    monkeypatch.setattr(search, "ray_trials", lambda: SimpleNamespace(run_trials=run_trials))
    return ends


@pytest.mark.usefixtures("without_ray")
def test_the_best_is_one_that_went_all_the_way(folder, capsys):
    rates = [0.1, 0.2, 0.3, 0.4]
    code, said = call_main(*COMMAND, *give_space(folder, **{"solver.lr": rates}), capsys=capsys)
    assert code == 0
    best = json.loads((folder / "mine" / "best.json").read_text())
    assert (best["point"], best["validation_accuracy"], best["seed"]) == (
        {"solver.lr": 0.1},
        90.0,
        100,
    )
    assert best["config"]["solver"]["lr"] == 0.1
    assert "equigrad run digits --config mine/best.json --seeds 3" in said
    assert said.index("90.00 ") < said.rindex("80.00 ") < said.rindex("99.00 ")
    assert (folder / "mine" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_lost_trials_are_run_again_and_no_others(folder, without_ray, capsys):
    words = [*COMMAND, *give_space(folder, **{"solver.lr": [0.1, 0.3, 0.5]})]
    code, said = call_main(*words, capsys=capsys)
    assert code == 2
    assert "1 of 3 trials were lost" in said
    assert "SettlingError: diverged. All else is kept: add --resume" in said
    without_ray.clear()
    without_ray[0.5] = ("whole", 3, 95.0)
    code, said = call_main(*words, "--resume", "--parallel", 2, capsys=capsys)
    assert code == 0
    assert sorted(row["validation"] for row in table(folder)) == ["90.0", "95.0", "nan"]


@pytest.mark.usefixtures("without_ray")
def test_all_trials_failed(folder, capsys):
    words = give_space(folder, **{"solver.lr": [0.3]})
    code, said = call_main(*COMMAND, *words, capsys=capsys)
    assert code == 2
    assert "all 1 trials failed, trial 0 for one: SettlingError: diverged" in said
    assert len(table(folder)) == 1


def test_the_scheduler_is_told_of_trials_that_have_ended(folder):
    config = preset(Digits)
    past = [trial_of(folder, status="whole", history=[(i, 50.0 + i) for i in range(101)])]
    for trials, decision in ((past, "STOP"), ([], "CONTINUE")):
        asha = ray_trials.scheduler(config, trials)
        new: Any = SimpleNamespace(trial_id="new")
        controller: Any = None
        asha.on_trial_add(controller, new)
        for step, accuracy, decided in ((9, 0.0, "CONTINUE"), (10, 59.0, decision)):
            row = {"outer_step": step, "validation": accuracy}
            assert asha.on_trial_result(controller, new, row) == decided


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "trials must be a whole number of at least 1, 'grid' or None, got 0"),
        (["--grace-period", "0"], "grace_period must be a whole number of at least 1, got 0"),
        (["--reduction-factor", "1"], "reduction_factor must be a finite number above 1, got 1"),
        (["--parallel", "0"], "parallel must be a whole number of at least 1, or None, got 0"),
        (["--gpus", "-1"], "gpus must be a finite number of at least 0, or None, got -1"),
        (["--seed", "0", "--seeds", "3"], "given by seed; got seeds=3"),
        (["--space", "gone.json"], "cannot read gone.json"),
        (["--space", "space.json"], "there is no solver.rate; GradientDescent has max_steps"),
        (["--resume"], "cannot resume mine"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_wrong_words_end_with_code_2(folder, capsys, words, message):
    give_space(folder, **{"solver.rate": [0.1]})
    code, said = call_main(*COMMAND, *words, capsys=capsys)
    assert code == 2
    assert message in said


def test_without_ray_nothing_is_written(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "equigrad.experiments.search.ray_trials")
    code, said = call_main(*COMMAND, capsys=capsys)
    assert code == 2
    assert "pip install 'equigrad[search]'" in said
    assert not (folder / "mine").exists()
