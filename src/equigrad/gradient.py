"""The main functions: `settle` runs the free phase, `meta_gradient` estimates the hypergradient."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor

from equigrad import diagnostics, solvers
from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import backward_explained
from equigrad.errors import ConfigurationError, SettlingError
from equigrad.estimators import Contrastive, Estimator
from equigrad.evaluation import FOR_MAPS, NO_STEP_SIZE, Evaluation
from equigrad.fields import expect, require
from equigrad.problems import Params, Problem
from equigrad.results import MetaGradient, Settled
from equigrad.solvers import Phase, Solver
from equigrad.vectors import finite

UNANSWERED = 0.5
"""Nudged phases with more than this share of their first residual left have not settled."""


@torch.inference_mode(False)
def settle(problem: Problem, params: Params, meta_params: Params, *, solver: Solver) -> Settled:
    r"""Settle a problem without a nudge: the free phase of a meta-gradient.

        φ*(θ) = argmin_φ L_in(φ, θ)   or   φ* = F(φ*, θ)

    Pass the result to `meta_gradient(..., settled=...)` to use the same free phase for several
    estimators. As with `meta_gradient`, no state of the user is changed.

    Args:
        problem: a `Bilevel`, a `FixedPoint` or an `EnergyBased`.
        params: initial φ, by name.
        meta_params: θ, by name.
        solver: the solver of the inner problem.

    Returns:
        The settled state.

    Raises:
        ProblemError: losses or parameters are invalid.
        ConfigurationError: the solver does not work with this problem.
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
        backward_explained(),
        Evaluation(problem, params, meta_params, solver=solver) as evaluation,
    ):
        with _explaining(evaluation):
            free = evaluation.settle(solver)
        _judge(free, evaluation, solver)
        if (said := diagnostics.rest.not_at_rest(evaluation, free)) is not None:
            evaluation.tally.note(said)
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

    θ may also determine the start of the learner: if `params` have a graph to `meta_params`, as
    with `params=meta_params`, estimators whose traits say so differentiate through it.

    `params`, `meta_params` and the buffers of all modules are not changed, nor is torch's random
    state, except for one draw. Batch normalisation in training mode uses the statistics of each
    batch, in every phase. The running statistics at the end of the free phase are in the result's
    `buffers`, to evaluate the settled network in `eval` mode:
    `functional_call(net.eval(), {**result.params, **result.buffers}, x)`.

    Args:
        problem: a `Bilevel`, a `FixedPoint` or an `EnergyBased`.
        params: φ at the start of the free phase, by name.
        meta_params: θ, by name.
        solver: the solver of all phases.
        estimator: computes the gradient; `Contrastive()` by default.
        settled: the result of `settle` for the same inner problem, params and meta_params, to
            continue from. The free phase is not run again, and its random numbers are those of that
            call. Not for estimators that need the phase's steps (`Unrolled`, for example). A solver
            that cannot continue from the state of the earlier one starts with a new state.
        previous: the result of an earlier outer step, whose solver state (moments, the position in
            a learning-rate schedule) and step count the free phase continues. It still starts at
            `params`; pass `previous.params` to start at the earlier end. Not for estimators that
            need the phase's steps.

    Returns:
        The estimate, with reports of the phases.

    Raises:
        ProblemError: losses or parameters are invalid; θ is only the start of params and the
            estimator does not see it; or `settled` belongs to other values.
        ConfigurationError: the estimator does not work with this problem or solver, or cannot
            continue from `settled` or `previous`.
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
        backward_explained(),
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
    """The meta-gradient of an open evaluation; every gradient of the library is computed here.

    Args:
        evaluation: the evaluation of the problem, with its free phase if that has run already.
        solver: the solver of all phases.
        estimator: computes the gradient.
        first: whether the problem is still to be checked at its settled state.
        judged: whether an error estimate may take further evaluations.
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
        status=_status(phases, estimate.grads, evaluation.tally.sentences),
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
    """Check a problem at its settled state; note or raise what is wrong."""
    free = phases[0]
    _judge(free, evaluation, solver)
    batches = evaluation.problem.inner_batches  # residuals of two mini-batches differ anyway
    judged = [s.phase for s in phases if batches is None or s.phase.tol is not None]
    if evaluation.lower and any(phase.failed for phase in judged):
        said = _rounding(evaluation.lower, evaluation.problem.symmetric)
        _refuse_unanswered(phases[1:], said)
        evaluation.tally.note(said)
    first_look(evaluation, free, estimator)


@contextmanager
def _explaining(evaluation: Evaluation) -> Iterator[None]:
    """Add to the error of a diverged phase why a map diverged, or on which ranks a loss did."""
    try:
        yield
    except SettlingError as error:
        if evaluation.problem.ranks.unfinite:
            where = ", ".join(map(str, evaluation.problem.ranks.unfinite))
            raise SettlingError(f"{error} (the loss was not finite on rank {where})") from error
        if evaluation.problem.symmetric or error.__cause__ is not None:  # has its advice already
            raise
        raise diagnostics.contraction.explained(error, evaluation) from error


def _judge(free: solvers.Settled, evaluation: Evaluation, solver: Solver) -> None:
    """Note whether a map that has not settled contracts."""
    uncontrolled = free.phase.beta == 0  # under control, the map alone does not decide
    if free.phase.failed and not evaluation.problem.symmetric and uncontrolled:
        evaluation.tally.note(diagnostics.contraction.verdict(evaluation, free, solver))


def _copies(tensors: Params) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def check_settings(solver: Solver, problem: Problem | None = None) -> None:
    """Refuse a learning rate that requires a gradient, and a tensor in place of a number."""
    require(
        not solver.compile
        or problem is None
        or not (problem.ranks.size > 1 or problem.ranks.wrapped),
        "compile=True takes several steps in one function, in which processes cannot exchange "
        "gradients; use compile=False",
    )
    options = getattr(solver, "options", None)
    settings = {**vars(solver), **(options if isinstance(options, Mapping) else {})}
    tensors = {name: value for name, value in settings.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        numbers = {f.name for f in fields(solver) if "float" in str(f.type)}
        if value.requires_grad or name in numbers:
            raise ConfigurationError(
                f"{name} of {type(solver).__name__} must be a number, got a tensor; call .item() "
                f"on it. A constant has no meta-gradient: {NO_STEP_SIZE}; or learn it as a "
                f"function, {name}=lambda meta_params, step: …, with an estimator that "
                f"differentiates steps (Unrolled())"
            )


def _rounding(dtype: torch.dtype, loss: bool) -> str:
    what = "the losses compute" if loss else "the map computes"
    return (
        f"under autocast {what} in {str(dtype).removeprefix('torch.')}, with a relative rounding "
        f"error of {100 * torch.finfo(dtype).eps:.1g} %, so the solver may not reach its "
        f"tolerance. Raise tol, or call meta_gradient under torch.autocast(…, enabled=False)"
    )


def _refuse_unanswered(nudged: tuple[solvers.Settled, ...], why: str) -> None:
    """Raise a `SettlingError` if nudged phases did not settle, which leaves nothing to contrast."""
    pushed = [s.phase for s in nudged if s.phase.beta != 0]
    left = sum(p.residual / p.start_residual for p in pushed if p.start_residual)
    if any(p.failed for p in pushed) and left > UNANSWERED * len(pushed):
        raise SettlingError(
            f"the phase with β={pushed[0].beta:g} did not converge ({pushed[0]}), so there is "
            f"nothing to contrast. {why}"
        )


def _check_finite(grads: dict[str, Tensor], outer_loss: float, remedy: str) -> None:
    bad = [name for name, grad in grads.items() if not finite(grad)]
    if bad or not math.isfinite(outer_loss):
        what = f"the meta-gradient of {bad[0]!r} is not finite" if bad else "the outer loss is"
        raise SettlingError(
            f"after settling, {what if bad else f'{what} {outer_loss}'}: the last step of a phase "
            f"diverged, or the loss is not differentiable at the settled params. {remedy}"
        )


def _status(phases: tuple[Phase, ...], grads: dict[str, Tensor], notes: list[str]) -> str:
    sentences = [str(phases[0])]
    sentences += [f"phase β={phase.beta:g} {phase}" for phase in phases[1:] if phase.failed]
    zero = [name for name, grad in grads.items() if not grad.any()]
    if zero:
        sentences.append(
            f"the gradient of {', '.join(map(repr, zero))} is exactly zero: θ has no influence on "
            f"the settled params, or the params have not moved"
        )
    return "; ".join(sentences + notes)
