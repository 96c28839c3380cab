"""Which training examples help: the derivative of the validation loss by a weight of each."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from equigrad.errors import RunError
from equigrad.estimators import Contrastive, Estimator
from equigrad.fields import Count, expect
from equigrad.gradient import meta_gradient, settle
from equigrad.solvers import Solver
from equigrad.training.example_weights import ExampleLoss, WeightedTraining, weighted_training
from equigrad.training.files import load_tensors, save_tensors, write_whole
from equigrad.training.ranked import Ranked

TRUSTED = 0.6
"""Scores whose ranks agree less than this, between runs, phases or nudges, are named."""

GENTLER = 10.0
"""By what β is divided to see whether the ranks depend on it."""


@dataclass(frozen=True, kw_only=True)
class ExampleScores(Ranked):
    """How much each training example, or each source, lowers the validation loss.

    Attributes:
        names: of the sources; the examples' numbers otherwise.
        scores: `-dL_val/dw_i` at `w = 1`, one an example or a source; below zero is harmful.
        agreement: Spearman's correlation of the scores of two training runs with other batches and
            random numbers, whose mean the scores are, averaged over pairs; NaN of one run.
        steadiness: that of scores after half of the nudged phases with those after all of them; NaN
            of an estimator without nudged phases.
        linearity: that of scores at a tenth of β with those at β; NaN likewise.
        validation_loss: after training, averaged over runs.
        status: in words: what was reached, and whether the scores can be trusted.
        gradient_evaluations: that it took.
    """

    column: ClassVar[str] = "score"

    scores: Tensor = field(repr=False)
    agreement: float
    steadiness: float
    linearity: float
    validation_loss: float
    status: str
    gradient_evaluations: int

    @property
    def values(self) -> Tensor:
        """The scores."""
        return self.scores

    @property
    def trusted(self) -> bool:
        """Whether runs, phases as they go on, and nudges agree; what is unknown cannot disagree."""
        known = (self.agreement, self.steadiness, self.linearity)
        return all(math.isnan(value) or value >= TRUSTED for value in known)


def example_scores(
    model: nn.Module,
    train: Any,
    valid: Any,
    loss: ExampleLoss | None = None,
    *,
    solver: Solver,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] = default_collate,
    sources: Sequence[Any] | None = None,
    estimator: Estimator | None = None,
    nudged_steps: int | None = None,
    runs: int = 2,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda said: None,
) -> ExampleScores:
    r"""Score every training example by a small validation set that is trusted.

        score_i = -dL_val(φ*(w))/dw_i  at  w = 1,    φ*(w) = train on (1/n) Σ_i w_i loss_i(φ)

    By the contrastive rule the model trains, then goes on training a little, nudged towards and
    away from the validation loss. First-order gradients alone; fused attention, autocast and
    whatever `TorchOptimizer` is told are served.

    The model trains `runs` times, with other batches and random numbers. Where the runs do not
    agree on the ranks, the scores are those of chance, and `status` says what to change.

    Args:
        model: any module; its parameters that require a gradient are trained, from where they are.
        train: a dataset with `len` and `[i]`: of torch, of Hugging Face, or a list.
        valid: the same, of examples that are trusted.
        loss: the loss of each example of a batch. None for a model of transformers: the
            cross-entropy of `logits` and `labels`, of next words where the logits are of words.
        solver: trains the model, `TorchOptimizer` for example; `max_steps` counts batches.
        batch_size: examples a batch.
        collate: makes a batch of a list of examples.
        sources: of each training example, a name; their weights are then scored.
        estimator: `Contrastive(beta=0.3)` by default; `Unrolled(products="contrast")` costs twice
            as much and follows the optimiser's own steps.
        nudged_steps: batches of a nudged phase, without a learning-rate schedule; a fifth of the
            free phase's by default. Not beside an estimator with its own `nudged_solver`.
        runs: how many times the model trains; one gives no `agreement`.
        seed: of the first run; the next one has the next.
        folder: where each run is kept when it is done, and not run again; None keeps none. Whoever
            changes the arguments takes another folder.
        progress: is told what is under way.

    Returns:
        The scores.

    Raises:
        ConfigurationError: arguments that are not what they have to be.
        DataError: an empty dataset, sources of another length, or a loss that does not give one
            number an example.
        RunError: `folder` keeps runs with other arguments.

    Example:
        >>> from equigrad.solvers import TorchOptimizer
        >>> x = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
        >>> y = torch.tensor([[2.0], [2.0], [2.0], [-8.0]])  # the last one is wrong
        >>> found = example_scores(
        ...     torch.nn.Linear(1, 1),
        ...     list(zip(x, y)),
        ...     list(zip(x[:2], y[:2])),
        ...     lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
        ...     solver=TorchOptimizer(
        ...         optimizer=torch.optim.AdamW, options={"lr": 0.1}, max_steps=100
        ...     ),
        ... )
        >>> found.ranking()[0], found.trusted
        (3, True)
    """
    expect(Count, runs=runs)
    job = weighted_training(
        *(model, train, valid, loss),
        solver=solver,
        batch_size=batch_size,
        collate=collate,
        sources=sources,
        estimator=estimator,
        nudged_steps=nudged_steps,
    )
    if folder is not None:
        sizes = {"train": len(train), "valid": len(valid), "batch_size": batch_size}
        require_same(folder, solver, job.rule, sizes)
    trained = []
    for run in range(runs):
        kept = None if folder is None else folder / f"run-{seed + run}.pt"
        if kept is not None and kept.exists():
            progress(f"run {run + 1} of {runs} is done")
            trained.append(_Trained(**load_tensors(kept)))
            continue
        progress(f"run {run + 1} of {runs}")
        trained.append(_trained(job, solver, seed + run))
        if kept is not None:
            save_tensors(kept, vars(trained[-1]))
    scores = torch.stack([t.scores for t in trained])
    agreement = _mean([spearman(a, b) for a, b in combinations(scores, 2)])
    steadiness = _mean([spearman(t.half, t.scores) for t in trained])
    linearity = _mean([spearman(t.gentle, t.scores) for t in trained])
    return ExampleScores(
        scores=scores.mean(0),
        agreement=agreement,
        steadiness=steadiness,
        linearity=linearity,
        names=job.names,
        validation_loss=_mean([t.validation_loss for t in trained]),
        status="; ".join(
            [_verdict(agreement, steadiness, linearity), *dict.fromkeys(t.status for t in trained)]
        ),
        gradient_evaluations=sum(t.gradient_evaluations for t in trained),
    )


@dataclass(frozen=True)
class _Trained:
    """What one training run says; `half` and `gentle` are empty without nudged phases."""

    scores: Tensor
    half: Tensor
    gentle: Tensor
    validation_loss: float
    status: str
    gradient_evaluations: int


def _trained(job: WeightedTraining, solver: Solver, seed: int) -> _Trained:
    """Train once; nudge as long as asked, half as long, and less."""
    settled: dict[str, Any] = {}
    further: list[Estimator] = []
    steps, rule = 0, job.rule
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        meta = job.meta(torch.ones(len(job.names)))
        if isinstance(rule, Contrastive) and rule.nudged_solver is not None:
            settled["settled"] = settle(job.problem, job.params, meta, solver=solver)
            steps, nudged = settled["settled"].phase.steps, rule.nudged_solver
            shorter = dataclasses.replace(nudged, max_steps=max((nudged.max_steps or 2) // 2, 1))
            further = [
                dataclasses.replace(rule, nudged_solver=shorter, error=False),
                dataclasses.replace(rule, beta=rule.beta / GENTLER, error=False),
            ]
        found = [
            meta_gradient(
                job.problem, job.params, meta, solver=solver, estimator=estimator, **settled
            )
            for estimator in (rule, *further)
        ]
    scores = [-result.grads["weight"].cpu() for result in found]
    half, gentle = scores[1:] or [torch.empty(0)] * 2
    return _Trained(
        scores[0],
        half,
        gentle,
        found[0].outer_loss,
        found[0].status,
        steps + sum(result.gradient_evaluations for result in found),
    )


def require_same(folder: Path, solver: Solver, rule: Estimator, further: Mapping[str, Any]) -> None:
    """Refuse a folder that keeps runs of other arguments, as far as they can be told apart."""
    nudged = getattr(rule, "nudged_solver", None)
    arguments = {
        "solver": f"{type(solver).__name__}, {solver.max_steps} steps",
        "options": str(dict(getattr(solver, "options", {}))),
        "estimator": type(rule).__name__,
        "beta": getattr(rule, "beta", None),
        "nudged_steps": None if nudged is None else nudged.max_steps,
        **further,
    }
    path = folder / "arguments.json"
    if path.exists():
        there = json.loads(path.read_text("utf-8"))
        other = [name for name, value in arguments.items() if there.get(name) != value]
        if other:
            name = other[0]
            raise RunError(
                f"{folder} keeps runs with {name}={there.get(name)}, and this call has "
                f"{arguments[name]}; take another folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(arguments, indent=2))


def _verdict(agreement: float, steadiness: float, linearity: float) -> str:
    """Whether scores can be trusted, and what to change where not."""
    said = []
    if agreement < TRUSTED:
        said.append(
            f"two training runs agree on the ranks by {agreement:.2f} alone, so that scores are "
            f"largely chance: average more runs, train shorter or regularise more (a model that "
            f"knows its noise by heart no longer tells it apart), or validate on more examples"
        )
    if steadiness < TRUSTED:
        said.append(
            f"the ranks change as nudged phases go on (agreement {steadiness:.2f}): take fewer "
            f"nudged_steps, or a smaller learning rate"
        )
    if linearity < TRUSTED:
        said.append(
            f"the ranks change with beta (agreement {linearity:.2f} with a tenth of it): take "
            f"another beta, or estimator=Unrolled(products='contrast'), which has none"
        )
    if said:
        return "not to be trusted: " + "; ".join(said)
    if math.isnan(agreement):
        return "one run cannot tell whether its scores are chance; take runs=2"
    said = [f"runs agree on the ranks by {agreement:.2f}"]
    if not math.isnan(steadiness):
        said.append(f"nudged phases by {steadiness:.2f}, two beta by {linearity:.2f}")
    return ", ".join(said)


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks, without regard to ties; NaN of fewer than two."""
    if len(one) < 2:
        return math.nan
    ranks = torch.stack([t.double().argsort().argsort().double() for t in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
