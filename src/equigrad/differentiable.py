"""A differentiable argmin, and a differentiable fixed point of a map."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equigrad.buffers import find_modules
from equigrad.diagnostics.first_look import first_look
from equigrad.diagnostics.own_weights import backward_explained
from equigrad.diagnostics.rest import not_at_rest
from equigrad.equilibrium import KNOWN_BY_ITS_COTANGENT, Equilibrium, LinearLoss
from equigrad.errors import ConfigurationError, ProblemError, SettlingWarning
from equigrad.estimators import Adjoint, Contrastive, Estimator, Reptile
from equigrad.estimators.estimator import serving
from equigrad.evaluation import Evaluation, check_tensors
from equigrad.fields import expect, require
from equigrad.gradient import check_settings
from equigrad.problems import Bilevel, FixedPoint, Params, Problem
from equigrad.problems.problem import Loss
from equigrad.results import MetaGradient
from equigrad.solvers import Phase, Settled, Solver
from equigrad.wording import listed


class SettledParams(dict[str, Tensor]):
    """Settled params φ* by name, with their graph to θ.

    Attributes:
        phase: the report of the phase that settled them.
        status: whether they settled, and further remarks, in words.
        gradient: the result of the last backward pass through them, with its `status`, `phases` and
            `error_estimate`; None before. Its outer loss is `⟨∂L/∂φ*, φ*⟩`.
    """

    phase: Phase
    status: str
    _report: "_Report"

    @property
    def gradient(self) -> MetaGradient | None:
        """The result of the last backward pass."""
        return self._report.gradient


@dataclass
class _Report:
    """The result of a backward pass, apart from the graph, which must not refer to its output."""

    gradient: MetaGradient | None = None

    def __call__(self, gradient: MetaGradient | None, notes: list[str]) -> None:
        self.gradient = gradient if gradient is not None else self.gradient


def argmin(
    inner_loss: Callable[..., Tensor],
    start: Params,
    meta_params: Params,
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    batches: Any = None,
    modules: Any = None,
    samples: bool = False,
) -> SettledParams:
    r"""The minimiser of a loss, as tensors with a graph to the meta-parameters.

        φ*(θ) = argmin_φ L_in(φ, θ),    ∂L/∂θ += (∂φ*/∂θ)ᵀ ∂L/∂φ*

    Functions of the result can be differentiated once, by `loss.backward()` or
    `torch.autograd.grad`. The backward pass asks the estimator for the gradient of `⟨c, φ*⟩`, where
    c is the cotangent `∂L/∂φ*` divided by its norm: `Contrastive` settles again under the constant
    force `β c` and takes first-order gradients only. No iterates are kept in memory.

    θ are the entries of `meta_params` that require a gradient; the others, which may be data, are
    constants. As with `meta_gradient`, modules are not changed. Under autocast the inner loss
    computes in the lower precision, also in the backward pass, and nothing else does.

    Args:
        inner_loss: `(params, meta_params) -> scalar`; with `batches`, `(params, meta_params, batch)
            -> scalar`. It may call `argmin` itself.
        start: initial φ, by name. It may require a gradient if the estimator sees the start
            (`Unrolled`, `MAML` …).
        meta_params: θ, by name: `dict(module.named_parameters())`, for example.
        solver: the solver of all phases.
        estimator: computes the gradient; `Contrastive()` by default.
        batches: mini-batches of the inner loss, as `inner_batches` of `Bilevel`.
        modules: modules that the loss calls, as for `Bilevel`.
        samples: whether the first dimension of every parameter counts samples, whose losses are
            independent and summed.

    Returns:
        φ* by name, with the reports of both passes.

    Raises:
        ProblemError: loss, start or meta-parameters are invalid, or the loss uses a tensor that
            requires a gradient and is not in `meta_params`.
        ConfigurationError: the solver or the estimator does not work here.
        SettlingError: the phase diverged.
        DoubleBackwardError: from a second derivative through the result.

    A phase that misses its tolerance, and a backward pass with a remark, give a `SettlingWarning`
    the first time for every inner loss.

    Example:
        >>> import torch, equigrad as eg
        >>> log_strength = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> fit = eg.argmin(
        ...     lambda p, m: (p["w"] - 2).square().sum() + m["log"].exp() * p["w"].square().sum(),
        ...     {"w": torch.zeros(3, dtype=torch.float64)},
        ...     {"log": log_strength},
        ...     solver=eg.GradientDescent(lr=0.2, tol=1e-9),
        ... )
        >>> fit["w"].sum().backward()  # each w is 2 / (1 + exp(log))
        >>> round(log_strength.grad.item(), 4)
        -1.5
    """
    estimator = Contrastive() if estimator is None else estimator
    expect(Loss, inner_loss=inner_loss)
    call = _Call("argmin", inner_loss, meta_params, solver, estimator, samples)

    def problem(function: Any, **known: Any) -> Problem:
        return Bilevel(inner_loss=function, inner_batches=batches, **known)

    return call.run(problem, start, modules)


def fixed_point(
    map: Callable[..., Params],
    start: Params,
    meta_params: Params,
    *,
    solver: Solver,
    estimator: Estimator | None = None,
    batches: Any = None,
    modules: Any = None,
    samples: bool = False,
) -> SettledParams:
    r"""A fixed point of a map, as tensors with a graph to the meta-parameters.

        φ* = F(φ*, θ),    ∂L/∂θ += (∂φ*/∂θ)ᵀ ∂L/∂φ*

    All else is as for `argmin`; `equigrad.nn.EquilibriumLayer` is the same for a module.

    Args:
        map: `(params, meta_params) -> dict` with the names and shapes of `params`; with `batches`,
            `(params, meta_params, batch) -> dict`, where the map is the mean over batches.
        start: initial φ, by name.
        meta_params: θ, by name.
        solver: the solver of all phases.
        estimator: computes the gradient; `Adjoint()` by default, or any that needs no energy.
        batches: as for `argmin`.
        modules: as for `argmin`.
        samples: whether the first dimension of every parameter counts samples, whose maps are
            independent.

    Returns:
        φ* by name, with the reports of both passes.

    Raises:
        ProblemError: as from `argmin`.
        ConfigurationError: as from `argmin`.
        SettlingError: the phase diverged.
        DoubleBackwardError: as from `argmin`.

    Example:
        >>> import torch, equigrad as eg
        >>> b = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> rest = eg.fixed_point(
        ...     lambda p, m: {"h": 0.5 * p["h"] + m["b"]},
        ...     {"h": torch.zeros(2, dtype=torch.float64)},
        ...     {"b": b},
        ...     solver=eg.Picard(tol=1e-9),
        ... )
        >>> rest["h"].sum().backward()  # h is 2 b
        >>> [round(g, 6) for g in b.grad.tolist()]
        [2.0, 2.0]
    """
    estimator = Adjoint() if estimator is None else estimator
    expect(Loss, map=map)
    call = _Call("fixed_point", map, meta_params, solver, estimator, samples)

    def problem(function: Any, **known: Any) -> Problem:
        return FixedPoint(map=function, inner_batches=batches, **known)

    return call.run(problem, start, modules)


@dataclass(frozen=True)
class _Held:
    """A user's function of all meta-parameters, as a function of the learned ones alone."""

    function: Callable[..., Any]
    meta_params: Params

    def __call__(self, params: Params, learned: Params, *batch: Any) -> Any:
        meta = {name: learned.get(name, held) for name, held in self.meta_params.items()}
        return self.function(params, meta, *batch)


@dataclass(frozen=True)
class _Call:
    """One call of `argmin` or `fixed_point`."""

    kind: str
    function: Callable[..., Any]
    meta_params: Params
    solver: Solver
    estimator: Estimator
    samples: bool

    @property
    def who(self) -> str:
        """The call's name in messages."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{self.kind}({name})"

    def run(self, problem: Callable[..., Problem], start: Params, modules: Any) -> SettledParams:
        """Settle, and attach the result to the graph."""
        self._check(start)
        recorded = torch.is_grad_enabled()
        tensors = dict(self.meta_params)
        sources = self._sources(start)
        tensors |= {own: start[name] for name, own in sources.items()}
        learned = {n: t.detach().requires_grad_() for n, t in tensors.items() if t.requires_grad}
        learned = learned if recorded else {}
        floats = {n: t.detach() for n, t in tensors.items() if t.is_floating_point()}
        known: dict[str, Any] = {
            "modules": find_modules(self.function) if modules is None else modules,
            "samples": self.samples,
        }
        made = problem(
            _Held(self.function, {n: t.detach() for n, t in self.meta_params.items()}),
            outer_loss=LinearLoss({n: torch.ones_like(p) for n, p in start.items()}),
            reaches=None if learned else {"inner": [*floats], "outer": []},
            **known,
        )
        require(
            made.ranks.group is None,
            f"{self.who} runs on one process, but a module that it calls is shared by several. "
            f"Call meta_gradient instead, or use the module before it is wrapped",
        )
        begin = {n: learned.get(sources.get(n, ""), p.detach()) for n, p in start.items()}
        report = _Report()
        with (
            torch.inference_mode(False),
            backward_explained(),
            Evaluation(made, begin, learned or floats, solver=self.solver) as evaluation,
        ):
            equilibrium = self._equilibrium(evaluation, sources, report)
            if recorded:
                self._look_for_strays(evaluation)
            if learned:
                self.estimator.check(evaluation, self.solver)
            settled = equilibrium.settle(evaluation)
            equilibrium.judge(evaluation, settled)
            if learned:
                self._look(evaluation, settled)
        again = None
        if not self.estimator.traits.equilibrium:
            again = {name: p.clone() for name, p in evaluation.params.items()}
        with torch.set_grad_enabled(recorded):
            seed = evaluation.stage.seed
            found = SettledParams(equilibrium.attach(settled, seed, tensors, again))
        if not learned:
            evaluation.tally.note("no graph leads to θ: gradients are off, or θ requires none")
        found.phase, found._report = settled.phase, report
        found.status = "; ".join([str(settled.phase), *evaluation.tally.notes])
        return found

    def _check(self, start: Params) -> None:
        """Refuse arguments that are invalid for any problem."""
        expect(Solver, solver=self.solver)
        expect(Estimator, estimator=self.estimator)
        check_settings(self.solver)
        check_tensors("start", start)
        _check_mapping(self.meta_params, start)
        learned = [name for name, p in start.items() if p.requires_grad]
        if learned and not self.estimator.traits.sees_start:
            raise ProblemError(
                f"start {listed(learned)} requires a gradient, but a converged solution does not "
                f"depend on it. Start from {{n: p.detach() for n, p in start.items()}}, or use an "
                f"estimator of a finite number of steps, such as Unrolled()"
            )
        if isinstance(self.estimator, Reptile):
            raise ConfigurationError(
                "Reptile() is not a gradient, so it cannot be used in a backward pass; use "
                "FirstOrderMAML() or MAML()"
            )

    def _sources(self, start: Params) -> dict[str, str]:
        """For params with a learned start, the name of that start: of θ, or one of its own."""
        named = {id(tensor): name for name, tensor in self.meta_params.items()}
        return {n: named.get(id(p), f"start {n}") for n, p in start.items() if p.requires_grad}

    def _equilibrium(
        self, evaluation: Evaluation, sources: dict[str, str], report: _Report
    ) -> Equilibrium:
        """The equilibrium that the graph refers to."""
        if self.estimator.traits.minimum:
            why = KNOWN_BY_ITS_COTANGENT.format(who=self.kind, cotangent="∂L/∂φ*", state="φ*")
            others = serving(evaluation, lambda traits: traits.equilibrium and not traits.minimum)
            raise ConfigurationError(f"{type(self.estimator).__name__} {why}; use {others}")
        made: Any = evaluation.problem
        reached = evaluation.reaches.functions["inner"]

        def problem(tensors: Params, learned: Params, cotangent: Params) -> Problem:
            reaches = {"inner": [n for n in reached if n in learned], "outer": []}
            return replace(made, outer_loss=LinearLoss(cotangent), reaches=reaches)

        return Equilibrium(
            who=self.who,
            problem=problem,
            solver=self.solver,
            estimator=self.estimator,
            say=self._say,
            samples=self.samples,
            sources=sources,
            report=report,
        )

    def _look(self, evaluation: Evaluation, settled: Settled) -> None:
        """Check the function at its first call; closures of the same code count as one."""
        key = self.estimator.differentiates_twice, self._code
        if key in _looked:
            return
        said = len(evaluation.tally.notes)
        first_look(evaluation, settled, self.estimator)
        if (why := not_at_rest(evaluation, settled)) is not None:
            evaluation.tally.note(why)
            self._say("forward", lambda: f"{self.who}: {why}")
        if len(evaluation.tally.notes) == said:
            _looked.add(key)

    @property
    def _code(self) -> Any:
        """The code object that all closures of a function share."""
        return getattr(self.function, "__code__", type(self.function))

    def _say(self, which: str, message: Callable[[], str]) -> None:
        """Warn the first time for this function."""
        key = which, self._code
        if key not in _said:
            warnings.warn(message(), SettlingWarning, stacklevel=5)
            _said.add(key)

    def _look_for_strays(self, evaluation: Evaluation) -> None:
        """Refuse tensors that require a gradient but are not in `meta_params`."""
        own = {n: p.clone().requires_grad_() for n, p in evaluation.params.items()}
        meta = {n: m.clone().requires_grad_() for n, m in evaluation.meta_params.items()}
        given = {id(t) for t in (*own.values(), *meta.values())}
        probe = evaluation.probe("inner", own, meta)
        strays = [t for t in _leaves(probe) if id(t) not in given]
        if strays:
            shapes = ", ".join(sorted({str(tuple(t.shape)) for t in strays}))
            raise ProblemError(
                f"{self.who} uses tensors that require a gradient and are not in meta_params "
                f"(leaves of shape {shapes}), so they would get no gradient. Put them into "
                f"meta_params, or detach them (the weights of a module by requires_grad_(False))"
            )


_said: set[tuple[str, Any]] = set()
"""Which warnings have been given for which function."""

_looked: set[tuple[bool, Any]] = set()
"""Functions that passed the checks of estimators that differentiate twice (True) or once."""


def _check_mapping(meta_params: Params, start: Params) -> None:
    """Refuse meta-parameters that are not named tensors, or are on another device than φ."""
    if not isinstance(meta_params, Mapping) or not meta_params:
        check_tensors("meta_params", meta_params)
    for name, tensor in meta_params.items():
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
            check_tensors("meta_params", {name: tensor})
        devices = {p.device for p in start.values()}
        if tensor.ndim and tensor.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ProblemError(
                f"meta_params[{name!r}] is on {tensor.device}, but start is on {where}; move them "
                f"to the same device"
            )


def _leaves(root: Tensor) -> Iterator[Tensor]:
    """The leaf tensors of a graph."""
    seen, queue = set(), [root.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        queue.extend(after for after, _ in node.next_functions)
