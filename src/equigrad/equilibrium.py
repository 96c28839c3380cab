"""Where something settles, as a function that autograd can differentiate."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equigrad.diagnostics.contraction import explained, verdict
from equigrad.errors import DoubleBackwardError, SettlingError
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.gradient import estimated
from equigrad.problems import Params, Problem
from equigrad.problems.lowered import full_precision
from equigrad.results import MetaGradient
from equigrad.solvers import Settled, Solver
from equigrad.solvers.rows import rows

NEGLIGIBLE = 1e-2
"""With an estimated error below this, what an estimator has to say is no warning."""

KNOWN_BY_ITS_COTANGENT = (
    "needs an outer loss that has a minimum, and {who} knows its loss by {cotangent} alone, as a "
    "linear function of {state}, which has none"
)
"""Why an estimator of a bounded outer loss does not serve."""


@dataclass(frozen=True)
class LinearLoss:
    """`⟨cotangent, φ⟩`, the outer loss of whatever is computed of the settled φ."""

    cotangent: Params

    def __call__(self, params: Params, meta_params: Params) -> Tensor:
        """The inner product; θ plays no part."""
        products = [(params[name] * part).sum() for name, part in self.cotangent.items()]
        return torch.stack(products).sum()


@dataclass(frozen=True)
class Equilibrium:
    """Something that settles, and how its gradient is had: the core of all that stands in a graph.

    `settle` is the forward pass, `judge` says what is wrong with it, and `attach` gives what has
    settled its place in the graph. The backward pass asks the estimator for the gradient of
    `⟨cotangent, φ*⟩`, the cotangent being `∂L/∂φ*` divided by its largest norm of a sample: β and
    tolerances do not depend on how a loss is scaled. Nothing of the settling is kept for it but its
    end, unless the estimator looks at the steps: those are taken again.

    Attributes:
        who: its name in messages.
        problem: `(tensors, learned, cotangent)` to a problem whose θ is `learned`, the other
            tensors being constants, judged by `⟨cotangent, φ⟩`.
        solver: settles the phases.
        estimator: how the gradient is had.
        say: tells the user, once for `forward` and once for `backward`.
        samples: whether samples settle on their own.
        sources: the tensors that params start from, where those are learned, by name of both.
        report: is handed what every backward pass found, None where there was no gradient to pass
            back, and what is worth knowing of it; None where nobody wants an estimate of its error.
        warns_of_error: whether a poor estimate of its error is a reason to tell the user.
        look: at the problem where it settled, with what is learned, after a backward pass; says
            what is wrong with it.
    """

    who: str
    problem: Callable[[Params, Params, Params], Problem]
    solver: Solver
    estimator: Estimator
    say: Callable[[str, Callable[[], str]], None]
    samples: bool
    sources: Mapping[str, str] = field(default_factory=dict)
    report: Callable[[MetaGradient | None, list[str]], None] | None = None
    warns_of_error: bool = True
    look: Callable[[Problem, Settled, Params], list[str]] | None = None

    def settle(self, evaluation: Evaluation) -> Settled:
        """The forward pass.

        Raises:
            SettlingError: it diverged.
        """
        problem, who = evaluation.problem, self.who
        try:
            settled = evaluation.settle(self.solver)
        except SettlingError as error:
            if problem.symmetric:
                raise SettlingError(f"{who}: {error}") from error
            raise explained(error, evaluation, who) from error
        return settled

    def judge(self, evaluation: Evaluation, settled: Settled) -> None:
        """Say so where it has not settled."""

        def message() -> str:
            known = evaluation.problem.symmetric
            why = "" if known else f"; {verdict(evaluation, settled, self.solver)}"
            return f"{self.who} {settled.phase}{why}"

        if settled.phase.failed:
            self.say("forward", message)

    def attach(
        self, settled: Settled, seed: int, tensors: Params, start: Params | None = None
    ) -> dict[str, Tensor]:
        """What has settled, with its graph to the tensors that require a gradient.

        Args:
            settled: where it ended.
            seed: of the random numbers that it drew.
            tensors: by name, whatever the problem is made of, and what it started from where that
                is learned.
            start: where it started, for estimators that take the steps again.
        """
        outputs = _Equilibrium.apply(self, settled, seed, start, list(tensors), *tensors.values())
        return dict(zip(settled.params, outputs, strict=True))

    def gradients(
        self,
        settled: Settled,
        seed: int,
        start: Params | None,
        tensors: Params,
        learned: Params,
        cotangent: Params,
    ) -> dict[str, Tensor]:
        """What the estimator says of `⟨cotangent, φ*⟩`, by name of what is learned.

        Args:
            settled: where the forward pass ended.
            seed: of the random numbers that it drew.
            start: as `attach` was given it.
            tensors: whatever the problem is made of.
            learned: those of them that want a gradient.
            cotangent: `∂L/∂φ*`, by name.
        """
        size = rows(list(cotangent.values()), self.samples).norm(dim=1).max().item()
        if not 0 < size < math.inf:  # no gradient, or one that overflowed: what scales it will see
            if self.report is not None:
                self.report(None, [])
            return {name: torch.full_like(t, size and math.nan) for name, t in learned.items()}
        unit = {name: part / size for name, part in cotangent.items()}
        params, end = settled.params, settled
        if not self.estimator.traits.equilibrium and start is not None:
            learned = {name: t.detach().requires_grad_() for name, t in learned.items()}
            sources = self.sources
            params, end = {n: learned.get(sources.get(n, ""), p) for n, p in start.items()}, None
        problem, judged = self.problem(tensors, learned, unit), self.report is not None
        with full_precision([*params.values(), *learned.values()]):
            with Evaluation(problem, params, learned, end, seed, self.solver) as evaluation:
                result = estimated(
                    evaluation, self.solver, self.estimator, first=False, judged=judged
                )
            looked = [] if self.look is None else self.look(problem, settled, learned)
        failed = [f"phase β={p.beta:g} {p}" for p in result.phases[1:] if p.failed]
        notes = [*dict.fromkeys(failed + evaluation.tally.notes + looked)]
        known = judged and result.error_estimate is not None and result.error_estimate <= NEGLIGIBLE
        unsaid = [] if self.warns_of_error else evaluation.tally.error_notes
        told = [note for note in notes if note not in unsaid]
        if failed or looked or (told and not known):
            self.say("backward", lambda: f"the backward pass of {self.who}: {'; '.join(told)}")
        grads = {name: size * grad for name, grad in result.grads.items()}
        if self.report is not None:
            outer_loss = size * result.outer_loss
            self.report(dataclasses.replace(result, grads=grads, outer_loss=outer_loss), notes)
        return grads


class _Equilibrium(torch.autograd.Function):
    """The settled state as a function of what it was made of."""

    @staticmethod
    def forward(
        ctx: Any,
        equilibrium: Equilibrium,
        settled: Settled,
        seed: int,
        start: Params | None,
        names: list[str],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = tuple(settled.params.values())
        # the solver's state may be many times larger than φ
        ended = dataclasses.replace(settled, params={}, solver_state=None)
        ctx.equilibrium, ctx.settled, ctx.seed, ctx.start = equilibrium, ended, seed, start
        ctx.names = list(settled.params), names
        ctx.save_for_backward(*outputs, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        state, names = ctx.names
        saved = ctx.saved_tensors
        params = {name: p.detach() for name, p in zip(state, saved, strict=False)}
        tensors = dict(zip(names, saved[len(state) :], strict=True))
        needed = ctx.needs_input_grad[-len(names) :]
        learned = {n: t for (n, t), need in zip(tensors.items(), needed, strict=True) if need}
        equilibrium: Equilibrium = ctx.equilibrium
        with torch.no_grad():
            grads = equilibrium.gradients(
                dataclasses.replace(ctx.settled, params=params),
                ctx.seed,
                ctx.start,
                tensors,
                learned,
                dict(zip(state, cotangents, strict=True)),
            )
        if torch.is_grad_enabled():  # create_graph=True
            sources = *learned.values(), *cotangents
            grads = {n: _OnceOnly.apply(equilibrium.who, g, *sources) for n, g in grads.items()}
        return None, None, None, None, None, *(grads.get(name) for name in names)


class _OnceOnly(torch.autograd.Function):
    """A gradient that looks as if it could be differentiated, and says that it cannot."""

    @staticmethod
    def forward(ctx: Any, who: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.who = who
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore
        raise DoubleBackwardError(
            f"the gradient of {ctx.who} is an estimate that cannot be differentiated once more; "
            f"leave out create_graph=True, or the penalty on this gradient"
        )
