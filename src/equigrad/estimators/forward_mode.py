"""Forward-mode differentiation of the solver's steps."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import mse_loss
from torch.overrides import TorchFunctionMode

from equigrad.errors import ConfigurationError
from equigrad.estimators.estimator import Estimate, Estimator, Traits
from equigrad.estimators.linearisation import SecondDerivatives
from equigrad.estimators.replay import recorded, replay
from equigrad.evaluation import Evaluation
from equigrad.fields import Count
from equigrad.problems import Params
from equigrad.solvers import Moment, Solver
from equigrad.vectors import flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class ForwardMode(Estimator):
    r"""The exact gradient of a learner that takes T steps, by tangents carried along with them.

        ṡ_{t+1} = (∂Φ/∂s) ṡ_t + (∂Φ/∂θ) e_i,    ∂_i = ∂L_out/∂θ_i + (∂L_out/∂φ)·φ̇_T

    for every scalar meta-parameter i: the result of `Unrolled`, in the forward direction
    (Franceschi et al. 2017; real-time recurrent learning, Williams, Zipser 1989). Memory does not
    grow with the number of steps, but the cost grows with the number of meta-parameters, so that
    there should be only a few.

    Attributes:
        max_size: the largest number of scalar meta-parameters that it accepts.

    Raises:
        ConfigurationError: from `meta_gradient`, if there are more, or if the solver's steps cannot
            be differentiated.
        DoubleBackwardError: from `meta_gradient`, if the gradient of an operation of the model has
            no forward-mode derivative.

    Example:
        >>> from equigrad.testing import Quadratic
        >>> import torch, equigrad as eg
        >>> q = Quadratic(dim=3)
        >>> forward, reverse = (
        ...     eg.meta_gradient(
        ...         q.problem, q.params(), q.meta_params(), solver=q.solver(5), estimator=estimator
        ...     ).grads["theta"]
        ...     for estimator in (ForwardMode(), eg.Unrolled())
        ... )
        >>> torch.allclose(forward, reverse)
        True
    """

    traits: ClassVar[Traits] = Traits(
        idea="forward mode through the steps",
        cost="2T dim θ + 1",
        error="vanishes as T → ∞",
        double_backward=True,
        energy=False,
        equilibrium=False,
        sees_start=True,
        steps=True,
    )

    max_size: Count = 100

    def check(self, evaluation: Evaluation, solver: Solver) -> None:
        """Also refuse too many meta-parameters, and a solver that cannot be differentiated."""
        super().check(evaluation, solver)
        recorded(solver, type(self).__name__)
        size = sum(m.numel() for m in evaluation.meta_params.values())
        if size > self.max_size:
            raise ConfigurationError(
                f"ForwardMode would compute tangents for {size} meta-parameters, more than "
                f"max_size={self.max_size}. Raise max_size, or use Unrolled()"
            )

    def estimate(self, evaluation: Evaluation, solver: Solver) -> Estimate:
        """Settle, then push each tangent forward along the same steps."""
        solver = recorded(solver, type(self).__name__)
        free, (start,) = evaluation.settle_recorded(solver)
        pressure, direct = evaluation.outer_gradients(free)
        meta = list(evaluation.meta_params.values())
        derivatives = []
        for i in range(sum(m.numel() for m in meta)):
            unit = flatten(meta).new_zeros(sum(m.numel() for m in meta))
            unit[i] = 1
            direction = dict(zip(evaluation.meta_params, unflatten(unit, meta), strict=True))
            with SecondDerivatives(evaluation, type(self).__name__):
                tangents = _push_forward(evaluation, solver, start, free.end_step, direction)
            derivatives.append(sum((pressure[n] * tangents[n]).sum() for n in pressure))
        through = unflatten(torch.stack([torch.as_tensor(d) for d in derivatives]), meta)
        grads = {n: direct[n] + d for n, d in zip(direct, through, strict=True)}
        return Estimate(grads=grads, phases=(free,))


def _push_forward(
    evaluation: Evaluation, solver: Solver, start: Moment, steps: int, direction: Params
) -> dict[str, Tensor]:
    """The change of φ after some steps when θ moves along a direction."""
    evaluation = evaluation.holding(start)
    params, state = start.params, start.solver_state
    moves, state_moves = evaluation.start.push(direction), [torch.zeros_like(s) for s in state]
    evaluation.stage.stand_at(start)
    for step in range(steps):
        with forward_ad.dual_level():
            meta = {
                n: forward_ad.make_dual(m.clone().requires_grad_(), direction[n])
                for n, m in evaluation.meta_params.items()
            }
            dual = {
                n: forward_ad.make_dual(p.clone().requires_grad_(), moves[n])
                for n, p in params.items()
            }
            dual_state = [
                forward_ad.make_dual(s, m) for s, m in zip(state, state_moves, strict=True)
            ]
            with _ZeroTangents():
                after = replay(evaluation, solver, dual, dual_state, meta, range(step, step + 1))
            evaluation.tally.spend(1)
            values, tangents = _unpack([*after.params.values(), *after.solver_state])
        params = dict(zip(params, values, strict=False))
        moves = dict(zip(params, tangents, strict=False))
        state, state_moves = values[len(params) :], tangents[len(params) :]
    return moves


class _ZeroTangents(TorchFunctionMode):
    """Zero tangents as ordinary tensors, where torch would write into its constant zero.

    The second derivative of `mse_loss` does so if a target has no tangent.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is mse_loss:
            args = tuple(map(_with_tangent, args))
            kwargs = {name: _with_tangent(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _with_tangent(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    primal, tangent = forward_ad.unpack_dual(value)
    if tangent is not None and not tangent._is_zerotensor():
        return value
    return forward_ad.make_dual(primal, torch.zeros_like(primal, requires_grad=False))


def _unpack(duals: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Values and tangents, without their graphs."""
    pairs = [forward_ad.unpack_dual(dual) for dual in duals]
    values = [pair.primal.detach() for pair in pairs]
    tangents = [
        torch.zeros_like(value) if pair.tangent is None else pair.tangent.detach()
        for pair, value in zip(pairs, values, strict=True)
    ]
    return values, tangents
