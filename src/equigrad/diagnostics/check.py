"""Is this meta-gradient right? Reference values, error, and what to change."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, CurvatureError, DoubleBackwardError
from equigrad.estimators import Contrastive, Estimator, ExactSolve
from equigrad.evaluation import Evaluation
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problems import Params, Problem
from equigrad.solvers import Phase, Solver

MORE_STEPS = 10
"""How many times longer the reference may settle than the estimate did."""

UNSETTLED = 1e-4
"""A phase that has more of its first residual left than this is called unsettled."""


@dataclass(frozen=True)
class Direction:
    """The derivative of the outer loss along one unit direction of θ.

    Attributes:
        estimated: by the estimator.
        reference: by central differences of the re-solved outer loss.
        uncertainty: what the reference changes by when its step is halved.
    """

    estimated: float
    reference: float
    uncertainty: float


@dataclass(frozen=True)
class Check:
    """The verdict on a meta-gradient; `print` it.

    Attributes:
        result: the meta-gradient that was checked.
        directions: derivatives along random directions, estimated and re-solved.
        relative_error: `‖ĝ - g‖ / ‖g‖`, over all of θ where the exact solve was possible, else
            over the directions.
        cosine: between ĝ and g, likewise.
        uncertainty: of the reference, as a share of it; an error below this says nothing.
        reference: what the error was measured against, in words.
        advice: what to change, a sentence each; empty where all is well.
        rtol: the error that was asked for.
    """

    result: MetaGradient
    directions: tuple[Direction, ...]
    relative_error: float
    cosine: float
    uncertainty: float
    reference: str
    advice: tuple[str, ...]
    rtol: float

    @property
    def told(self) -> bool:
        """Whether the reference is certain enough to judge by."""
        return self.uncertainty <= 0.5 * max(self.rtol, self.relative_error)

    @property
    def passed(self) -> bool:
        """Whether the error is at most `rtol`, by a reference that can tell."""
        return self.told and self.relative_error <= self.rtol

    def __str__(self) -> str:
        verdict = "is right" if self.passed else "is WRONG"
        verdict = verdict if self.told else "cannot be judged"
        lines = [
            f"The meta-gradient {verdict}: relative error {self.relative_error:.2g}, cosine "
            f"{self.cosine:.6f}, asked for {self.rtol:.2g}",
            f"  reference   {self.reference}, uncertain by {self.uncertainty:.1g}",
            f"  free phase  {self.result.phases[0]}",
            *(f"  β = {phase.beta:<7g} {phase}" for phase in self.result.phases[1:]),
            f"  gradients   {self.result.gradient_evaluations} for the estimate",
            "  along random unit directions of θ:   estimated     re-solved",
            *(
                f"{'':39}{d.estimated:>13.6g} {d.reference:>13.6g} ± {d.uncertainty:.1g}"
                for d in self.directions
            ),
            *(f"→ {sentence}" for sentence in self.advice),
        ]
        return "\n".join(lines)


def check_meta_gradient(
    problem: Problem,
    params: Params,
    meta_params: Params,
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    directions: int = 3,
    rtol: float = 1e-2,
    seed: int = 0,
) -> Check:
    """Compare a meta-gradient with references that do not depend on the estimator.

    The outer loss is re-solved at `θ ± h d` along random unit directions d and differenced. It
    starts from the settled state, which is first settled for up to ten times as many steps as the
    free phase had. Where the model has a double backward and φ is small, `ExactSolve` there gives
    the whole gradient too. For the contrastive rule, β is halved to see on which side of its best
    value it is.

    Args:
        problem: as for `meta_gradient`.
        params: as for `meta_gradient`.
        meta_params: as for `meta_gradient`.
        solver: as for `meta_gradient`.
        estimator: what is checked.
        directions: how many directions to re-solve along.
        rtol: relative error to pass.
        seed: draws the directions.

    Returns:
        The verdict, with what to change.

    Raises:
        ConfigurationError: directions < 1 or rtol ≤ 0.
        EquigradError: whatever `meta_gradient` raises.

    Example:
        >>> from equigrad.testing import Quadratic
        >>> q = Quadratic()
        >>> check = check_meta_gradient(
        ...     q.problem, q.params(), q.meta_params(), solver=q.solver(30)
        ... )
        >>> check.passed, "Settle longer" in str(check)
        (False, True)
    """
    if directions < 1 or not rtol > 0:
        raise ConfigurationError(
            f"directions must be at least 1 and rtol positive, got {directions} and {rtol}"
        )
    estimator = Contrastive() if estimator is None else estimator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = meta_gradient(problem, params, meta_params, solver=solver, estimator=estimator)
        resolve = _Resolve(problem, result, meta_params, solver, seed)
        units = resolve.units(directions)
        along = tuple(resolve.direction(unit) for unit in units)
        exact = resolve.exact()
        halved = resolve.halved(estimator, solver, params)

    resolved = torch.tensor([d.reference for d in along], dtype=torch.float64)
    spread = torch.tensor([d.uncertainty for d in along], dtype=torch.float64)

    def project(grads: Params) -> Tensor:
        return torch.stack([_flat(grads).dot(_flat(unit)) for unit in units])

    if exact is None:
        truth, read = resolved, project
        reference, uncertainty = "", _ratio(spread, resolved)
    else:
        truth, read = _flat(exact), _flat
        reference = f"exact solve for all {truth.numel()} meta-parameters, and "
        uncertainty = _ratio(project(exact) - resolved, resolved)
    reference += f"central differences along {directions} directions; {resolve.phase}"

    estimate = read(result.grads)
    check = Check(
        result,
        along,
        _ratio(estimate - truth, truth),
        (estimate.dot(truth) / (estimate.norm() * truth.norm())).item(),
        uncertainty,
        reference,
        (),
        rtol,
    )
    error_at_half_beta = None if halved is None else _ratio(read(halved) - truth, truth)
    advice = _advice(check, estimator, resolve.phase, error_at_half_beta)
    return replace(check, advice=tuple(advice))


class _Resolve:
    """Settles a problem again, and longer, around a settled state."""

    def __init__(
        self,
        problem: Problem,
        result: MetaGradient,
        meta_params: Params,
        solver: Solver,
        seed: int,
    ) -> None:
        self.problem, self.result, self.seed = problem, result, seed
        self.meta_params = {name: m.detach() for name, m in meta_params.items()}
        free = result.phases[0]
        eps = torch.finfo(next(iter(result.params.values())).dtype).eps
        self.solver = replace(
            solver,
            max_steps=MORE_STEPS * max(free.steps, 100),
            tol=max(10 * eps * free.start_residual, torch.finfo(torch.float64).tiny),
        )
        _, self.phase, self.params = self.settle(self.meta_params, result.params, self.solver)

    def settle(
        self, meta_params: Params, start: Params, solver: Solver
    ) -> tuple[float, Phase, Params]:
        """The outer loss where the inner problem settles, with the same randomness each time."""
        torch.manual_seed(self.seed)
        with Evaluation(self.problem, start, meta_params) as evaluation:
            settled = evaluation.settle(solver)
            return evaluation.outer_loss(settled).item(), settled.phase, settled.params

    def settle_near(self, meta_params: Params) -> float:
        """The outer loss at slightly other meta-parameters, settled anew from where it was."""
        one_step = replace(self.solver, max_steps=1, tol=None)
        pushed = self.settle(meta_params, self.params, one_step)[1].start_residual
        tol = max(1e-6 * pushed, 2 * self.phase.residual, torch.finfo(torch.float64).tiny)
        tol = None if tol > 0.01 * pushed else tol  # a reference that is itself not at rest
        return self.settle(meta_params, self.params, replace(self.solver, tol=tol))[0]

    def units(self, count: int) -> list[Params]:
        """Random unit directions of θ."""
        generator = torch.Generator().manual_seed(self.seed)
        units = []
        for _ in range(count):
            raw = {
                name: torch.randn(m.shape, generator=generator, dtype=torch.float64)
                for name, m in self.meta_params.items()
            }
            size = _flat(raw).norm()
            units.append({name: (raw[name] / size).to(m) for name, m in self.meta_params.items()})
        return units

    def direction(self, unit: Params) -> Direction:
        """Estimated and re-solved derivative along a direction."""
        eps = torch.finfo(next(iter(self.meta_params.values())).dtype).eps
        step = eps ** (1 / 3) * max(1.0, _flat(self.meta_params).norm().item())

        def difference(step: float) -> float:
            above, below = (
                self.settle_near({n: m + s * unit[n] for n, m in self.meta_params.items()})
                for s in (step, -step)
            )
            return (above - below) / (2 * step)

        coarse, fine = difference(step), difference(step / 2)
        estimated = _flat(self.result.grads).dot(_flat(unit)).item()
        return Direction(estimated, coarse, abs(coarse - fine))

    def exact(self) -> Params | None:
        """The whole gradient by an exact solve, where that is possible."""
        try:
            torch.manual_seed(self.seed)
            return meta_gradient(
                self.problem,
                self.params,
                self.meta_params,
                solver=self.solver,
                estimator=ExactSolve(max_size=500, products="autograd"),
            ).grads
        except (ConfigurationError, CurvatureError, DoubleBackwardError):
            return None

    def halved(self, estimator: Estimator, solver: Solver, params: Params) -> Params | None:
        """The contrastive estimate at half the β."""
        if not isinstance(estimator, Contrastive) or estimator.rtol is not None:
            return None
        torch.manual_seed(self.seed)
        less = replace(estimator, beta=estimator.beta / 2)
        return meta_gradient(
            self.problem, params, self.meta_params, solver=solver, estimator=less
        ).grads


def _advice(
    check: Check, estimator: Estimator, reference: Phase, error_at_half_beta: float | None
) -> list[str]:
    """What to change, where something is to be changed."""
    free, *nudged = check.result.phases
    said: list[str] = []
    if check.passed:
        return said
    if reference.residual > UNSETTLED * free.start_residual:
        said.append(
            f"The reference has not settled either ({reference}): there may be no equilibrium "
            f"near, or the solver is too slow. Regularise the inner loss, or try another solver"
        )
    if free.residual > UNSETTLED * free.start_residual:
        said.append(
            f"Settle longer: the free phase ended at a residual of {free.residual:.2g}, from "
            f"{free.start_residual:.2g}; raise max_steps, or ask for a tol"
        )
        if isinstance(estimator, Contrastive) and not estimator.matched:
            said.append("Use matched=True: the drift of the free phase is divided by β")
    if isinstance(estimator, Contrastive) and error_at_half_beta is not None:
        change = f"halving it changes the error to {error_at_half_beta:.2g}"
        if error_at_half_beta < 0.8 * check.relative_error:
            said.append(
                f"β = {estimator.beta:g} is too large for the curvature: {change}. Lower beta, or "
                f"use more points or the symmetric scheme"
            )
        elif error_at_half_beta > 1.2 * check.relative_error:
            dtype = next(iter(check.result.grads.values())).dtype
            said.append(
                f"β = {estimator.beta:g} is too small for {dtype}, or for phases that have not "
                f"settled: {change}. Raise beta, settle longer, or use torch.float64"
            )
        slow = [p for p in nudged if p.beta and p.residual > 0.1 * p.start_residual]
        if slow and free.residual <= UNSETTLED * free.start_residual:
            said.append(
                f"The nudged phases have hardly settled (residual {slow[0].start_residual:.2g} to "
                f"{slow[0].residual:.2g} in {slow[0].steps} steps): give them more steps"
            )
    return said or [
        f"The phases settled, so what is left is {type(estimator).__name__}'s own error "
        f"(at equilibrium: {estimator.traits.error})"
    ]


def _flat(tensors: Params) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors.values()])


def _ratio(difference: Tensor, whole: Tensor) -> float:
    return (difference.norm() / whole.norm()).item()
