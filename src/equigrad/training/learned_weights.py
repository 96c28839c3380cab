"""A weight for each training example, learned on a validation set that is trusted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from equigrad.estimators import Estimator
from equigrad.fields import Count, Positive, expect
from equigrad.gradient import meta_gradient
from equigrad.solvers import Solver
from equigrad.training.example_weights import ExampleLoss, weighted_training
from equigrad.training.files import load_tensors, save_tensors
from equigrad.training.ranked import Ranked
from equigrad.training.scores import require_same


@dataclass(frozen=True, kw_only=True)
class LearnedWeights(Ranked):
    """What each training example, or each source, is to count for.

    Attributes:
        names: of the sources; the examples' numbers otherwise.
        weights: between 0 and 2, one an example or a source; all began at 1.
        validation_losses: after training with the weights before each outer step.
        status: in words: what was reached.
        gradient_evaluations: that it took.
    """

    column: ClassVar[str] = "weight"

    weights: Tensor = field(repr=False)
    validation_losses: tuple[float, ...]
    status: str
    gradient_evaluations: int

    @property
    def values(self) -> Tensor:
        """The weights."""
        return self.weights


def learn_weights(
    model: nn.Module,
    train: Any,
    valid: Any,
    loss: ExampleLoss | None = None,
    *,
    solver: Solver,
    outer_steps: int = 20,
    lr: float = 0.3,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] = default_collate,
    sources: Sequence[Any] | None = None,
    estimator: Estimator | None = None,
    nudged_steps: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda said: None,
) -> LearnedWeights:
    r"""Learn what every training example counts for, so that the model does well on `valid`.

        min_a L_val(φ*(w)),   w_i = 2 σ(a_i),   φ*(w) = train on (1/n) Σ_i w_i loss_i(φ)

    by Adam on a. For every outer step the model trains anew, with the weights as they are, and the
    gradient of the validation loss is estimated as for `example_scores`.

    Args:
        model: any module; its parameters that require a gradient are trained, from where they are.
        train: a dataset with `len` and `[i]`: of torch, of Hugging Face, or a list.
        valid: the same, of examples that are trusted.
        loss: as for `example_scores`.
        solver: trains the model; `max_steps` counts batches.
        outer_steps: steps of the weights; the model trains as many times.
        lr: of Adam, which moves a.
        batch_size: examples a batch.
        collate: makes a batch of a list of examples.
        sources: of each training example, a name; they then share a weight.
        estimator: as for `example_scores`.
        nudged_steps: as for `example_scores`.
        seed: of the first training run; the next one has the next.
        folder: where the weights are kept after every step, to go on from; None keeps nothing.
        progress: is told what is under way.

    Returns:
        The weights.

    Raises:
        ConfigurationError: arguments that are not what they have to be.
        DataError: an empty dataset, sources of another length, or a loss that does not give one
            number an example.
        RunError: `folder` keeps weights that were learned with other arguments.

    Example:
        >>> from equigrad.solvers import TorchOptimizer
        >>> x = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
        >>> y = torch.tensor([[2.0], [2.0], [2.0], [-8.0]])  # the last one is wrong
        >>> found = learn_weights(
        ...     torch.nn.Linear(1, 1),
        ...     list(zip(x, y)),
        ...     list(zip(x[:2], y[:2])),
        ...     lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1),
        ...     solver=TorchOptimizer(
        ...         optimizer=torch.optim.AdamW, options={"lr": 0.1}, max_steps=50
        ...     ),
        ...     outer_steps=5,
        ... )
        >>> found.ranking()[0], bool(found.weights[3] < 0.6)
        (3, True)
    """
    expect(Count, outer_steps=outer_steps)
    expect(Positive, lr=lr)
    job = weighted_training(
        *(model, train, valid, loss),
        solver=solver,
        batch_size=batch_size,
        collate=collate,
        sources=sources,
        estimator=estimator,
        nudged_steps=nudged_steps,
    )
    place = _Place.new(len(job.names), lr)
    if folder is not None:
        sizes = {"train": len(train), "valid": len(valid), "batch_size": batch_size, "lr": lr}
        require_same(folder, solver, job.rule, sizes)
        place.go_on(folder / "weights.pt")
    while place.steps < outer_steps:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + place.steps)
            result = meta_gradient(
                job.problem,
                job.params,
                job.meta(place.weights()),
                solver=solver,
                estimator=job.rule,
            )
        place.step(result.grads["weight"].cpu(), result.outer_loss, result.gradient_evaluations)
        progress(f"step {place.steps} of {outer_steps}: validation loss {result.outer_loss:.4g}")
        if folder is not None:
            place.keep(folder / "weights.pt")
    return LearnedWeights(
        names=job.names,
        weights=place.weights(),
        validation_losses=tuple(place.losses),
        status=verdict(place.losses),
        gradient_evaluations=place.evaluations,
    )


@dataclass
class _Place:
    """How far the weights have come."""

    logits: Tensor
    optimizer: torch.optim.Adam
    losses: list[float] = field(default_factory=list)
    evaluations: int = 0

    @classmethod
    def new(cls, count: int, lr: float) -> "_Place":
        logits = torch.zeros(count, requires_grad=True)
        return cls(logits, torch.optim.Adam([logits], lr=lr))

    @property
    def steps(self) -> int:
        return len(self.losses)

    def weights(self) -> Tensor:
        return 2 * torch.sigmoid(self.logits.detach())

    def step(self, grad: Tensor, loss: float, evaluations: int) -> None:
        share = self.weights() / 2
        self.logits.grad = grad.to(share.dtype) * 2 * share * (1 - share)
        self.optimizer.step()
        self.losses.append(loss)
        self.evaluations += evaluations

    def keep(self, path: Path) -> None:
        save_tensors(
            path,
            {
                "logits": self.logits.detach(),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.losses,
                "evaluations": self.evaluations,
            },
        )

    def go_on(self, path: Path) -> None:
        if not path.exists():
            return
        kept = load_tensors(path)
        self.logits.data.copy_(kept["logits"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.losses, self.evaluations = kept["losses"], kept["evaluations"]


def verdict(losses: Sequence[float]) -> str:
    """Whether it was of use, and what to change where not."""
    best = min(losses, key=lambda loss: math.inf if math.isnan(loss) else loss)
    if len(losses) > 1 and not losses[-1] < losses[0]:
        return (
            f"the validation loss did not fall ({losses[0]:.4g} to {losses[-1]:.4g}, the lowest "
            f"before step {losses.index(best) + 1}): lower lr, train longer or regularise more, or "
            f"validate on more examples"
        )
    return f"validation loss {losses[0]:.4g} to {losses[-1]:.4g} in {len(losses)} outer steps"
