"""Checks of a problem's functions when it is first settled."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from equigrad.buffers import find_generators
from equigrad.diagnostics.own_weights import Caller, OwnWeights, padding_rows
from equigrad.diagnostics.slopes import (
    ALIKE,
    STRETCH,
    SUSPICIOUS,
    Move,
    Slope,
    balanced,
    dot,
    expected,
    flat,
    judged_slope,
    nothing_is_hidden,
)
from equigrad.errors import ProblemError
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.problems import Params, Problem, pull_back
from equigrad.problems.pullback import dense
from equigrad.problems.refused import given
from equigrad.randomness import Stream
from equigrad.solvers import Settled
from equigrad.vectors import flatten, mismatch
from equigrad.wording import listed

WRONG = 1e-2
"""A relative error of a derivative above this makes the gradient wrong."""

AWAY = 8.0, 16.0, 32.0, 64.0
"""Further distances for a second look: nearly sure softmaxes move by whole rounding errors."""

ROUNDED = 0.7
"""The share that may remain there of a difference due to rounding; a real one stays."""

ROUNDING = 1e4
"""Number of rounding errors by which two evaluations may differ."""

_seen: dict[tuple[Stream, bool], WeakValueDictionary[int, Any]] = {
    (stream, further): WeakValueDictionary()
    for stream in ("inner", "outer")
    for further in (False, True)
}
"""Functions that passed: inner ones without or with the checks of estimators that differentiate
twice (True), outer ones without or with that of their gradient, where an estimator asked for it."""


def first_look(evaluation: Evaluation, free: Settled, estimator: Estimator) -> None:
    """Check at the end of a phase that the losses are what every estimator assumes.

    - Two equal calls return the same number: a loss is a function of params and step.
    - A module that is called with given weights computes with them alone, also in the backward.
    - The residual is the gradient of the inner loss: its derivative is symmetric, and equal to that
      of autograd if the estimator uses it.
    - A map, an outer loss, and an inner one of which second derivatives are taken, change along a
      direction as autograd says.

    This takes at most four gradient evaluations and six values, and more only if something is
    wrong. It takes none of a function that has passed before, or of one made by the same object
    (such as the losses of a few-shot learner). They are not counted, so that the count of a
    meta-gradient does not depend on earlier calls.

    Args:
        evaluation: the evaluation of the problem.
        free: the end of the free phase.
        estimator: the estimator of the gradient.

    Raises:
        ProblemError: a module computes with its own weights in place of the given ones, or the
            residual is not the gradient of the inner loss.
    """
    further: dict[Stream, bool] = {
        "inner": _twice(evaluation, free, estimator),
        "outer": judged_slope(evaluation, free) is not None,
    }
    makers: dict[Stream, Any] = {stream: _maker(evaluation.problem, stream) for stream in further}
    known: dict[Stream, bool] = {
        stream: maker is None or _seen[stream, further[stream]].get(id(maker)) is maker
        for stream, maker in makers.items()
    }
    everywhere = evaluation.problem.ranks.gathered(known)
    streams: list[Stream] = [s for s in known if not all(rank[s] for rank in everywhere)]
    if not streams or not look(evaluation, free, estimator, streams=streams):
        return
    for stream in streams:
        with suppress(TypeError):  # allows no weak reference, so it is checked every time
            _seen[stream, further[stream]][id(makers[stream])] = makers[stream]


def _maker(problem: Problem, stream: Stream) -> Any:
    """What a function is known by: its maker, or itself; None for the library's own."""
    function = given(problem.function(stream))
    return getattr(function, "made_by", function if problem.reaches is None else None)


def look(
    evaluation: Evaluation,
    free: Settled,
    estimator: Estimator,
    caller: Caller | None = None,
    streams: Sequence[Stream] = ("inner", "outer"),
) -> bool:
    """Run the checks of `first_look` in any case; return whether they passed.

    Args:
        evaluation: the evaluation of the problem.
        free: the end of the free phase.
        estimator: the estimator of the gradient.
        caller: the caller of the modules, if it is not a loss of the user.
        streams: which of the functions to check; the last one first.

    Raises:
        ProblemError: as from `first_look`.
    """
    around = _Look(evaluation, free, _twice(evaluation, free, estimator), caller or Caller())
    if not all(around.repeats(stream) for stream in reversed(streams)):
        return False
    if not _precise(evaluation, free):
        return True
    derived = evaluation.problem.symmetric and "inner" in streams
    held = around.derivative_holds(estimator) if derived else True
    return around.nothing_is_hidden(estimator, streams) and held


def _twice(evaluation: Evaluation, free: Settled, estimator: Estimator) -> bool:
    """Whether to check second derivatives by autograd."""
    derived = evaluation.problem.symmetric and estimator.differentiates_twice
    return derived and _precise(evaluation, free)


def _precise(evaluation: Evaluation, at: Settled) -> bool:
    """Whether the precision allows derivatives to be checked by differences of gradients."""
    return not evaluation.lower and all(torch.finfo(p.dtype).bits >= 32 for p in at.params.values())


class _Look:
    """Evaluates a problem around its settled state.

    Args:
        evaluation: the evaluation of the problem.
        free: the end of the free phase.
        twice: whether the inner gradient will be differentiated.
        caller: the caller of the modules.
    """

    def __init__(self, evaluation: Evaluation, free: Settled, twice: bool, caller: Caller) -> None:
        self._caller = caller
        self._evaluation, self._free, self._twice = evaluation, free, twice
        self._own = OwnWeights(evaluation.problem.modules or ())
        self.dtype = next(iter(free.params.values())).dtype
        self._graph: tuple[list[Tensor], Sequence[Tensor]] | None = None
        self._tolerance = min(ROUNDING * torch.finfo(self.dtype).eps, 0.25)
        if evaluation.lower:
            self._tolerance = 0.25

    def repeats(self, stream: Stream) -> bool:
        """Whether the outer loss or the inner gradient is reproducible; notes it if not."""

        def value(shift: bool) -> Slope:
            with torch.no_grad(), self._own.shifted_in_calls() if shift else nullcontext():
                found = self._evaluation.evaluate(
                    "outer", self._free.params, self._evaluation.meta_params
                )
            return Slope(found.detach(), torch.zeros(1), torch.zeros(1))

        inner = stream == "inner"
        return self._repeats(stream, (lambda s: self._slope(shift=s)) if inner else value)

    def _first_slope(self, slope: Callable[[bool], Slope], stream: Stream) -> Slope:
        """The first value and gradient, with a graph if second derivatives will be checked."""
        if stream == "inner" and self._twice:
            try:
                return self._slope(graph=True)
            except RuntimeError:  # the backward of a compiled function records no graph
                self._evaluation.stage.stand_at(self._free)
        return slope(False)

    def _repeats(self, stream: Stream, slope: Callable[[bool], Slope]) -> bool:
        evaluation, name = self._evaluation, self._evaluation.problem.name(stream)
        evaluation.stage.stand_at(self._free)
        first = self._first_slope(slope, stream)
        self._first = first
        again, changed = slope(True), evaluation.stage.changed()
        if first.differs(again) <= self._tolerance:
            return True
        evaluation.stage.stand_at(self._free)
        apart = first.differs(slope(False))
        if apart > self._tolerance:
            evaluation.tally.note(
                f"{name} is not a function of params and step alone: two calls with the same "
                f"params, seeds and state of modules differ by {apart:.1g}. It uses a random "
                f"generator of its own{self._generators()}, or keeps a state "
                f"{self._caller.state.format(type(evaluation.problem).__name__)}"
            )
            return False
        evaluation.stage.stand_at(self._free)
        apart = first.differs(slope(True))
        if apart > self._tolerance:
            raise ProblemError(
                f"{name} computes with its module's own weights in addition to the given ones "
                f"({listed(self._own.names)}): it changes by {apart:.1g} if they change. A "
                f"parameter is stored twice (in a list, for example), or the module runs again in "
                f"the backward pass (gradient checkpointing), after functional_call has restored "
                f"its own weights. {self._caller.held}"
            )
        what = " and ".join(changed) or "the state of a module"
        evaluation.tally.note(
            f"{name} is not a function of params and step alone: two successive calls differ by "
            f"{first.differs(again):.1g}, because each changes {what}. {self._caller.changing}"
        )
        return False

    def _generators(self) -> str:
        problem = self._evaluation.problem
        found = find_generators(
            problem.function("inner"), problem.outer_loss, *problem_batches(problem)
        )
        return f" ({', '.join(found)})" if found else ""

    def derivative_holds(self, estimator: Estimator) -> bool:
        """Whether autograd's derivative of the inner gradient is right; raises or notes if not."""
        u, v = self._along(0), self._along(1)
        ahead = self._slope(u).minus(self._first)
        apart = self._hidden(u, ahead)
        apart = self._asymmetry(u, v, ahead) if apart is None else apart
        if not apart > SUSPICIOUS:
            return True
        name = self._evaluation.problem.name("inner")
        said = (
            f"autograd's gradient of {name} is not its true gradient: at the settled params, its "
            f"derivative differs by about {apart:.1%} from the second derivative of a function. "
            f"Something in {name} is hidden from autograd (.detach(), torch.no_grad(), .data, a "
            f"custom backward), so {type(estimator).__name__} does not estimate how the settled "
            f"params move with θ. Use a FixedPoint problem whose map is a step with nothing "
            f"hidden, lambda p, m: {{n: p[n] - lr * gradient[n] for n in p}}, with GMRES()"
        )
        at_rest = estimator.traits.equilibrium and estimator.traits.energy
        if apart > WRONG and (at_rest or estimator.differentiates_twice):
            raise ProblemError(said)
        self._evaluation.tally.note(said)
        return False

    def nothing_is_hidden(self, estimator: Estimator, streams: Sequence[Stream]) -> bool:
        """Whether maps, primitives and the outer loss change as autograd predicts; notes if not."""
        slopes: dict[Stream, Slope | None] = {}
        if "outer" in streams:
            slopes["outer"] = judged_slope(self._evaluation, self._free)
        if "inner" in streams and (self._twice or not self._evaluation.problem.symmetric):
            slopes["inner"] = self._first
        looked = [
            nothing_is_hidden(self._evaluation, self._free, stream, slope, self._probed, estimator)
            for stream, slope in slopes.items()
            if slope is not None
        ]
        return all(looked)

    @property
    def _is_map(self) -> bool:
        """Whether what settles is a map, and no loss or energy."""
        return not self._evaluation.problem.energy

    def _probed(self, params: Params, meta: Params) -> Tensor:
        """The inner loss; of a map, a weighted sum of its residual."""
        if not self._is_map:
            return self._evaluation.probe("inner", params, meta)
        residual = self._evaluation.residual(params, meta, 0)
        generator = torch.Generator().manual_seed(2)
        # positive, to see what is added to all, and uneven, to see through entries that add up to 1
        weights = [(0.5 + torch.rand(r.shape, generator=generator)).to(r) for r in residual]
        return torch.stack([(w * r).sum() for w, r in zip(weights, residual, strict=True)]).sum()

    def _hidden(self, u: "Move", ahead: Slope) -> float | None:
        """The error of autograd's second derivatives along u, by differences of the gradient.

        None if there are no second derivatives, or none are needed.
        """
        if self._graph is None:
            return None
        leaves, grads = self._graph
        try:
            pulled = pull_back(
                grads[: len(u.params)], list(u.params.values()), leaves, retain_graph=True
            )
        except RuntimeError:
            return None
        seen = self._split(ahead.value, pulled)

        if (
            not max(mismatch(seen.params, ahead.params), mismatch(seen.meta, ahead.meta))
            > SUSPICIOUS
        ):
            return 0.0
        near, far = self._change(u, 1 / STRETCH), self._change(u, 1.0)
        # differences that depend on the distance are those of a kink, or rounding
        if mismatch(near.params, far.params) > SUSPICIOUS:
            return 0.0
        smooth = mismatch(near.meta, far.meta) < SUSPICIOUS

        def apart(found: Slope) -> float:
            return max(
                mismatch(seen.params, found.params), smooth * mismatch(seen.meta, found.meta)
            )

        further = (apart(self._change(u, scale)) for scale in AWAY)
        return 0.0 if any(off < ROUNDED * apart(far) for off in further) else apart(far)

    def _asymmetry(self, u: "Move", v: "Move", ahead: Slope) -> float:
        """The asymmetry of the gradient's derivative along two directions, relative to its size."""
        v = balanced(v, ahead)
        aside = self._slope(v).minus(self._first)
        size = max(expected(u, aside), expected(v, ahead))
        if not abs(dot(u, aside) - dot(v, ahead)) > SUSPICIOUS * size:  # also where NaN
            return 0.0
        found = []
        for scale in (1 / STRETCH, 1.0):
            ahead, aside = self._change(u, scale), self._change(v, scale)
            found.append(dot(u, aside) - dot(v, ahead))
        size = max(expected(u, aside), expected(v, ahead))
        near, far = found
        if abs(near - far) > ALIKE * abs(far) or not (size and far):
            return 0.0
        for scale in AWAY:
            ahead, aside = self._change(u, scale), self._change(v, scale)
            if (dot(u, aside) - dot(v, ahead)) / far < ROUNDED:
                return 0.0
        return min(abs(near), abs(far)) / size

    def _change(self, move: "Move", scale: float) -> Slope:
        """The change of the gradient along a direction, by central differences."""
        there, back = (self._slope(move.times(s)) for s in (scale, -scale))
        return there.minus(back).times(0.5 / scale)

    def _along(self, seed: int) -> "Move":
        """A random direction: for seed 0 in φ alone, otherwise in φ and θ."""
        generator = torch.Generator().manual_seed(seed)
        step = torch.finfo(self.dtype).eps ** (1 / 3)

        def drawn(tensors: dict[str, Tensor], least: float) -> dict[str, Tensor]:
            raw = {n: torch.randn(t.shape, generator=generator).to(t) for n, t in tensors.items()}
            size = max(flat(tensors).norm().item(), least)
            distance = step * (size or 1.0) / flat(raw).norm().item()
            return {n: distance * t for n, t in raw.items()}

        params, meta = self._free.params, self._evaluation.meta_params
        moved = flat(params) - flat(self._evaluation.params)
        along = drawn(params, moved.norm().item())
        self._hold(list(along.values()))
        across = drawn(meta, 1.0) if seed else {n: torch.zeros_like(m) for n, m in meta.items()}
        return Move(along, across)

    def _slope(
        self, move: "Move | None" = None, *, shift: bool = False, graph: bool = False
    ) -> Slope:
        """The value and gradient of the inner function at a displacement, with new leaves."""
        evaluation, own = self._evaluation, self._own
        params, meta = self._free.params, evaluation.meta_params
        if move is not None:
            evaluation.stage.stand_at(self._free)
            params = {n: p + move.params[n] for n, p in params.items()}
            meta = {n: m + move.meta[n] for n, m in meta.items()}
        params = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
        meta = {n: m.detach().clone().requires_grad_() for n, m in meta.items()}
        leaves = [*params.values(), *meta.values()]
        with own.shifted_in_calls() if shift else nullcontext():
            value = self._probed(params, meta)
        with own.shifted() if shift and self._caller.moves else nullcontext():
            grads = torch.autograd.grad(
                value, leaves, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        if graph:
            self._graph = leaves, grads
        return self._split(value, grads)

    def _hold(self, tensors: list[Tensor]) -> None:
        """Set entries to zero that get no gradient by design."""
        for name, row in padding_rows(self._evaluation.problem.modules or ()):
            if name in self._free.params and self._free.params[name].ndim == 2:
                tensors[list(self._free.params).index(name)][row] = 0

    def _split(self, value: Tensor, grads: Sequence[Tensor]) -> Slope:
        grads, count = [g.detach().clone() for g in dense(tuple(grads))], len(self._free.params)
        self._hold(grads)
        params, meta = (flatten(part) for part in (grads[:count], grads[count:]))
        return Slope(value.detach(), params, meta)


def problem_batches(problem: Any) -> list[Any]:
    """The problem's mini-batches, where it has any."""
    return [b for b in (problem.inner_batches, problem.outer_batches) if b is not None]
