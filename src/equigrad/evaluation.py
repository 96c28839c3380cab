"""One meta-gradient's workplace: evaluates a problem at fixed meta-parameters, and counts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from equigrad.buffers import KeptBuffers
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.problem import Bilevel, Params, Velocity
from equigrad.randomness import CommonRandomness, Stream
from equigrad.solvers import Settled, Solver, settle

ANSWERED = 1e-2
"""A nudged phase under a tolerance goes on until this share of its first residual is left."""


class Evaluation:
    """Everything that an estimator may ask of a problem while it works on one meta-gradient.

    As a context manager it holds the randomness that all phases share, and puts back the global
    generators, the modules' buffers and their training flags on leaving, also by an exception.

    Attributes:
        problem: the problem.
        params: φ as given, detached.
        meta_params: θ, detached.
        gradient_evaluations: gradients of the inner or the outer loss taken so far; a
            Hessian-vector product counts as two, values without a gradient do not count.
        notes: what the user should know about this meta-gradient, a sentence each.
    """

    def __init__(self, problem: Bilevel, params: Params, meta_params: Params) -> None:
        _check_tensors("params", params)
        _check_tensors("meta_params", meta_params)
        self.problem = problem
        self.params = {name: p.detach() for name, p in params.items()}
        self.meta_params = {name: p.detach() for name, p in meta_params.items()}
        self.gradient_evaluations = 0
        self.notes: list[str] = []
        frozen = [
            n for n, p in params.items() if isinstance(p, nn.Parameter) and not p.requires_grad
        ]
        if frozen:
            self.notes.append(
                f"params {_names(frozen)} are frozen (requires_grad=False) in their module, and "
                f"settle all the same; leave them out of params to keep them"
            )
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._exit.enter_context(torch.enable_grad())
        modules = self.problem.modules or ()
        self._flags = [(part, part.training) for module in modules for part in module.modules()]
        self._exit.callback(self._restore_flags)
        tensors = [*self.params.values(), *self.meta_params.values()]
        self._buffers = self._exit.enter_context(KeptBuffers(modules))
        self._randomness = self._exit.enter_context(CommonRandomness(tensors))
        try:
            self._check()
        except BaseException:
            self._exit.close()
            raise
        self._buffers.restore(self._buffers.before)
        self._restore_flags()
        return self

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            part.training = training

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    # Settling

    def settle(self, solver: Solver) -> Settled:
        """The free phase: settle from the given parameters, without nudge."""
        batches = self._batches(solver, 0.0)
        free = settle(
            self._velocity(0.0),
            self._loss(0.0),
            self.params,
            solver,
            meta_params=self.meta_params,
            batches=batches,
        )
        return dataclasses.replace(free, buffers=self._buffers.snapshot())

    def settle_nudged(
        self,
        free: Settled,
        solver: Solver,
        beta: float,
        *,
        keep_momentum: bool,
        steps: int | None = None,
        share: float = ANSWERED,
    ) -> Settled:
        """A phase from the free solution, with any β: settle `L_in + β L_out`.

        All such phases start with the same buffers, batches and randomness. A nudged phase starts
        almost at rest: under a tolerance it has settled when the nudge is answered, too.

        Args:
            free: the free phase's end.
            solver: settles this phase.
            beta: nudging strength, of either sign, or zero for a matched phase.
            keep_momentum: go on with the free phase's solver state, or start a new one.
            steps: run exactly so many steps.
            share: of its first residual, which a nudged phase has to reach under a tolerance.
        """
        self.stand_at(free)
        nudged = settle(
            self._velocity(beta),
            self._loss(beta),
            free.params,
            solver,
            beta=beta,
            meta_params=self.meta_params,
            previous=free.solver_state if keep_momentum else None,
            first_step=free.end_step,
            steps=steps,
            batches=self._batches(solver, beta),
            share=share if beta != 0 else 1.0,
        )
        return dataclasses.replace(nudged, buffers=self._buffers.snapshot())

    def stand_at(self, settled: Settled) -> None:
        """Put the modules' buffers as they were when a phase ended, and their training flags."""
        self._buffers.restore(settled.buffers)
        self._restore_flags()

    def _batches(self, solver: Solver, beta: float) -> int:
        """How many steps make a pass over the data of a phase."""
        inner = len(self.batch_steps("inner"))
        batches = math.lcm(inner, len(self.batch_steps("outer"))) if beta != 0 else inner
        if batches > 1 and solver.fixed_loss:
            raise ConfigurationError(
                f"{type(solver).__name__} needs a loss that is the same at every evaluation, and "
                f"this problem has mini-batches; use GradientDescent or TorchOptimizer"
            )
        return batches

    def _velocity(self, beta: float) -> Velocity:
        velocity = self.problem.velocity_at(self.meta_params, beta, self._randomness)
        gradients = 1 if beta == 0 else 2

        def counted(params: Params, step: int) -> tuple[Tensor, ...]:
            self.gradient_evaluations += gradients
            return velocity(params, step)

        return counted

    def _loss(self, beta: float) -> Any:
        def loss(params: Params, step: int) -> Tensor:
            value = self.total_inner_loss(params, self.meta_params, step)
            if beta == 0:
                return value
            return value + beta * self.data_loss("outer", params, self.meta_params, step)

        return loss

    # Losses and their derivatives

    def data_loss(
        self, stream: Stream, params: Params, meta_params: Params, step: int = 0
    ) -> Tensor:
        """The inner or outer loss on one step's batch, with that step's randomness."""
        return self.problem.data_loss(stream, params, meta_params, step, self._randomness)

    def total_inner_loss(self, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """The inner loss with its regulariser, differentiable as often as the model is."""
        loss = self.data_loss("inner", params, meta_params, step)
        if self.problem.regularizer is not None:
            loss = loss + self.problem.regularizer.penalty(params, meta_params)
        return loss

    def batch_steps(self, stream: Stream) -> range:
        """The steps that show every batch of a loss once."""
        return range(len(self.problem.batches(stream) or [None]))

    @torch.no_grad()
    def outer_loss(self, at: Settled) -> Tensor:
        """The outer loss where a phase ended, averaged over its batches."""
        self.stand_at(at)
        steps = self.batch_steps("outer")
        total = sum(self.data_loss("outer", at.params, self.meta_params, step) for step in steps)
        return torch.as_tensor(total) / len(steps)

    def meta_partial(self, stream: Stream, at: Settled) -> dict[str, Tensor]:
        """`∂L/∂θ` of the inner or outer data loss where a phase ended, averaged over its batches.

        Only those meta-parameters appear that the loss depends on; where it depends on none, it is
        not evaluated.
        """
        names = self._reached[stream]
        if not names:
            return {}
        self.stand_at(at)
        meta = {
            name: m.clone().requires_grad_() if name in names else m
            for name, m in self.meta_params.items()
        }
        leaves = [meta[name] for name in names]
        total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        steps = self.batch_steps(stream)
        for step in steps:
            loss = self.data_loss(stream, at.params, meta, step)
            if not loss.requires_grad:  # a batch that no meta-parameter acts on
                continue
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, grads, alpha=1 / len(steps))
            self.gradient_evaluations += 1
        return dict(zip(names, total, strict=True))

    def outer_gradients(self, at: Settled) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`∂L_out/∂φ` and `∂L_out/∂θ` where a phase ended, averaged over batches."""
        self.stand_at(at)
        params = {name: p.clone().requires_grad_() for name, p in at.params.items()}
        meta = {name: m.clone().requires_grad_() for name, m in self.meta_params.items()}
        leaves = [*params.values(), *meta.values()]
        total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        steps = self.batch_steps("outer")
        for step in steps:
            loss = self.data_loss("outer", params, meta, step)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, grads, alpha=1 / len(steps))
            self.gradient_evaluations += 1
        count = len(params)
        by_params = dict(zip(params, total[:count], strict=True))
        return by_params, dict(zip(meta, total[count:], strict=True))

    def contrast(self, states: Sequence[Settled], weights: Sequence[float]) -> dict[str, Tensor]:
        """`Σ_i w_i ∂L/∂θ(φ_i, θ, β_i)` for weights that sum to zero.

        Differences to the first state are formed before anything is weighted, and the
        regulariser's part in factored form.
        """
        total = {name: torch.zeros_like(m) for name, m in self.meta_params.items()}
        reference = self.meta_partial("inner", states[0])
        for state, weight in zip(states, weights, strict=True):
            if reference and state is not states[0]:
                inner = self.meta_partial("inner", state)
                for name, grad in inner.items():
                    total[name].add_(grad - reference[name], alpha=weight)
            if state.phase.beta != 0:
                for name, grad in self.meta_partial("outer", state).items():
                    total[name].add_(grad, alpha=weight * state.phase.beta)
        if self.problem.regularizer is not None:
            pull = self.problem.regularizer.bind(self.meta_params)
            part = pull.contrast([state.params for state in states], weights)
            for name, grad in part.items():
                total[name].add_(grad)
        return total

    # Checks

    def _check(self) -> None:
        """Evaluate both losses once, and see that they are what they have to be."""
        self._reached: dict[Stream, list[str]] = {}
        moved: set[str] = set()
        params = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        meta = {name: m.clone().requires_grad_() for name, m in self.meta_params.items()}
        for stream in ("inner", "outer"):
            loss = self._checked_loss(stream, params, meta)
            leaves = [*params.values(), *meta.values()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            self.gradient_evaluations += 1
            reached = [g is not None for g in grads]
            moves = {name for name, r in zip(params, reached, strict=False) if r}
            if not moves:
                raise ProblemError(
                    f"{stream}_loss does not depend on params: no gradient reaches any of "
                    f"{_names(params)}. Compute it from the params that it is handed, for example "
                    f"with torch.func.functional_call"
                )
            moved |= moves
            found = {name for name, r in zip(meta, reached[len(params) :], strict=True) if r}
            for step in self.batch_steps(stream)[1:]:
                if len(found) < len(meta):
                    found |= self._reached_on(stream, meta, step)
            self._reached[stream] = [name for name in meta if name in found]
        seen = set(self._reached["inner"]) | set(self._reached["outer"])
        regularizer = self.problem.regularizer
        if regularizer is not None:
            value = regularizer.penalty(params, meta)
            _check_scalar("the regularizer", value)
            seen |= regularizer.meta_names
        unseen = sorted(set(meta) - seen)
        if unseen:
            raise ProblemError(
                f"meta-parameter {_names(unseen)} has no path to inner_loss or outer_loss, so its "
                f"meta-gradient cannot be told from zero. Use it in a loss, or leave it out. "
                f"(If it is the initialisation of params: what has settled has forgotten where it "
                f"started. Make it the centre of a proximal term, as in "
                f"equigrad.nn.ComplexSynapse(learn=('center',)).)"
            )
        idle = sorted(set(params) - moved)
        if idle:
            self.notes.append(f"no loss depends on params {_names(idle)}")

    def _reached_on(self, stream: Stream, meta: Params, step: int) -> set[str]:
        """The meta-parameters that a later batch's loss depends on."""
        loss = self.data_loss(stream, self.params, meta, step)
        if not loss.requires_grad:
            return set()
        self.gradient_evaluations += 1
        grads = torch.autograd.grad(loss, list(meta.values()), allow_unused=True)
        return {name for name, g in zip(meta, grads, strict=True) if g is not None}

    def _checked_loss(self, stream: Stream, params: Params, meta: Params) -> Tensor:
        try:
            loss = self.data_loss(stream, params, meta)
        except KeyError as error:
            raise ProblemError(
                f"{stream}_loss asked for {error}, which is not there: params has "
                f"{_names(params)}, meta_params has {_names(meta)}"
            ) from error
        _check_scalar(f"{stream}_loss", loss)
        if not loss.requires_grad:
            raise ProblemError(
                f"{stream}_loss returned a value without a gradient: it does not depend on params, "
                f"or detaches them (.item(), .detach(), torch.no_grad())"
            )
        return loss


def _check_scalar(name: str, loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise ProblemError(f"{name} must return a scalar tensor, got {type(loss).__name__}")
    if loss.ndim != 0:
        raise ProblemError(
            f"{name} must return a scalar, got shape {tuple(loss.shape)}; average it with .mean()"
        )
    if not torch.isfinite(loss):
        raise ProblemError(
            f"{name} is {loss.item()} at the initial params; start where it is finite"
        )


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
        if not tensor.is_floating_point():
            raise ProblemError(
                f"{what}[{name!r}] has dtype {tensor.dtype}, which has no gradient; "
                f"use a floating-point tensor"
            )
        if not torch.isfinite(tensor).all():
            raise ProblemError(f"{what}[{name!r}] holds NaN or infinite values")


def _names(names: Any) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
