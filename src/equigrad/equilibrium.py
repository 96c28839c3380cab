"""A settled state as a function that autograd can differentiate."""

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
"""Notes of an estimator give no warning if its estimated error is below this."""

KNOWN_BY_ITS_COTANGENT = (
    "needs an outer loss that has a minimum, but {who} has only {cotangent}, which stands for a "
    "loss linear in {state}, without a minimum"
)
"""Why an estimator that needs a bounded outer loss does not work, as part of a sentence."""


@dataclass(frozen=True)
class LinearLoss:
    """`⟨cotangent, φ⟩`, the outer loss that stands for any function of the settled φ."""

    cotangent: Params

    def __call__(self, params: Params, meta_params: Params) -> Tensor:
        """The inner product; it does not depend on θ."""
        products = [(params[name] * part).sum() for name, part in self.cotangent.items()]
        return torch.stack(products).sum()


@dataclass(frozen=True)
class Equilibrium:
    """The forward and backward pass of a settled state in an autograd graph.

    `settle` is the forward pass, `judge` warns if it failed, and `attach` puts the settled state
    into the graph. The backward pass asks the estimator for the gradient of `⟨cotangent, φ*⟩`,
    where the cotangent is `∂L/∂φ*` divided by its largest norm over samples, so that β and
    tolerances do not depend on the scale of the loss. Only the end of the phase is kept for it; an
    estimator that needs the steps takes them again.

    Attributes:
        who: its name in messages.
        problem: `(tensors, learned, cotangent)` to a problem with θ = `learned` and outer loss
            `⟨cotangent, φ⟩`; other tensors are constants.
        solver: the solver of all phases.
        estimator: computes the gradient.
        say: informs the user, once about `forward` and once about `backward`.
        samples: whether samples settle independently.
        sources: for params with a learned start, the name of the tensor that they start from.
        report: called after every backward pass with its result (None if there was no gradient to
            pass back) and notes. If `report` is None, no error is estimated.
        warns_of_error: whether to inform the user of a large estimated error.
        look: called after a backward pass with the problem, its settled state and the learned
            tensors, to check them; returns notes.
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
        """Run the forward pass.

        Raises:
            SettlingError: the phase diverged.
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
        """Inform the user if the forward pass has not settled."""

        def message() -> str:
            known = evaluation.problem.symmetric
            why = "" if known else f"; {verdict(evaluation, settled, self.solver)}"
            return f"{self.who} {settled.phase}{why}"

        if settled.phase.failed:
            self.say("forward", message)

    def attach(
        self, settled: Settled, seed: int, tensors: Params, start: Params | None = None
    ) -> dict[str, Tensor]:
        """The settled state, with its graph to the tensors that require a gradient.

        Args:
            settled: the end of the forward pass.
            seed: seed of its random numbers.
            tensors: all tensors of the problem by name, including a learned start.
            start: initial φ, for estimators that take the steps again.
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
        """The estimated gradient of `⟨cotangent, φ*⟩`, by name of the learned tensor.

        Args:
            settled: the end of the forward pass.
            seed: seed of its random numbers.
            start: as for `attach`.
            tensors: all tensors of the problem.
            learned: the tensors that need a gradient.
            cotangent: `∂L/∂φ*`, by name.
        """
        size = rows(list(cotangent.values()), self.samples).norm(dim=1).max().item()
        if not 0 < size < math.inf:  # zero gives zeros; overflow gives NaN, for GradScaler to see
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
    """The settled state as a function of the tensors of its problem."""

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
        # drop the solver's state, which may be many times larger than φ
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
    """A gradient whose own derivative raises an explanatory error."""

    @staticmethod
    def forward(ctx: Any, who: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.who = who
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore
        raise DoubleBackwardError(
            f"the gradient of {ctx.who} is an estimate that cannot be differentiated again; leave "
            f"out create_graph=True, or the penalty on this gradient"
        )
