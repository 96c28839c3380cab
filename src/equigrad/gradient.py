"""The one call: a problem, where to start, how to settle, how to estimate."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from equigrad import solvers
from equigrad.diagnostics.contraction import explained, verdict
from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import checkpoints_named
from equigrad.errors import ConfigurationError, ProblemError, SettlingError
from equigrad.estimators import Contrastive, Estimator
from equigrad.evaluation import FOR_MAPS, NO_STEP_SIZE, Evaluation, check_tensors
from equigrad.fields import expect, require
from equigrad.parallel import whole
from equigrad.problems import Params, Problem
from equigrad.solvers import Phase, Solver
from equigrad.wording import listed

UNANSWERED = 0.5
"""Phases that have this share of their first residuals left have not answered their nudges."""


@dataclass(frozen=True)
class Settled:
    """Where a problem has settled, for any number of meta-gradients to start from.

    Attributes:
        params: the settled φ.
        buffers: the buffers of the problem's modules there, by name, as in `MetaGradient`.
        status: in words: whether it settled, then whatever is worth knowing.
        phase: the report.
    """

    params: dict[str, Tensor] = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    status: str
    phase: Phase
    _end: solvers.Settled = field(repr=False)
    _seed: int = field(repr=False)
    _solver: Solver = field(repr=False)
    _given: dict[str, dict[str, Tensor]] = field(repr=False)

    def _for(self, solver: Solver) -> solvers.Settled:
        """The free phase's end, with the solver's state where this one can go on from it."""
        if solver.continues(self._solver):
            return self._end
        return dataclasses.replace(self._end, solver_state=None)

    def _require(self, **given: Params) -> None:
        """Refuse parameters other than those that it settled with."""
        for what, tensors in given.items():
            check_tensors(what, tensors)
            own = self._given[what]
            if own.keys() != tensors.keys():
                raise ProblemError(
                    f"settled is of {what} {listed(own)}, and this call has {listed(tensors)}"
                )
            for name, tensor in own.items():
                if not _same(tensor, tensors[name]):
                    raise ProblemError(
                        f"settled is of other values of {what} {name!r} than this call has: it is "
                        f"where they led, and no other; settle again"
                    )


@dataclass(frozen=True)
class MetaGradient:
    """An estimate of `dL_out(φ*(θ), θ)/dθ`, and how it came about.

    Attributes:
        grads: one tensor a meta-parameter, of its shape, dtype and device.
        params: the settled φ of the free phase; of the controlled one where an estimator settles
            no other, which `status` then says.
        buffers: the buffers of the problem's modules at its end (statistics of batch normalisation,
            for example), by the module's own names; where several of `problem.modules` have some,
            each name begins with its module's position there. The modules themselves are as they
            were.
        outer_loss: `L_out` there, averaged over its batches.
        status: in words: whether the free phase settled, then whatever is worth knowing.
        phases: a report for every phase, the free one first if there is one.
        gradient_evaluations: gradients of the inner or outer loss that it took (a Hessian-vector
            product counts as two). Not counted are those by which a problem that is seen for the
            first time is checked, four where nothing is wrong.
        error_estimate: estimated relative error of `grads`, where the estimator has one.
    """

    grads: dict[str, Tensor] = field(repr=False)
    params: dict[str, Tensor] = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    outer_loss: float
    status: str
    phases: tuple[Phase, ...]
    gradient_evaluations: int
    error_estimate: float | None
    _meta_params: Params = field(repr=False)

    def assign(self) -> None:
        """Write the gradients into the `.grad` of the meta-parameters, for any `torch.optim`.

        A tensor that is a meta-parameter under several names gets the sum of their gradients.

        Raises:
            ProblemError: a meta-parameter is computed from other tensors, where no optimiser would
                look for a gradient. None is written then.
        """
        for name in self.grads:
            tensor = self._meta_params[name]
            if not tensor.is_leaf and not tensor.retains_grad:
                raise ProblemError(
                    f"meta-parameter {name!r} is computed from other tensors, and a .grad written "
                    f"to it would not reach them. To add to theirs, call torch.autograd.backward("
                    f"[meta_params[n] for n in result.grads], list(result.grads.values())); or let "
                    f"meta_params hold those tensors and compute {name!r} in the losses"
                )
        total: dict[int, Tensor] = {}
        for name, grad in self.grads.items():
            key = id(self._meta_params[name])
            total[key] = total[key] + grad if key in total else grad.clone()
        for name in self.grads:
            self._meta_params[name].grad = total[id(self._meta_params[name])]


@torch.inference_mode(False)
def settle(problem: Problem, params: Params, meta_params: Params, *, solver: Solver) -> Settled:
    r"""Settle a problem without a nudge: the free phase of a meta-gradient, on its own.

        φ*(θ) = argmin_φ L_in(φ, θ)   or   φ* = F(φ*, θ)

    Hand the result to `meta_gradient(..., settled=...)` and no gradient settles it again, however
    many estimators look at it. Nothing of the user's is changed, as by `meta_gradient`.

    Args:
        problem: a `Bilevel`, a `FixedPoint` or an `EnergyBased`.
        params: φ at the start, by name.
        meta_params: θ, by name.
        solver: settles the problem.

    Returns:
        Where it settled.

    Raises:
        ProblemError: losses or parameters are not what they have to be.
        ConfigurationError: the solver cannot serve this problem.
        SettlingError: the phase diverged.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda p, m: 0.5 * (p["w"] - m["target"]).square().sum(),
        ...     outer_loss=lambda p, m: 0.5 * (p["w"] - 3.0).square().sum(),
        ... )
        >>> start = {"w": torch.zeros(1, dtype=torch.float64)}
        >>> meta_params = {"target": torch.ones(1, dtype=torch.float64)}
        >>> solver = eg.GradientDescent(lr=0.5, tol=1e-9)
        >>> settled = eg.settle(problem, start, meta_params, solver=solver)
        >>> settled.phase.outcome, round(settled.params["w"].item(), 4)
        ('converged', 1.0)
        >>> for estimator in (eg.ConjugateGradient(), eg.Contrastive(beta=1e-3)):
        ...     result = eg.meta_gradient(
        ...         problem,
        ...         start,
        ...         meta_params,
        ...         solver=solver,
        ...         estimator=estimator,
        ...         settled=settled,
        ...     )
        ...     print(round(result.grads["target"].item(), 2))
        -2.0
        -2.0
    """
    expect(Problem, problem=problem)
    with problem.ranks.together():
        expect(Solver, solver=solver)
        _check_settings(solver, problem)
    problem.ranks.require_same(solver=solver)
    with checkpoints_named(), Evaluation(problem, params, meta_params) as evaluation:
        with _explaining(evaluation):
            free = evaluation.settle(solver)
        _judge(free, evaluation, solver)
        return Settled(
            params=dict(evaluation.as_given(free.params, {})[0]),
            buffers=evaluation.buffers(free),
            status="; ".join([str(free.phase), *evaluation.tally.notes]),
            phase=free.phase,
            _end=free,
            _seed=evaluation.stage.seed,
            _solver=solver,
            _given={"params": _copies(params), "meta_params": _copies(meta_params)},
        )


@torch.inference_mode(False)
def meta_gradient(
    problem: Problem,
    params: Params,
    meta_params: Params,
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    settled: Settled | None = None,
) -> MetaGradient:
    r"""Estimate the gradient of the outer loss through a problem that settles.

        ∇_θ = d/dθ L_out(φ*(θ), θ),    φ*(θ) = argmin_φ L_in(φ, θ)   or   φ* = F(φ*, θ)

    θ may also be what the learner starts from: `params` with a graph back to `meta_params`, as
    `params=meta_params` has, is seen by the estimators whose traits say so.

    Neither `params` nor `meta_params`, nor the buffers of the modules involved, nor torch's random
    state (but for one draw) are changed. Batch normalisation in training mode uses the statistics
    of each batch, in every phase; the running ones, as the free phase left them, are in the
    result's `buffers`, to evaluate the settled network with in `eval` mode:
    `functional_call(net.eval(), {**result.params, **result.buffers}, x)`.

    Args:
        problem: a `Bilevel` or a `FixedPoint`.
        params: φ at the start of the free phase, by name.
        meta_params: θ, by name.
        solver: settles the phases.
        estimator: how the gradient is had; `Contrastive()` by default.
        settled: what `settle` returned for the same inner problem, params and meta_params, to go on
            from there: the free phase is not run again, and its random numbers are those of that
            call. Not for estimators that need the phase's steps (`Unrolled`, for example). A solver
            that cannot go on from the state of the one that settled starts with a new state.

    Returns:
        The estimate and its circumstances.

    Raises:
        ProblemError: losses or parameters are not what they have to be, or θ is the start of
            params alone and the estimator does not see it, or `settled` is of other values.
        ConfigurationError: the estimator cannot serve this problem or solver, or cannot go on from
            `settled`.
        SettlingError: a phase diverged.
        DoubleBackwardError: the estimator needs second derivatives that the model does not have.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda p, m: 0.5 * (p["w"] - m["target"]).square().sum(),
        ...     outer_loss=lambda p, m: 0.5 * (p["w"] - 3.0).square().sum(),
        ... )
        >>> result = eg.meta_gradient(
        ...     problem,
        ...     params={"w": torch.zeros(1, dtype=torch.float64)},
        ...     meta_params={"target": torch.ones(1, dtype=torch.float64)},
        ...     solver=eg.GradientDescent(lr=0.5, tol=1e-9),
        ...     estimator=eg.Contrastive(beta=1e-3, scheme="symmetric"),
        ... )
        >>> round(result.grads["target"].item(), 4)  # the settled w is the target: 1 - 3
        -2.0
    """
    estimator = Contrastive() if estimator is None else estimator
    expect(Problem, problem=problem)
    end = seed = None
    with problem.ranks.together():
        expect(Solver, solver=solver)
        expect(Estimator, estimator=estimator)
        _check_settings(solver, problem)
        if settled is not None:
            expect(Settled, settled=settled)
            settled._require(params=params, meta_params=meta_params)
            end, seed = settled._for(solver), settled._seed
    problem.ranks.require_same(solver=solver, estimator=estimator, settled=settled is not None)
    with checkpoints_named(), Evaluation(problem, params, meta_params, end, seed) as evaluation:
        estimator.check(evaluation, solver)
        if settled is not None:
            estimator.check_settled(evaluation)
        with _explaining(evaluation):
            estimate = estimator.estimate(evaluation, solver)
            error_estimate = estimate.error()
        free = estimate.phases[0]
        _judge(free, evaluation, solver)
        if evaluation.lower and any(s.phase.failed for s in estimate.phases):
            said = _rounding(evaluation.lower, problem.symmetric)
            _refuse_unanswered(estimate.phases[1:], said)
            evaluation.tally.note(said)
        first_look(evaluation, free, estimator)
        outer_loss = evaluation.outer_loss(free).item()
        buffers = evaluation.buffers(free)
        settled_params, grads = evaluation.as_given(free.params, estimate.grads)
    remedy = (
        "Lower the solver's step size" if problem.symmetric else f"{FOR_MAPS}, or start elsewhere"
    )
    _check_finite(estimate.grads, outer_loss, remedy)
    phases = tuple(settled.phase for settled in estimate.phases)
    return MetaGradient(
        grads=dict(grads),
        params=dict(settled_params),
        buffers=buffers,
        outer_loss=outer_loss,
        status=_status(phases, estimate.grads, evaluation.tally.notes),
        phases=phases,
        gradient_evaluations=evaluation.tally.gradient_evaluations,
        error_estimate=error_estimate,
        _meta_params=meta_params,
    )


@contextmanager
def _explaining(evaluation: Evaluation) -> Iterator[None]:
    """Say of a map that diverges what it does where it started, and of ranks which did."""
    try:
        yield
    except SettlingError as error:
        if evaluation.problem.ranks.unfinite:
            where = ", ".join(map(str, evaluation.problem.ranks.unfinite))
            raise SettlingError(f"{error} (the loss was not finite on rank {where})") from error
        if evaluation.problem.symmetric or error.__cause__ is not None:  # says what to do already
            raise
        raise explained(error, evaluation) from error


def _judge(free: solvers.Settled, evaluation: Evaluation, solver: Solver) -> None:
    """Note of a map that has not settled whether it contracts."""
    uncontrolled = free.phase.beta == 0  # what settles under control is more than the map
    if free.phase.failed and not evaluation.problem.symmetric and uncontrolled:
        evaluation.tally.note(verdict(evaluation, free, solver))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike in dtype and device, and equal."""
    alike = (one.dtype, one.device) == (other.dtype, other.device)
    return alike and torch.equal(whole(one.detach()), whole(other.detach()))


def _copies(tensors: Params) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check_settings(solver: Solver, problem: Problem) -> None:
    """Refuse a learning rate that is to be learned, and a tensor where a number has to be."""
    require(
        not (solver.compile and problem.ranks.size > 1),
        "compile=True takes several steps by one function, which cannot speak to other processes "
        "on the way; use compile=False",
    )
    options = getattr(solver, "options", None)
    settings = {**vars(solver), **(options if isinstance(options, Mapping) else {})}
    numbers = {f.name for f in fields(solver) if "float" in str(f.type)}
    for name, value in settings.items():
        if isinstance(value, Tensor) and (value.requires_grad or name in numbers):
            raise ConfigurationError(
                f"{name} of {type(solver).__name__} must be a number, got a tensor (call .item() "
                f"on it). It has no meta-gradient: {NO_STEP_SIZE}"
            )


def _rounding(dtype: torch.dtype, loss: bool) -> str:
    what = "the losses compute" if loss else "the map computes"
    return (
        f"under autocast {what} in {str(dtype).removeprefix('torch.')}, to "
        f"{100 * torch.finfo(dtype).eps:.1g} %, and may not get as near to rest as was asked for: "
        f"ask for less, or call meta_gradient under torch.autocast(…, enabled=False)"
    )


def _refuse_unanswered(nudged: tuple[solvers.Settled, ...], why: str) -> None:
    """Raise a `SettlingError` where phases have not answered their nudge: nothing to contrast."""
    pushed = [s.phase for s in nudged if s.phase.beta != 0]
    left = sum(p.residual / p.start_residual for p in pushed if p.start_residual)
    if any(p.failed for p in pushed) and left > UNANSWERED * len(pushed):
        raise SettlingError(
            f"phase β={pushed[0].beta:g} did not answer its nudge ({pushed[0]}): {why}"
        )


def _check_finite(grads: dict[str, Tensor], outer_loss: float, remedy: str) -> None:
    bad = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    if bad or not math.isfinite(outer_loss):
        what = f"the meta-gradient of {bad[0]!r} is not finite" if bad else "the outer loss is"
        raise SettlingError(
            f"after settling, {what if bad else f'{what} {outer_loss}'}: the last step of a phase "
            f"diverged, or the loss is not differentiable there. {remedy}"
        )


def _status(phases: tuple[Phase, ...], grads: dict[str, Tensor], notes: list[str]) -> str:
    sentences = [str(phases[0])]
    sentences += [f"phase β={phase.beta:g} {phase}" for phase in phases[1:] if phase.failed]
    zero = [name for name, grad in grads.items() if not grad.any()]
    if zero:
        sentences.append(
            f"the gradient of {', '.join(map(repr, zero))} is exactly zero: θ had no influence on "
            f"the settled params, or the params have not moved"
        )
    return "; ".join(sentences + notes)
