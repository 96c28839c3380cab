"""The trials of a search on Ray Tune; importing this needs the extra `search`."""

import logging
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from equigrad.errors import RunError
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.search.trials import Search, Trial
from equigrad.gradient import MetaGradient
from equigrad.training import Callback, Checkpoint, JsonLines, OuterState

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # EQUIGRAD_DATA may be relative
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search, as it ends a run
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no accuracy
}
"""Environment variables for Ray."""

STEP, SCORE = "outer_step", "validation"
"""Names of the values that are reported to Ray after an outer step."""


def run_trials(
    config: Search, trials: Sequence[Trial], out: Path, changed: Callable[[Trial], None]
) -> None:
    """Run the trials that have not ended, and record their progress in them.

    Args:
        config: settings of the search: parallel trials, machines, and when to stop a trial.
        trials: all trials; the scheduler is given the results of those that have ended.
        out: folder of the search, which all machines of a cluster must see.
        changed: called with a trial after each of its outer steps and at its end.

    Raises:
        RunError: Ray does not start, or lacks the resources of a trial.
    """
    threads, gpus = config.experiment.threads, gpus_of(config)
    scratch = out.resolve() / ".ray"  # Ray's own files, not needed later
    waiting = {trial.number: trial for trial in trials if not trial.ended}
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed search
    os.environ.update(QUIET)
    try:
        start_ray(config)
        have = ray.cluster_resources()
        for what, need in (("CPU", threads), ("GPU", gpus)):
            if need > have.get(what, 0):
                raise RunError(
                    f"a trial asks for {need:g} {what}s, and Ray has {have.get(what, 0):g}; see "
                    f"--threads, --gpus and --device"
                )
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(attempt, trials=waiting), {"cpu": threads, "gpu": gpus}
            ),
            param_space={"number": tune.grid_search(list(waiting))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler(config, trials),
                max_concurrent_trials=config.parallel,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[Notes(waiting, changed)],
            ),
        ).fit()
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def gpus_of(config: Search) -> float:
    """The number of GPUs of a trial."""
    if config.gpus is not None:
        return config.gpus
    return float(config.experiment.device != "cpu" and torch.cuda.is_available())


def start_ray(config: Search) -> None:
    """Start Ray here, or join a cluster."""
    own: dict[str, Any] = {}
    if config.address is not None:
        reach(config.address)
    else:
        threads = config.experiment.threads
        parallel = config.parallel or max(1, (os.cpu_count() or 1) // threads)
        own = {"num_cpus": parallel * threads, "include_dashboard": False}
    try:
        ray.init(
            address=config.address or "local",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {config.address}" if config.address else "here"
        raise RunError(f"Ray does not start {where}: {error}") from error


def reach(address: str) -> None:
    """Raise at once if nothing listens at an address; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise RunError(
                f"no Ray cluster answers at {address} ({error}); `ray start --head` prints its "
                f"address where it is started"
            ) from error


def scheduler(config: Search, trials: Sequence[Trial]) -> ASHAScheduler:
    """ASHA with the results of the trials that have ended, which Ray's own `restore` forgets."""
    steps = config.experiment.outer_steps
    asha = ASHAScheduler(
        time_attr=STEP,
        metric=SCORE,
        mode="max",
        max_t=steps,
        grace_period=min(config.grace_period, steps),
        reduction_factor=config.reduction_factor,
    )
    controller: Any = None  # ASHA does not use it
    for trial in trials:
        if trial.ended:
            past: Any = SimpleNamespace(trial_id=f"ended-{trial.number}")
            asha.on_trial_add(controller, past)
            for step, score in trial.history:
                asha.on_trial_result(controller, past, {STEP: step, SCORE: score})
    return asha


def attempt(words: dict[str, int], trials: dict[int, Trial]) -> None:
    """Run or resume a trial in its folder, in a process of Ray."""
    trial = trials[words["number"]]
    config = trial.config
    torch.set_num_threads(config.threads)
    try:
        directory = RunDirectory(trial.folder, config, resume=True)
        checkpoint = Checkpoint(
            trial.folder / "checkpoint.pt",
            config.checkpoint_every,
            resume=True,
            identity=directory.identity,
        )
        log = JsonLines(trial.folder / "metrics.jsonl")
        trainer = config.trainer(config.seed)
        watchers = [checkpoint, log, Report(f"validation_{trainer.split.target.score}")]
        _, row = trainer.learn(config.estimator, watchers)
    except Exception as error:
        (trial.folder / "error.txt").write_text(traceback.format_exc())
        # a full disk, for example, says nothing about the point: the trial counts as not ended
        lost = isinstance(error, OSError)
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        tune.report({"lost" if lost else "failed": said})
        return
    tune.report({STEP: config.outer_steps, SCORE: row.validation, "seconds": row.seconds})


class Report(Callback):
    """Reports the score to Ray after every outer step, including those before a resume.

    Args:
        score: its name in the rows of the history.
    """

    def __init__(self, score: str) -> None:
        self.score = score

    def on_start(self, state: OuterState) -> None:
        """Report the results so far to the scheduler."""
        for row in state.history:
            self._tell(row)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Report the step's score; ends the loop if the scheduler stops the trial."""
        self._tell(state.history[-1])

    def _tell(self, row: dict[str, Any]) -> None:
        tune.report({STEP: row[STEP], SCORE: row[self.score], "seconds": row["seconds"]})


class Notes(tune.Callback):
    """Records Ray's reports in the trials."""

    def __init__(self, trials: dict[int, Trial], changed: Callable[[Trial], None]) -> None:
        self.trials, self.changed = trials, changed

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles its callbacks for its own restore

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a report."""
        noted = self.trials[trial.config["number"]]
        if SCORE in result and (not noted.history or result[STEP] > noted.outer_steps):
            noted.history.append((result[STEP], result[SCORE]))
            noted.seconds = result["seconds"]
            self.changed(noted)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial has ended, or was stopped."""
        noted, last = self.trials[trial.config["number"]], trial.last_result
        if "failed" in last:
            noted.status, noted.error = "failed", last["failed"]
        elif "lost" in last:
            noted.status, noted.error = "lost", last["lost"]
        else:
            whole = noted.outer_steps >= noted.config.outer_steps
            noted.status = "whole" if whole else "stopped"
        self.changed(noted)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that the process of a trial has died."""
        noted = self.trials[trial.config["number"]]
        noted.status, noted.error = "lost", "its process died"
        self.changed(noted)
