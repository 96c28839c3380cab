"""The results of calls: a settled problem, and an estimated meta-gradient."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equigrad import solvers
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.estimators.estimator import Estimator
from equigrad.evaluation import check_tensors
from equigrad.parallel import whole
from equigrad.problems import Params
from equigrad.solvers import Phase, Solver
from equigrad.wording import listed


@dataclass(frozen=True)
class Settled:
    """A settled problem, from which any number of meta-gradients can start.

    Attributes:
        params: the settled φ.
        buffers: the buffers of the problem's modules at the end of the phase, as in `MetaGradient`.
        status: whether it settled, and further remarks, in words.
        phase: the report of the phase.
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
        """The end of the free phase, with the solver state if the solver can continue from it."""
        if solver.continues(self._solver):
            return self._end
        return dataclasses.replace(self._end, solver_state=None)

    def _require(self, **given: Params) -> None:
        """Raise if parameters are not those that it settled with."""
        for what, tensors in given.items():
            check_tensors(what, tensors)
            own = self._given[what]
            if own.keys() != tensors.keys():
                raise ProblemError(
                    f"settled was computed for {what} {listed(own)}, but this call has "
                    f"{listed(tensors)}"
                )
            for name, tensor in own.items():
                if not _same(tensor, tensors[name]):
                    raise ProblemError(
                        f"settled was computed with other values of {what} {name!r} than this "
                        f"call has. Call settle again with the values of this call"
                    )


@dataclass(frozen=True)
class MetaGradient:
    """An estimate of `dL_out(φ*(θ), θ)/dθ`, with reports of its phases.

    Attributes:
        grads: one tensor for each meta-parameter, of its shape, dtype and device.
        params: the settled φ of the free phase, or of the controlled phase if an estimator runs no
            free phase, in which case `status` says so.
        buffers: the buffers of the problem's modules at the end of that phase (statistics of batch
            normalisation, for example), by the module's own names; if several of `problem.modules`
            have buffers, each name begins with its module's index there. The modules themselves are
            not changed.
        outer_loss: `L_out` at the end of that phase, averaged over its batches.
        status: whether the free phase settled, and further remarks, in words.
        phases: a report of every phase, the free one first if there is one.
        gradient_evaluations: number of gradients of the inner or outer loss (a Hessian-vector
            product counts as two), without the checks of a problem when it is first seen, which
            take four if nothing is wrong.
        error_estimate: estimated relative error of `grads`, if the estimator has one.
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
    _end: solvers.Settled | None = field(default=None, repr=False)
    _solver: Solver | None = field(default=None, repr=False)

    def _onward(self, solver: Solver, estimator: Estimator) -> solvers.Settled:
        """The end of the free phase, for the next one to continue from."""
        if estimator.traits.steps:
            raise ConfigurationError(
                f"{type(estimator).__name__} needs all steps of the free phase, but with "
                f"previous= the first ones belong to an earlier call; leave previous out"
            )
        if self._end is None or self._solver is None:
            raise ConfigurationError(
                "previous is not the result of a call of meta_gradient with a single free phase. "
                "Pass such a result, or leave previous out"
            )
        if not solver.continues(self._solver):
            raise ConfigurationError(
                f"{type(solver).__name__} cannot continue from previous, which ended with the "
                f"state of {type(self._solver).__name__}; use the same solver, or leave previous "
                f"out"
            )
        return self._end

    def assign(self) -> None:
        """Write the gradients into the `.grad` of the meta-parameters, for any `torch.optim`.

        A tensor that is a meta-parameter under several names gets the sum of their gradients.

        Raises:
            ProblemError: a meta-parameter is computed from other tensors, so that no optimiser
                would use its gradient. Nothing is written in this case.
        """
        for name in self.grads:
            tensor = self._meta_params[name]
            if not tensor.is_leaf and not tensor.retains_grad:
                raise ProblemError(
                    f"meta-parameter {name!r} is computed from other tensors, so writing its "
                    f".grad would not reach them. To add to their .grad, call "
                    f"torch.autograd.backward([meta_params[n] for n in result.grads], "
                    f"list(result.grads.values())); or put those tensors into meta_params and "
                    f"compute {name!r} in the losses"
                )
        total: dict[int, Tensor] = {}
        for name, grad in self.grads.items():
            key = id(self._meta_params[name])
            total[key] = total[key] + grad if key in total else grad.clone()
        for name in self.grads:
            self._meta_params[name].grad = total[id(self._meta_params[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, device and values."""
    alike = (one.dtype, one.device) == (other.dtype, other.device)
    return alike and torch.equal(whole(one.detach()), whole(other.detach()))
