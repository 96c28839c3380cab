"""The main job: a regularisation strength for every weight, learned from ten images."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Linear, Module, Sequential, Tanh
from torch.nn.functional import cross_entropy

from equigrad.errors import ConfigurationError
from equigrad.estimators import T1T2, Contrastive, Estimator
from equigrad.evaluation import Evaluation
from equigrad.experiments import figures
from equigrad.experiments.run_directory import RunDirectory, versions
from equigrad.nn import ComplexSynapse
from equigrad.problem import Bilevel, Params
from equigrad.solvers import GradientDescent
from equigrad.training import Checkpoint, JsonLines, TensorBoard, learn, pick_device, pick_dtype
from equigrad.training.device import DeviceName, DtypeName
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.progress import ProgressBar

LEARNER = GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=500)
RULE = Contrastive(beta=0.1)

EstimatorName = Literal["contrastive", "t1t2"]
LABELS = {
    "unregularised": "unregularised",
    "single": "best single strength",
    "t1t2": "per weight, T1–T2",
    "contrastive": "per weight, contrastive",
}


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Learn a regularisation strength for every weight of a network that sees ten images.

    A tanh network learns from ten 8×8 digits, one a class; 890 validation images judge what it
    learned, and every weight's strength follows their gradient. Beside it: no regularisation, the
    best of 13 single strengths, and the other estimator, all on the same split and start.
    """

    seed: int = 0
    """Draws the split and the network's start."""

    seeds: int | None = None
    """Run seeds 0, 1 … N-1 instead and print mean ± standard error."""

    estimator: EstimatorName = "contrastive"
    """What learns the strengths that are saved and drawn."""

    compare: bool = True
    """Run the other rows of the table too."""

    scale: Literal["smoke", "small"] = "small"
    """`smoke` presets a few short steps, to see that all works."""

    outer_steps: int = 100
    """Steps of Adam on the strengths."""

    outer_lr: float = 0.01
    """Adam's step size."""

    initial_strength: float = 1e-3
    """Where every strength starts; strengths are clamped at zero."""

    hidden: tuple[int, ...] = (64, 64, 64)
    """Widths of the hidden layers."""

    solver: GradientDescent = LEARNER
    """How the network learns from the ten images: the free phase, from the same start each time."""

    contrastive: Contrastive = RULE
    """The contrastive rule; its nudged phases settle like the free one, but for their length."""

    nudged_steps: int = 100
    """Steps of each nudged phase."""

    checkpoint_every: int = 5
    """Outer steps between two checkpoints."""

    device: DeviceName = "auto"
    """Where to compute; `auto` takes CUDA where there is any."""

    dtype: DtypeName = "float32"
    """Floating-point type."""

    threads: int = 1
    """CPU threads; a network this small gains nothing from more."""

    def __post_init__(self) -> None:
        at_least = {
            "outer_steps": 1,
            "checkpoint_every": 1,
            "seed": 0,
            "threads": 1,
            "nudged_steps": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.seeds is not None and self.seeds < 1:
            raise ConfigurationError(f"seeds must be at least 1, got {self.seeds}")
        if self.seeds is not None and self.seed != 0:
            raise ConfigurationError(
                f"give seed={self.seed} for one run, or seeds={self.seeds} for seeds 0 to "
                f"{self.seeds - 1}, not both"
            )
        if not self.outer_lr > 0:
            raise ConfigurationError(f"outer_lr must be positive, got {self.outer_lr}")
        if not self.initial_strength >= 0:
            raise ConfigurationError(
                f"initial_strength must be at least 0, got {self.initial_strength}"
            )
        if any(width < 1 for width in self.hidden):
            raise ConfigurationError(f"hidden widths must be at least 1, got {self.hidden}")

    @classmethod
    def at_scale(cls, scale: str) -> Self:
        """The defaults of a scale."""
        if scale != "smoke":
            return cls()
        return cls(
            scale="smoke",
            outer_steps=3,
            solver=replace(LEARNER, max_steps=20),
            nudged_steps=5,
        )

    def rule(self) -> Contrastive:
        """The contrastive rule with its nudged solver."""
        nudged = replace(self.solver, max_steps=self.nudged_steps)
        return replace(self.contrastive, nudged_solver=self.contrastive.nudged_solver or nudged)


@dataclass(frozen=True)
class Split:
    """Images (n × 64, standardised) and labels (n)."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """A line of the table: accuracies in percent."""

    validation: float
    test: float
    gradient_evaluations: int
    seconds: float


def load_split(seed: int, device: torch.device, dtype: torch.dtype) -> Split:
    """Ten training images, the first of each class in a shuffle; 890 validation; 897 test.

    Pixels are shifted and scaled to zero mean and unit variance over training and validation
    images together; the test images have no part in it.
    """
    from sklearn.datasets import load_digits  # takes a second, which `--help` need not wait for

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order], labels[order]
    first = np.array([np.flatnonzero(labels == digit)[0] for digit in range(10)])
    rest = np.setdiff1d(np.arange(len(labels)), first)
    validation, test = rest[:890], rest[890:]
    seen = images[np.concatenate([first, validation])]
    images = (images - seen.mean()) / seen.std()

    def part(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor(images[indices], device=device, dtype=dtype),
            torch.tensor(labels[indices], device=device),
        )

    return Split(part(first), part(validation), part(test))


def make_network(config: Digits, seed: int) -> Module:
    """64 inputs, tanh layers, 10 outputs; PyTorch's default start, drawn from the seed."""
    widths = [64, *config.hidden]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[Module] = []
        for wide, narrow in pairwise(widths):
            layers += [Linear(wide, narrow), Tanh()]
        return Sequential(*layers, Linear(widths[-1], 10))


class Job:
    """One seed's data, network and losses, shared by all rows of the table."""

    def __init__(self, config: Digits, seed: int) -> None:
        self.config, self.seed = config, seed
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.split = load_split(seed, device, dtype)
        self.network = make_network(config, seed).to(device, dtype)

    def problem(self, synapse: ComplexSynapse) -> Bilevel:
        """Training loss plus the strengths' penalty inside, validation loss outside."""
        (x, y), (v, w) = self.split.train, self.split.validation
        return Bilevel(
            inner_loss=lambda params, meta_params: cross_entropy(synapse(params, x), y),
            outer_loss=lambda params, meta_params: cross_entropy(synapse(params, v), w),
            regularizer=synapse,
        )

    def accuracy(self, synapse: ComplexSynapse, params: Params) -> dict[str, float]:
        """Validation and test accuracy in percent."""
        found = {}
        with torch.no_grad():
            for name in ("validation", "test"):
                x, y = getattr(self.split, name)
                right = synapse(params, x).argmax(1) == y
                found[f"{name}_accuracy"] = 100 * right.double().mean().item()
        return found

    def settle(
        self, strength: float | None, meta_params: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, float], dict[str, Tensor], int]:
        """Learn from the ten images at fixed strengths: accuracies, weights, evaluations."""
        synapse = ComplexSynapse(self.network, strength=strength or 0.0)
        meta_params = meta_params or synapse.meta_params()
        with Evaluation(self.problem(synapse), synapse.params(), meta_params) as evaluation:
            settled = evaluation.settle(self.config.solver)
        evaluations = evaluation.gradient_evaluations
        return self.accuracy(synapse, settled.params), settled.params, evaluations

    def single(self, strengths: list[float]) -> tuple[Row, float]:
        """The best of some single strengths, chosen by validation accuracy."""
        began, tried, evaluations = time.perf_counter(), [], 0
        for strength in strengths:
            accuracy, _, count = self.settle(strength)
            tried.append((accuracy["validation_accuracy"], accuracy["test_accuracy"], strength))
            evaluations += count
        best = max(tried, key=lambda entry: entry[0])
        return Row(best[0], best[1], evaluations, time.perf_counter() - began), best[2]

    def learned(
        self, name: EstimatorName, directory: RunDirectory, *, resume: bool, console: Console
    ) -> Row:
        """Learn a strength for every weight, and leave the run in its directory."""
        if (ended := directory.result) is not None:
            return Row(
                ended["metrics"]["validation_accuracy"],
                ended["metrics"]["test_accuracy"],
                ended["gradient_evaluations"],
                ended["seconds"],
            )
        estimator: Estimator = self.config.rule() if name == "contrastive" else T1T2()
        synapse = ComplexSynapse(self.network, strength=self.config.initial_strength)
        meta_params = synapse.meta_params()
        torch.manual_seed(self.seed)
        state = learn(
            self.problem(synapse),
            synapse.params(),
            meta_params,
            solver=self.config.solver,
            estimator=estimator,
            optimizer=torch.optim.Adam(meta_params.values(), lr=self.config.outer_lr),
            steps=self.config.outer_steps,
            project=synapse.project_,
            evaluate=lambda params: self.accuracy(synapse, params),
            callbacks=[
                Checkpoint(
                    directory.path / "checkpoint.pt",
                    self.config.checkpoint_every,
                    resume=resume,
                    identity=directory.identity,
                ),
                JsonLines(directory.path / "metrics.jsonl"),
                TensorBoard(directory.path),
                ProgressBar(f"seed {self.seed} {name}", console),
            ],
        )
        console.print(f"seed {self.seed} {name}: {state.history[-1]['status']}", highlight=False)
        # what the last step of the strengths is worth: learn once more
        accuracy, params, evaluations = self.settle(None, meta_params)
        row = Row(
            accuracy["validation_accuracy"],
            accuracy["test_accuracy"],
            state.gradient_evaluations + evaluations,
            state.seconds,
        )
        learned = {"params": params, "meta_params": {n: m.detach() for n, m in meta_params.items()}}
        write_whole(directory.path / "learned.pt", as_bytes(learned))
        history = [
            *state.history,
            {"outer_step": self.config.outer_steps, **accuracy},
        ]
        figures.strength_learning(
            directory.path / "strengths.png",
            history=history,
            strengths={n: s.detach().cpu() for n, s in synapse.strengths(meta_params).items()},
            title=f"{LABELS[name]}, seed {self.seed}",
        )
        directory.write_json(
            "result.json",
            {
                "experiment": "digits",
                "estimator": name,
                "seed": self.seed,
                "scale": self.config.scale,
                "metrics": accuracy,
                "paper": None,
                "outer_steps": state.step,
                "gradient_evaluations": row.gradient_evaluations,
                "seconds": row.seconds,
                "device": str(pick_device(self.config.device)),
                "versions": versions(),
            },
        )
        return row


def run(config: Digits, out: Path, *, resume: bool, console: Console) -> dict[str, list[Row]]:
    """Run one seed in `out`, or several in `out/seed-N`, and print the table.

    Returns:
        The rows of the table by name, one a seed.
    """
    torch.set_num_threads(config.threads)
    seeds = [config.seed] if config.seeds is None else list(range(config.seeds))
    whole = None if config.seeds is None else RunDirectory(out, config, resume=resume)
    rows: dict[str, list[Row]] = {}
    for seed in seeds:
        one = replace(config, seed=seed, seeds=None)
        folder = out if whole is None else out / f"seed-{seed}"
        directory = RunDirectory(folder, one, resume=resume)
        for name, row in run_seed(one, directory, resume=resume, console=console).items():
            rows.setdefault(name, []).append(row)
    console.print(make_table(config, rows))
    if whole is not None:
        summary = {name: [vars(row) for row in each] for name, each in rows.items()}
        whole.write_json("summary.json", summary)
    return rows


def run_seed(
    config: Digits, directory: RunDirectory, *, resume: bool, console: Console
) -> dict[str, Row]:
    """All rows of the table for one seed."""
    job = Job(config, config.seed)
    rows: dict[str, Row] = {}
    if config.compare:
        began = time.perf_counter()
        accuracy, _, evaluations = job.settle(0.0)
        rows["unregularised"] = Row(
            accuracy["validation_accuracy"],
            accuracy["test_accuracy"],
            evaluations,
            time.perf_counter() - began,
        )
        rows["single"], strength = job.single([10 ** (k / 2) for k in range(-10, 3)])
        console.print(f"seed {config.seed} best single strength {strength:.3g}", highlight=False)
        other: EstimatorName = "t1t2" if config.estimator == "contrastive" else "contrastive"
        beside = RunDirectory(
            directory.path / other, replace(config, estimator=other), resume=resume
        )
        rows[other] = job.learned(other, beside, resume=resume, console=console)
    rows[config.estimator] = job.learned(
        config.estimator, directory, resume=resume, console=console
    )
    if config.compare:
        directory.write_json("table.json", {name: vars(row) for name, row in rows.items()})
    return {name: rows[name] for name in LABELS if name in rows}


def make_table(config: Digits, rows: dict[str, list[Row]]) -> Table:
    """Mean ± standard error over seeds; one number where there is one seed."""
    last = (config.seeds or 1) - 1
    seeds = f"seeds 0–{last}" if last else f"seed {config.seed}"
    table = Table(
        title=f"digits, 10 training images, {seeds}, scale {config.scale}: accuracy and cost"
    )
    table.add_column("")
    for name in ("validation %", "test %", "gradients", "seconds"):
        table.add_column(name, justify="right")
    for name, each in rows.items():

        def column(read: Callable[[Row], float], form: str, each: list[Row] = each) -> str:
            values = np.array([read(row) for row in each])
            mean = format(values.mean(), form)
            if len(values) == 1:
                return mean
            return f"{mean} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"

        table.add_row(
            LABELS[name],
            column(lambda row: row.validation, ".2f"),
            column(lambda row: row.test, ".2f"),
            format(round(np.mean([row.gradient_evaluations for row in each])), ","),
            format(np.mean([row.seconds for row in each]), ".1f"),
        )
    return table
