"""The one call: a problem, where to start, how to settle, how to estimate."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from equigrad import diagnostics, solvers
from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import checkpoints_named
from equigrad.errors import ConfigurationError, SettlingError
from equigrad.estimators import Contrastive, Estimator
from equigrad.evaluation import FOR_MAPS, NO_STEP_SIZE, Evaluation
from equigrad.fields import expect, require
from equigrad.problems import Params, Problem
from equigrad.results import MetaGradient, Settled
from equigrad.solvers import Phase, Solver

UNANSWERED = 0.5
"""Phases that have this share of their first residuals left have not answered their nudges."""


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
        check_settings(solver, problem)
    problem.ranks.require_same(solver=solver)
    with (
        checkpoints_named(),
        Evaluation(problem, params, meta_params, solver=solver) as evaluation,
    ):
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
    previous: MetaGradient | None = None,
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
        previous: the result of an earlier outer step. The free phase starts at `params` all the
            same (pass `previous.params` to start where that one ended), but with its solver's state
            (moments, the place in a learning-rate schedule) and the number of its next step. Not
            for estimators that need the phase's steps.

    Returns:
        The estimate and its circumstances.

    Raises:
        ProblemError: losses or parameters are not what they have to be, or θ is the start of
            params alone and the estimator does not see it, or `settled` is of other values.
        ConfigurationError: the estimator cannot serve this problem or solver, or cannot go on from
            `settled` or `previous`.
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
    end = seed = before = None
    with problem.ranks.together():
        expect(Solver, solver=solver)
        expect(Estimator, estimator=estimator)
        check_settings(solver, problem)
        expect(MetaGradient | None, previous=previous)
        if previous is not None:
            before = previous._onward(solver, estimator)
        if settled is not None:
            expect(Settled, settled=settled)
            settled._require(params=params, meta_params=meta_params)
            end, seed = settled._for(solver), settled._seed
    problem.ranks.require_same(
        solver=solver,
        estimator=estimator,
        settled=settled is not None,
        previous=previous is not None,
    )
    with (
        checkpoints_named(),
        Evaluation(problem, params, meta_params, end, seed, solver, before) as evaluation,
    ):
        result = estimated(evaluation, solver, estimator, first=True)
    remedy = (
        "Lower the solver's step size" if problem.symmetric else f"{FOR_MAPS}, or start elsewhere"
    )
    _check_finite(result.grads, result.outer_loss, remedy)
    return result


def estimated(
    evaluation: Evaluation,
    solver: Solver,
    estimator: Estimator,
    *,
    first: bool,
    judged: bool = True,
) -> MetaGradient:
    """What an estimator says of an evaluation's problem: the one way to every gradient.

    Args:
        evaluation: of the problem, and of its free phase where that has been settled.
        solver: settles the phases.
        estimator: how the gradient is had.
        first: whether nobody has looked yet at the problem where it settles.
        judged: whether an estimate of the error may take further evaluations.
    """
    estimator.check(evaluation, solver)
    if evaluation.settled is not None:
        estimator.check_settled(evaluation)
    with _explaining(evaluation):
        estimate = estimator.estimate(evaluation, solver)
        with evaluation.tally.of_the_error():
            error_estimate = estimate.error() if judged else estimate.error_estimate
    free = estimate.phases[0]
    if first:
        _look(evaluation, solver, estimator, estimate.phases)
    outer_loss = evaluation.outer_loss(free).item()
    phases = tuple(settled.phase for settled in estimate.phases)
    settled_params, grads = evaluation.as_given(free.params, estimate.grads)
    return MetaGradient(
        grads=dict(grads),
        params=dict(settled_params),
        buffers=evaluation.buffers(free),
        outer_loss=outer_loss,
        status=_status(phases, estimate.grads, evaluation.tally.notes),
        phases=phases,
        gradient_evaluations=evaluation.tally.gradient_evaluations,
        error_estimate=error_estimate,
        _meta_params=evaluation.start.meta_params,
        _end=replace(free, params={}, buffers=()),
        _solver=solver,
    )


def _look(
    evaluation: Evaluation,
    solver: Solver,
    estimator: Estimator,
    phases: tuple[solvers.Settled, ...],
) -> None:
    """Note, or refuse, what is wrong with a problem that nobody has looked at yet."""
    free = phases[0]
    _judge(free, evaluation, solver)
    if evaluation.lower and any(s.phase.failed for s in phases):
        said = _rounding(evaluation.lower, evaluation.problem.symmetric)
        _refuse_unanswered(phases[1:], said)
        evaluation.tally.note(said)
    first_look(evaluation, free, estimator)


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
        raise diagnostics.contraction.explained(error, evaluation) from error


def _judge(free: solvers.Settled, evaluation: Evaluation, solver: Solver) -> None:
    """Note of a map that has not settled whether it contracts."""
    uncontrolled = free.phase.beta == 0  # what settles under control is more than the map
    if free.phase.failed and not evaluation.problem.symmetric and uncontrolled:
        evaluation.tally.note(diagnostics.contraction.verdict(evaluation, free, solver))


def _copies(tensors: Params) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def check_settings(solver: Solver, problem: Problem | None = None) -> None:
    """Refuse a learning rate that is to be learned, and a tensor where a number has to be."""
    require(
        not solver.compile
        or problem is None
        or not (problem.ranks.size > 1 or problem.ranks.wrapped),
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
                f"on it). It has no meta-gradient: {NO_STEP_SIZE}; or learn it, by {name}=lambda "
                f"meta_params, step: …, with an estimator that differentiates steps (Unrolled())"
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
