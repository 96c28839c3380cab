"""Meta-training and meta-test of a few-shot learner."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm

from equigrad.experiments.few_shot.harness import TASK_LEARNER, FewShot
from equigrad.experiments.runs.formats import as_rich, words
from equigrad.experiments.runs.model import save_model
from equigrad.experiments.runs.run_directory import RunDirectory, describe
from equigrad.experiments.runs.training import Trainer
from equigrad.nn.batch_statistics import BatchStatistics
from equigrad.problems import Params
from equigrad.tasks import TaskSampler
from equigrad.tasks.learner import Statistics
from equigrad.training import Callback, OuterState, pick_device, pick_dtype
from equigrad.training.few_shot import Score, chosen, judge, learn_tasks
from equigrad.training.precision import computing_in


class MetaTrainer(Trainer[FewShot]):
    """Meta-trains a few-shot learner, and tests it.

    Args:
        config: settings of the experiment.

    Attributes:
        config: settings of the experiment.
        tasks: where tasks come from.
        learner: the few-shot learner in meta-training.
        tested: the few-shot learner in validation and test.
        device: the device that all is computed on.
    """

    def __init__(self, config: FewShot) -> None:
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.config, self.device = config, device
        self.score = config.score
        self.tasks = config.sources(device, dtype)
        self.digest = self.tasks.digest
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = config.network()
        self.learner = config.learner(network.to(device, dtype))
        self.tested = config.as_tested(self.learner)

    def precision(self) -> AbstractContextManager[None]:
        """A context in which products and convolutions have the precision of the settings."""
        return computing_in(self.config.precision, self.device)

    def notes(self) -> list[str]:
        """Notes for readers of the results: those of the experiment, and of the device."""
        if self.config.precision != "tf32" or self.device.type == "cuda":
            return list(self.config.notes())
        idle = f"precision tf32 does nothing on a {self.device.type}, which computes in float32"
        return [*self.config.notes(), idle]

    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Meta-train; with the method `scratch`, nothing is meta-trained."""
        config = self.config
        meta_params = self.learner.model.meta_params()
        watched = self.tasks.validation is not None
        with torch.random.fork_rng(), self.precision():
            torch.manual_seed(config.seed)
            return learn_tasks(
                self.learner,
                meta_params,
                self.tasks.train,
                tasks=config.tasks,
                optimizer=torch.optim.AdamW(
                    meta_params.values(), lr=config.outer_lr, weight_decay=config.weight_decay
                ),
                steps=0 if config.method == "scratch" else config.unless_timed(config.outer_steps),
                limit=config.limit,
                average_from=config.average_from,
                validate=self.validate if watched else None,
                validate_every=config.validate_every,
                keep_best=config.best if watched else None,
                callbacks=callbacks,
            )

    def validate(self, meta_params: Params) -> dict[str, float]:
        """The score on validation tasks."""
        assert self.tasks.validation is not None
        score = self.judge(meta_params, self.tasks.validation, self.config.validation_tasks)
        return {f"validation_{self.config.score}": score.mean}

    def test(self, meta_params: Params) -> dict[str, Score]:
        """The score on test tasks, with each kind of batch statistics that makes a difference."""
        modules = self.tested.model.module().modules()
        normalised = any(isinstance(m, _BatchNorm | BatchStatistics) for m in modules)
        kinds: tuple[Statistics, ...] = ("query", "support") if normalised else ("query",)
        count = self.config.test_tasks
        return {kind: self.judge(meta_params, self.tasks.test, count, kind) for kind in kinds}

    def judge(
        self,
        meta_params: Params,
        sampler: TaskSampler,
        tasks: int,
        statistics: Statistics | None = None,
    ) -> Score:
        """The score on tasks from a sampler."""
        metric = self.config.metric
        return judge(self.tested, meta_params, sampler, metric, tasks=tasks, statistics=statistics)

    def finish(self, state: OuterState, folder: Path, console: Console) -> dict[str, Any]:
        """Save the learner, test it, and draw the experiment's figures."""
        config, meta_params = self.config, chosen(state)
        save_model(
            folder,
            TASK_LEARNER,
            experiment=type(config).__name__.lower(),
            config=describe(config),
            network=self.learner.model.module().state_dict(),
            meta_params=meta_params,
        )
        began = time.perf_counter()
        with self.precision():
            metrics = self.metrics(state, self.test(meta_params))
            test_seconds = time.perf_counter() - began
            config.draw(self, meta_params, folder)
        return {
            "metrics": metrics,
            "paper": config.published(),
            "tasks": self.tasks.note,
            "notes": self.notes(),
            "test_seconds": test_seconds,
        }

    def metrics(self, state: OuterState, scores: Mapping[str, Score]) -> dict[str, float]:
        """The best validation score and all test scores by name, with half-widths of intervals."""
        name = self.config.score
        watched = [
            float(row[f"validation_{name}"]) for row in state.history if f"validation_{name}" in row
        ]
        pick = max if self.config.best == "highest" else min
        found = {f"validation_{name}": pick(watched)} if watched else {}
        for statistics, score in scores.items():
            test = "test" if statistics == "query" else f"test_{statistics}_statistics"
            found |= {f"{test}_{name}": score.mean, f"{test}_{name}_interval": score.interval}
        return found


def meta_train(config: FewShot, out: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Meta-train and test in `out`, and print the results.

    Returns:
        The metrics by name.
    """
    torch.set_num_threads(config.threads)
    trainer = MetaTrainer(config)
    directory = RunDirectory(out, config, resume=resume)
    for line in (trainer.tasks.note, *trainer.notes()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    metrics = trainer.learned(directory, resume=resume, console=console)
    console.print(metrics_table(config, metrics))
    return metrics


def metrics_table(config: FewShot, metrics: Mapping[str, float]) -> Table:
    """A table of all metrics: test scores with their intervals, beside the paper's."""
    published = config.published()
    rows = []
    for name, value in metrics.items():
        if name.endswith("_interval"):
            continue
        said = f"{value:.4g}"
        if (interval := metrics.get(f"{name}_interval")) is not None:
            said += f" ± {interval:.2g} ({config.test_tasks} tasks)"
        row = [words(name), said]
        if published is not None:
            paper = published.get(name)
            spread = published.get(f"{name}_standard_deviation")
            row.append("" if paper is None else f"{paper} ± {spread}")
        rows.append(row)
    title = f"{config.name}, {config.label}, seed {config.seed}, scale {config.scale}"
    return as_rich(title, ["reached", *([] if published is None else ["in the paper"])], rows)
