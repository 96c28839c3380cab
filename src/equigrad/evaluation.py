"""One meta-gradient's workplace: evaluates a problem at fixed meta-parameters, and counts."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from equigrad.buffers import KeptBuffers
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.problems import (
    Params,
    Part,
    Problem,
    Velocity,
    check_scalar,
    inner_product,
    slope,
)
from equigrad.problems.held import held
from equigrad.problems.lowered import full_precision, lower_precision, lowered
from equigrad.problems.refused import refuse_tensor
from equigrad.randomness import CommonRandomness, Stream
from equigrad.solvers import Moment, Settled, Solver, Watch, settle
from equigrad.vectors import tracked

ANSWERED = 1e-2
"""A nudged phase under a tolerance goes on until this share of its first residual is left."""

FOR_MAPS = "Make the weights of the map smaller (weight or spectral normalisation), damp it"
"""What to do where iterating a map diverges; to be gone on with."""

NO_STEP_SIZE = (
    "where a learner settles does not depend on the step size it gets there by, so give the solver "
    "a number that settles fast, and learn what moves the settled params: the strength or the "
    "centre of a regulariser, weights of losses or samples, parts of the model"
)
"""Why a learning rate has no meta-gradient, and what has one; to be gone on with."""


class Evaluation:
    """Everything that an estimator may ask of a problem while it works on one meta-gradient.

    Under autocast, the problem's functions compute in the lower precision and all that surrounds
    them in that of params. As a context manager it holds the randomness that all phases share, and
    puts back the global generators, the modules' buffers and their training flags on leaving, also
    by an exception.

    Args:
        problem: the problem.
        params: φ where the free phase starts.
        meta_params: θ.
        settled: where the free phase has ended already, if it has.
        seed: of the random numbers that it drew, in that case.

    Attributes:
        problem: the problem.
        params: φ as given, detached.
        meta_params: θ, detached.
        reaches: the meta-parameters that the inner and outer functions depend on, by stream.
        start: names of the meta-parameters that the given params were computed from.
        only_start: those of them that reach no loss in another way.
        gradient_evaluations: gradients of the inner or the outer loss taken so far; a
            Hessian-vector product counts as two, values without a gradient do not count.
        lower: the lowest precision that the problem's functions compute in under autocast; None
            without.
        notes: what the user should know about this meta-gradient, a sentence each.
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        meta_params: Params,
        settled: Settled | None = None,
        seed: int | None = None,
    ) -> None:
        _check_tensors("params", params)
        _check_tensors("meta_params", meta_params)
        if problem.samples and any(p.ndim and len(p) == 0 for p in params.values()):
            raise ProblemError(f"params {listed(params)} hold no samples; leave out empty batches")
        self._settled, self._seed = settled, seed
        tensors = [*params.values(), *meta_params.values()]
        self.lower = lower_precision(tensors)
        problem = lowered(problem, tensors)
        self._whole = problem
        self.problem = problem if settled is None else _without_lost(problem, settled)
        self.params = {name: tracked(p).detach() for name, p in params.items()}
        self.meta_params = {name: tracked(p).detach() for name, p in meta_params.items()}
        self._given_params, self._given_meta = params, meta_params
        reached = self._through_start(
            {n: torch.zeros_like(p) for n, p in params.items() if p.requires_grad}
        )
        self.start = [name for name, grad in reached.items() if grad is not None]
        self.only_start: list[str] = []
        self.gradient_evaluations = 0
        self._judged: tuple[Settled | None, Tensor] = None, torch.zeros(())
        self.notes: list[str] = []
        frozen = [
            n for n, p in params.items() if isinstance(p, nn.Parameter) and not p.requires_grad
        ]
        if frozen:
            self.notes.append(
                f"params {listed(frozen)} are frozen (requires_grad=False) in their module, and "
                f"settle all the same; leave them out of params to keep them"
            )
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._exit.enter_context(torch.enable_grad())
        modules = self.problem.modules or ()
        self._flags = [(part, part.training) for module in modules for part in module.modules()]
        self._exit.callback(self._restore_flags)
        tensors = [*self.params.values(), *self.meta_params.values()]
        self._exit.enter_context(full_precision(tensors))
        self._buffers = self._exit.enter_context(KeptBuffers(modules))
        self._randomness = self._exit.enter_context(CommonRandomness(tensors, self._seed))
        try:
            self._check()
        except BaseException:
            self._exit.close()
            raise
        return self

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            part.training = training

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    # Settling

    def settle(self, solver: Solver, watch: Watch | None = None) -> Settled:
        """The free phase: settle from the given parameters, without nudge.

        Args:
            solver: settles this phase.
            watch: sees every step, as in `equigrad.solvers.settle`.
        """
        if self._settled is not None:
            return self._settled
        self._buffers.restore(self._buffers.before)
        self._restore_flags()
        free = settle(
            self._velocity(0.0),
            self._loss(0.0),
            self.params,
            solver,
            meta_params=self.meta_params,
            batches=self._batches(solver, 0.0),
            samples=self.problem.samples,
            watch=watch,
            count=self._counter(0.0),
            remedy=self._remedy(0.0),
        )
        self.problem = _without_lost(self.problem, free)
        return dataclasses.replace(free, buffers=self.snapshot())

    def settle_recorded(
        self, solver: Solver, every: int | None = None, keep: int | None = None
    ) -> tuple[Settled, list[Moment]]:
        """The free phase, and moments of it from which it can be replayed.

        Args:
            solver: settles this phase.
            every: steps between two moments; None for the start alone.
            keep: how many of the latest moments to keep; None for all.
        """
        moments: deque[Moment] = deque(maxlen=keep)

        def watch(step: int, params: Params, state: Any) -> None:
            if step == 0 or (every is not None and step % every == 0):
                copies = {name: p.detach().clone() for name, p in params.items()}
                moments.append(
                    Moment(
                        params=copies,
                        solver_state=[s.clone() for s in state],
                        end_step=step,
                        buffers=self.snapshot(),
                    )
                )

        return self.settle(solver, watch), list(moments)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The problem as it was given, with the samples that have diverged."""
        kept, self.problem = self.problem, self._whole
        try:
            yield
        finally:
            self.problem = kept

    @contextmanager
    def at(self, params: Params, meta_params: Params) -> Iterator[None]:
        """Settle from other params and at other meta-parameters, with the same randomness."""
        kept = self.params, self.meta_params
        self.params, self.meta_params = dict(params), dict(meta_params)
        try:
            yield
        finally:
            self.params, self.meta_params = kept

    def settle_nudged(
        self,
        free: Moment,
        solver: Solver,
        beta: complex,
        *,
        keep_momentum: bool,
        steps: int | None = None,
        share: float = ANSWERED,
        force: Params | None = None,
    ) -> Settled:
        """A phase from the free solution, with any β: settle `L_in + β L_out`.

        All such phases start with the same buffers, batches and randomness. A nudged phase starts
        almost at rest: under a tolerance it has settled when the nudge is answered, too.

        Args:
            free: the free phase's end.
            solver: settles this phase.
            beta: nudging strength, of either sign, or zero for a matched phase. A complex number
                makes φ, θ and the losses complex, which have to be holomorphic.
            keep_momentum: go on with the free phase's solver state, or start a new one.
            steps: run exactly so many steps.
            share: of its first residual, which a nudged phase has to reach under a tolerance.
            force: a constant `∂L_out/∂φ`, by name, which takes the place of the outer loss: settle
                `L_in + β force·φ`.
        """
        self.stand_at(free)
        batches = self._batches(solver, beta if force is None else 0.0)
        nudged = settle(
            self._velocity(beta, force),
            self._loss(beta, force),
            like(beta, free.params),
            solver,
            beta=beta,
            meta_params=self.meta_params,
            previous=_previous(free.solver_state, beta) if keep_momentum else None,
            first_step=_next_step(free, batches),
            steps=steps,
            batches=batches,
            samples=self.problem.samples,
            share=share if beta != 0 else 1.0,
            count=self._counter(beta if force is None else 0.0),
            remedy=self._remedy(beta),
        )
        return dataclasses.replace(nudged, buffers=self.snapshot())

    def settle_controlled(
        self,
        velocity: Velocity,
        start: Params,
        solver: Solver,
        strength: float,
        *,
        after: Moment,
        gradients: int,
        loss: Callable[[Params, int], Tensor],
    ) -> Settled:
        """A phase in which more than φ moves: learner and controller together.

        Args:
            velocity: of all that moves.
            start: where it begins.
            solver: settles this phase.
            strength: of the control, which the phase reports as its β.
            after: the moment whose buffers it begins with.
            gradients: that one velocity takes.
            loss: what the phase minimises, for solvers that compare values; `no_loss` if nothing.
        """
        self.stand_at(after)
        batches = self._batches(solver, strength)

        def count(evaluations: int) -> None:
            self.gradient_evaluations += gradients * evaluations

        settled = settle(
            velocity,
            loss,
            start,
            solver,
            beta=strength,
            meta_params=self.meta_params,
            first_step=_next_step(after, batches),
            batches=batches,
            samples=self.problem.samples,
            count=count,
            remedy="Take shorter steps (GradientFlow(dt=…), Picard(damping=…))",
        )
        return dataclasses.replace(settled, buffers=self.snapshot())

    def _remedy(self, beta: complex) -> str | None:
        """What to do where a phase diverges; None for what does for any learner."""
        if self.problem.symmetric:
            return None
        return f"{FOR_MAPS}, or {'lower the nudging strength beta' if beta else 'start elsewhere'}"

    def sign(self) -> int:
        """1 or -1, drawn once for this meta-gradient."""
        return self._randomness.sign()

    @property
    def seed(self) -> int:
        """The seed of all random numbers, to see the same ones again."""
        return self._randomness.base

    def snapshot(self) -> tuple[Tensor, ...]:
        """The modules' buffers as they are now."""
        return self._buffers.snapshot()

    def beginning(self, solver: Solver) -> Moment:
        """Where the free phase starts."""
        state = solver.init(list(self.params.values()))
        return Moment(
            params=self.params, solver_state=state, end_step=0, buffers=self._buffers.before
        )

    def stand_at(self, at: Moment) -> None:
        """Put the modules' buffers and training flags as they were at a moment of a phase."""
        self._buffers.restore(at.buffers)
        self._restore_flags()

    def named_buffers(self, at: Moment) -> dict[str, Tensor]:
        """The modules' buffers as they were at a moment of a phase, by name."""
        return self._buffers.named(at.buffers)

    def _batches(self, solver: Solver, beta: complex) -> int:
        """How many steps make a pass over the data of a phase."""
        inner = len(self.batch_steps("inner"))
        batches = math.lcm(inner, len(self.batch_steps("outer"))) if beta != 0 else inner
        if batches > 1 and solver.fixed_loss:
            raise ConfigurationError(
                f"{type(solver).__name__} needs a loss that is the same at every evaluation, and "
                f"this problem has mini-batches; use GradientDescent or TorchOptimizer"
            )
        return batches

    def _counter(self, beta: complex) -> Callable[[int], None]:
        """Counts the gradients of so many velocities."""

        def count(evaluations: int) -> None:
            self.gradient_evaluations += evaluations if beta == 0 else 2 * evaluations

        return count

    def _velocity(self, beta: complex, force: Params | None = None) -> Velocity:
        meta = like(beta, self.meta_params)
        return self.problem.velocity_at(meta, beta, self._randomness, force)

    def _loss(self, beta: complex, force: Params | None = None) -> Any:
        def loss(params: Params, step: int) -> Tensor:
            value = self.problem.total_inner_loss(params, self.meta_params, step, self._randomness)
            if beta == 0:
                return value
            if force is not None:
                return value + beta * inner_product(tuple(force.values()), params)
            return value + beta * self.evaluate("outer", params, self.meta_params, step)

        return loss

    # The start

    def _through_start(self, adjoint: Params) -> dict[str, Tensor | None]:
        """`(∂φ_0/∂θ)ᵀ adjoint` by name of the meta-parameter; None where there is no path."""
        outputs = [(p, adjoint[n]) for n, p in self._given_params.items() if p.requires_grad]
        inputs = {n: m for n, m in self._given_meta.items() if m.requires_grad}
        found: dict[str, Tensor | None] = dict.fromkeys(self._given_meta)
        if outputs and inputs:
            try:
                grads = torch.autograd.grad(
                    [p for p, _ in outputs],
                    list(inputs.values()),
                    [a for _, a in outputs],
                    retain_graph=True,
                    create_graph=any(a.requires_grad for _, a in outputs),
                    allow_unused=True,
                )
            except RuntimeError as error:
                raise ProblemError(
                    f"params were computed from meta_params by a graph that can no longer be used "
                    f"({str(error).splitlines()[0]}). Compute them anew for every call, or detach "
                    f"them"
                ) from error
            found.update(zip(inputs, grads, strict=True))
        return found

    def pull_back_start(self, adjoint: Params) -> dict[str, Tensor]:
        """`(∂φ_0/∂θ)ᵀ adjoint` for params φ_0 that were computed from meta_params.

        Args:
            adjoint: the derivative of the outer loss by the start, by name of the parameter.

        Returns:
            The part of the meta-gradient that goes through the start, by name; zero elsewhere.
        """
        pulled = self._through_start(adjoint)
        return {
            n: torch.zeros_like(m) if (g := pulled[n]) is None else g.detach()
            for n, m in self.meta_params.items()
        }

    def push_start(self, direction: Params) -> dict[str, Tensor]:
        """`(∂φ_0/∂θ) direction`, by name of the parameter: how the start moves with θ."""
        probe = {n: torch.zeros_like(p).requires_grad_() for n, p in self.params.items()}
        pulled = {n: g for n, g in self._through_start(probe).items() if g is not None}
        # the pull-back is linear in the probe, and its derivative the push
        moved = [(g, direction[n]) for n, g in pulled.items() if g.requires_grad]
        if not moved:
            return {n: torch.zeros_like(p) for n, p in self.params.items()}
        pushed = torch.autograd.grad(
            [g for g, _ in moved],
            list(probe.values()),
            [d for _, d in moved],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(probe, pushed, strict=True))

    # Losses and their derivatives

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The user's inner or outer function on one step's batch, with that step's randomness."""
        return self.problem.evaluate(stream, params, meta_params, step, self._randomness)

    def residual(self, params: Params, meta_params: Params, step: int) -> tuple[Tensor, ...]:
        """What is zero at rest, with its graph, on one step's batch; whoever asks, counts it."""
        return self.problem.residual(params, meta_params, step, self._randomness)

    def parts(self, params: Params, meta_params: Params, step: int) -> Iterator[Part]:
        """The problem's functions on one step's batch, as scalars to be differentiated."""
        return self.problem.parts(params, meta_params, step, self._randomness)

    def residual_at(self) -> Callable[[Params, int], tuple[Tensor, ...]]:
        """The residual at this θ for a loop, with its graph to φ; whoever asks, counts it."""
        return self.problem.residual_at(self.meta_params, self._randomness)

    def free_velocity(self) -> Velocity:
        """The velocity without a nudge, for a loop; whoever asks, counts it."""
        return self._velocity(0.0)

    def reached(self, stream: Stream) -> frozenset[str]:
        """The meta-parameters that a loss depends on, those of the regulariser included."""
        own = frozenset(self.reaches[stream])
        regularizer = self.problem.regularizer
        return own if stream == "outer" or regularizer is None else own | regularizer.meta_names

    def batch_steps(self, stream: Stream) -> range:
        """The steps that show every batch of a loss once."""
        return range(len(self.problem.batches(stream) or [None]))

    @torch.no_grad()
    def outer_loss(self, at: Settled) -> Tensor:
        """The outer loss where a phase ended, averaged over its batches."""
        if at is self._judged[0]:
            return self._judged[1]
        self.stand_at(at)
        steps = self.batch_steps("outer")
        total = sum(self.evaluate("outer", at.params, self.meta_params, step) for step in steps)
        return torch.as_tensor(total) / len(steps)

    def meta_partial(self, stream: Stream, at: Settled) -> dict[str, Tensor]:
        """`∂L/∂θ` of the inner or outer data loss where a phase ended, averaged over its batches.

        Only those meta-parameters appear that the loss depends on; where it depends on none, it is
        not evaluated.
        """
        names = self.reaches[stream]
        if not names:
            return {}
        self.stand_at(at)
        meta = {
            name: m.clone().requires_grad_() if name in names else m
            for name, m in like(at.phase.beta, self.meta_params).items()
        }
        leaves = [meta[name] for name in names]
        total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        steps = self.batch_steps(stream)
        for step in steps:
            loss = self.evaluate(stream, at.params, meta, step)
            if not loss.requires_grad:  # a batch that no meta-parameter acts on
                continue
            torch._foreach_add_(total, slope(loss, leaves), alpha=1 / len(steps))
            self.gradient_evaluations += 1
        return dict(zip(names, total, strict=True))

    def outer_gradients(self, at: Settled) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`∂L_out/∂φ` and `∂L_out/∂θ` where a phase ended, averaged over batches."""
        self.stand_at(at)
        names = self.reaches["outer"]
        params = {name: p.detach().requires_grad_() for name, p in at.params.items()}
        reached = {name: self.meta_params[name].detach().requires_grad_() for name in names}
        meta = {**self.meta_params, **reached}
        leaves = [*params.values(), *reached.values()]
        total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        steps = self.batch_steps("outer")
        mean = torch.zeros(())
        for step in steps:
            loss = self.evaluate("outer", params, meta, step)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, grads, alpha=1 / len(steps))
            mean = mean + loss.detach() / len(steps)
            self.gradient_evaluations += 1
        self._judged = at, mean
        direct = {name: torch.zeros_like(m) for name, m in self.meta_params.items()}
        direct.update(zip(names, total[len(params) :], strict=True))
        return dict(zip(params, total, strict=False)), direct

    def contrast(
        self,
        states: Sequence[Settled],
        weights: Sequence[complex],
        direct: Params | None = None,
    ) -> dict[str, Tensor]:
        """`Σ_i w_i ∂L/∂θ(φ_i, θ, β_i)` for weights that sum to zero; its real part.

        Differences to the first state are formed before anything is weighted, and the
        regulariser's part in factored form.

        Args:
            states: where the phases ended.
            weights: w_i.
            direct: `∂L_out/∂θ`, which takes the place of what the outer loss contributes where the
                phases were nudged by a constant force.
        """
        total = {name: torch.zeros_like(m) for name, m in self.meta_params.items()}
        reference = self.meta_partial("inner", states[0])
        for state, weight in zip(states, weights, strict=True):
            if reference and state is not states[0]:
                inner = self.meta_partial("inner", state)
                for name, grad in inner.items():
                    _add(total[name], grad - reference[name], weight)
            if state.phase.beta != 0 and direct is None:
                for name, grad in self.meta_partial("outer", state).items():
                    _add(total[name], grad, weight * state.phase.beta)
        for name, grad in (direct or {}).items():
            total[name].add_(grad)
        if self.problem.regularizer is not None:
            pull = self.problem.regularizer.bind(self.meta_params)
            part = pull.contrast([state.params for state in states], weights)
            for name, grad in part.items():
                total[name].add_(grad.real)
        return total

    def probe(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """A scalar that depends on all that the user's function depends on."""
        return self.problem.probe(stream, params, meta_params, step, self._randomness)

    def changed(self) -> list[str]:
        """What the problem's modules hold that is other than it was, in words."""
        return self._buffers.changed()

    # Checks

    def _check(self) -> None:
        """See that the losses are what they have to be, and what θ reaches in them."""
        known = self.problem.reaches
        self.reaches = self._try_out() if known is None else {s: [*known[s]] for s in known}
        seen = self.reached("inner") | self.reached("outer")
        self.only_start = [name for name in self.start if name not in seen]
        unseen = sorted(set(self.meta_params) - seen - set(self.start))
        given = {id(p) for p in self._given_params.values()}
        same = [name for name in unseen if id(self._given_meta[name]) in given]
        if same:
            raise ProblemError(
                f"meta-parameter {listed(same)} is what params start from, but does not require a "
                f"gradient: call requires_grad_() on it to have its derivative through the start"
            )
        if unseen:
            raise ProblemError(
                f"meta-parameter {listed(unseen)} has no path to {self.problem.name('inner')} or "
                f"outer_loss, so its meta-gradient cannot be told from zero. Use it, or leave it "
                f"out. (If it is the initialisation of params: pass params that are computed from "
                f"meta_params, with their graph; or make it the centre of a proximal term, as in "
                f"equigrad.nn.ComplexSynapse(learn=('center',)), since what has settled has "
                f"forgotten where it started. If it is a learning rate or another setting of the "
                f"solver: {NO_STEP_SIZE}.)"
            )

    def _try_out(self) -> dict[Stream, list[str]]:
        """Evaluate both losses once: the meta-parameters that each depends on."""
        found_by: dict[Stream, list[str]] = {}
        moved: set[str] = set()
        params = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        meta = {name: m.clone().requires_grad_() for name, m in self.meta_params.items()}
        for stream in ("inner", "outer"):
            loss = self._checked_probe(stream, params, meta)
            leaves = [*params.values(), *meta.values()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            self.gradient_evaluations += 1
            reached = [g is not None for g in grads]
            moves = {name for name, r in zip(params, reached, strict=False) if r}
            if not moves:
                raise ProblemError(
                    f"{self.problem.name(stream)} does not depend on params: no gradient reaches "
                    f"any of {listed(params)}. Compute it from the params that it is handed, "
                    f"for example with torch.func.functional_call"
                )
            moved |= moves
            found = {name for name, r in zip(meta, reached[len(params) :], strict=True) if r}
            for step in self.batch_steps(stream)[1:]:
                if len(found) < len(meta):
                    found |= self._reached_on(stream, meta, step)
            found_by[stream] = [name for name in meta if name in found]
        if self.problem.regularizer is not None:
            check_scalar("the regularizer", self.problem.regularizer.penalty(params, meta))
        idle = sorted(set(params) - moved)
        if idle:
            self.notes.append(f"no loss depends on params {listed(idle)}")
        return found_by

    def _reached_on(self, stream: Stream, meta: Params, step: int) -> set[str]:
        """The meta-parameters that a later batch's loss depends on."""
        loss = self.probe(stream, self.params, meta, step)
        if not loss.requires_grad:
            return set()
        self.gradient_evaluations += 1
        grads = torch.autograd.grad(loss, list(meta.values()), allow_unused=True)
        return {name for name, g in zip(meta, grads, strict=True) if g is not None}

    def _checked_probe(self, stream: Stream, params: Params, meta: Params) -> Tensor:
        name = self.problem.name(stream)
        try:
            probe = self.probe(stream, params, meta)
        except KeyError as error:
            raise ProblemError(
                f"{name} asked for {error}, which is not there: params has "
                f"{listed(params)}, meta_params has {listed(meta)}"
            ) from error
        if not probe.requires_grad:
            raise ProblemError(
                f"{name} returned a value without a gradient: it does not depend on params, "
                f"or detaches them (.item(), .detach(), torch.no_grad())"
            )
        return probe


def _next_step(after: Moment, batches: int) -> int:
    """The number of the step with which a phase goes on from another."""
    if isinstance(after, Settled) and after.phase.outcome == "converged":
        # it came to rest at the end of a pass, and left out its last step
        return batches * math.ceil(after.end_step / batches)
    return after.end_step


def no_loss(*asked: Any) -> Any:
    """What dynamics of a learner and a controller have in the place of a loss.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "this solver compares values of a loss, and dynamics of a learner and a controller have "
        "none; use Picard(), Anderson() or GradientFlow(), or EnergyInversion()"
    )


def _without_lost(problem: Problem, settled: Settled) -> Problem:
    """The problem, with samples held that have diverged: whatever follows is that of the others."""
    lost = settled.phase.diverged
    return held(problem, settled.params, lost) if lost else problem


def like(beta: complex, tensors: Params) -> dict[str, Tensor]:
    """The tensors, complex where β is."""
    if not isinstance(beta, complex):
        return dict(tensors)
    return {name: t.to(t.dtype.to_complex()) for name, t in tensors.items()}


def _previous(state: Any, beta: complex) -> Any:
    """A solver's state to go on from, complex where β is; none where it cannot be."""
    if not isinstance(beta, complex):
        return state
    return [s.to(s.dtype.to_complex()) for s in state] if isinstance(state, list) else None


def _add(total: Tensor, grad: Tensor, weight: complex) -> None:
    """Add the real part of `weight grad`."""
    if isinstance(weight, complex):
        total.add_((weight * grad).real)
    else:
        total.add_(grad, alpha=weight)


def _check_tensors(what: str, tensors: object) -> None:
    if not isinstance(tensors, Mapping):
        raise ProblemError(
            f"{what} must map names to tensors, as dict(module.named_parameters()) does, "
            f"got {type(tensors).__name__}"
        )
    if not tensors:
        raise ProblemError(f"{what} is empty: there is nothing to settle or to learn")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{what}[{name!r}] must be a tensor, got {type(tensor).__name__}")
        refuse_tensor(f"{what}[{name!r}]", tensor)
        if not torch.isfinite(tensor.detach()).all():
            raise ProblemError(f"{what}[{name!r}] holds NaN or infinite values")


def listed(names: Any) -> str:
    """Names in quotes, the first eight of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
