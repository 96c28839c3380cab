"""What is looked at once, where a problem is seen for the first time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from equigrad.buffers import find_generators
from equigrad.diagnostics.own_weights import OwnWeights
from equigrad.errors import ProblemError
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.problems import pull_back
from equigrad.problems.problem import dense
from equigrad.randomness import Stream
from equigrad.solvers import Settled
from equigrad.vectors import flatten, mismatch
from equigrad.wording import listed

SUSPICIOUS = 3e-3
"""Relative error of a derivative that is worth a closer look, and a word."""

WRONG = 1e-2
"""Relative error of a derivative that makes a gradient wrong."""

ALIKE = 0.1
"""How much an asymmetry may differ between two distances: that of a kink grows as they shrink."""

STRETCH = 8.0
"""How much longer a step of θ may be made, and how much shorter one of φ, to see both alike."""

ROUNDING = 1e4
"""Rounding errors that two evaluations may differ by."""

_seen: dict[bool, WeakValueDictionary[int, Any]] = {
    twice: WeakValueDictionary() for twice in (False, True)
}
"""Functions that are what they are taken for: by estimators that differentiate twice, or once."""


def first_look(evaluation: Evaluation, free: Settled, estimator: Estimator) -> None:
    """See whether the losses are what every estimator takes them for, where a phase settled.

    - The same call twice gives the same number: a loss is a function of params and step.
    - A module that is handed weights computes with them alone, also in the backward.
    - What settles is the gradient of the inner loss: its derivative is symmetric, and that of
      autograd where the estimator takes it.

    Takes four gradient evaluations, more only where something is wrong, and none where the
    function that settles has been seen before. They are not counted: what a meta-gradient takes
    does not depend on what has been called before it.

    Args:
        evaluation: of the problem.
        free: where it settled.
        estimator: the one that is asked for its gradient.

    Raises:
        ProblemError: a module computes with weights of its own in the place of those it is handed,
            or the gradient of the inner loss is none.
    """
    problem = evaluation.problem
    function = _given(problem.function("inner"))
    precise = not evaluation.lower and _precise(free)
    twice = problem.symmetric and precise and estimator.differentiates_twice
    known = problem.reaches is not None or _seen[twice].get(id(function)) is function
    if all(problem.ranks.gathered(known)):
        return
    look = _Look(evaluation, free, twice)
    if not look.outer_repeats() or not look.inner_repeats():
        return
    judged = True
    if problem.symmetric and precise:
        judged = look.derivative_holds(estimator)
    try:
        if judged:
            _seen[twice][id(function)] = function
    except TypeError:  # cannot be referred to weakly: is looked at again
        return


def _precise(at: Settled) -> bool:
    """Whether differences of gradients say anything about derivatives."""
    return all(torch.finfo(p.dtype).bits >= 32 for p in at.params.values())


def _given(function: Any) -> Any:
    """The user's own function, which autocast and samples that are held have wrapped."""
    while hasattr(function, "function"):
        function = function.function
    return function


@dataclass(frozen=True)
class _Slope:
    """A scalar and its gradient by φ and by θ, each a flat vector."""

    value: Tensor
    params: Tensor
    meta: Tensor

    def differs(self, other: "_Slope") -> float:
        """By how much, relative to its size."""
        size = max(_norm(self), self.value.abs().item() / max(len(self.params) ** 0.5, 1.0))
        change = self.minus(other)
        apart = max(_norm(change), change.value.abs().item())
        return apart / size if size else float(apart > 0)

    def minus(self, other: "_Slope") -> "_Slope":
        """The difference."""
        return _Slope(self.value - other.value, self.params - other.params, self.meta - other.meta)

    def times(self, scale: float) -> "_Slope":
        """As many times as much."""
        return _Slope(self.value, scale * self.params, scale * self.meta)


def _norm(slope: _Slope) -> float:
    return math.hypot(slope.params.norm().item(), slope.meta.norm().item())


class _Look:
    """Evaluates a problem around where it settled.

    Args:
        evaluation: of the problem.
        free: where it settled.
        twice: whether gradients of what settles are to be differentiated.
    """

    def __init__(self, evaluation: Evaluation, free: Settled, twice: bool) -> None:
        self._evaluation, self._free, self._twice = evaluation, free, twice
        self._own = OwnWeights(evaluation.problem.modules or ())
        self.dtype = next(iter(free.params.values())).dtype
        self._graph: tuple[list[Tensor], Sequence[Tensor]] | None = None
        self._tolerance = min(ROUNDING * torch.finfo(self.dtype).eps, 0.25)
        if evaluation.lower:
            self._tolerance = 0.25

    def outer_repeats(self) -> bool:
        """Whether the outer loss has one value; says so where not."""

        def value(shift: bool) -> _Slope:
            with torch.no_grad(), self._own.shifted_in_calls() if shift else nullcontext():
                found = self._evaluation.evaluate(
                    "outer", self._free.params, self._evaluation.meta_params
                )
            return _Slope(found.detach(), torch.zeros(1), torch.zeros(1))

        return self._repeats("outer", value)

    def inner_repeats(self) -> bool:
        """Whether what settles has one gradient; says so where not."""
        return self._repeats("inner", lambda shift: self._slope(shift=shift))

    def _first_slope(self, slope: Callable[[bool], _Slope], stream: Stream) -> _Slope:
        """With its graph where second derivatives are asked for, and there."""
        if stream == "inner" and self._twice:
            try:
                return self._slope(graph=True)
            except RuntimeError:  # a compiled function, whose backward records no graph
                self._evaluation.stage.stand_at(self._free)
        return slope(False)

    def _repeats(self, stream: Stream, slope: Callable[[bool], _Slope]) -> bool:
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
                f"{name} is no function of params and step: two calls differ by {apart:.1g}, with "
                f"the same params, the same seeds and the same state of modules. It draws from a "
                f"random generator of its own{self._generators()}, or keeps a state outside of the "
                f"modules that it is seen to call (give them to {type(evaluation.problem).__name__}"
                f"(modules=…))"
            )
            return False
        evaluation.stage.stand_at(self._free)
        apart = first.differs(slope(True))
        if apart > self._tolerance:
            raise ProblemError(
                f"{name} computes with weights of its module's own beside those that it is handed "
                f"({listed(self._own.names)}): it changes by {apart:.1g} where they are shifted. A "
                f"parameter is held a second time (in a list, for example), or the module is "
                f"called again in the backward (gradient checkpointing), when functional_call has "
                f"put its own weights back. Call it by equigrad.nn.Functional(module), which binds "
                f"them all"
            )
        what = " and ".join(changed) or "the state of a module"
        evaluation.tally.note(
            f"{name} is no function of params and step: two calls in a row differ by "
            f"{first.differs(again):.1g}, since each changes {what}. Every phase starts with what "
            f"the free one left, and the module is put back in the end; the gradient is that of a "
            f"loss that changes as it settles"
        )
        return False

    def _generators(self) -> str:
        problem = self._evaluation.problem
        found = find_generators(
            problem.function("inner"), problem.outer_loss, *problem_batches(problem)
        )
        return f" ({', '.join(found)})" if found else ""

    def derivative_holds(self, estimator: Estimator) -> bool:
        """Whether the gradient of the inner loss is what autograd takes it for; refuses or says."""
        u, v = self._along(0), self._along(1)
        ahead = self._slope(u).minus(self._first)
        apart = self._hidden(u, ahead)
        apart = self._asymmetry(u, v, ahead) if apart is None else apart
        if not apart > SUSPICIOUS:
            return True
        name = self._evaluation.problem.name("inner")
        said = (
            f"the gradient of {name} is not what autograd takes it for: where it settled, its "
            f"derivative differs by about {apart:.1%} from the second derivative of a function. "
            f"Something in {name} is hidden from autograd (.detach(), torch.no_grad(), .data, a "
            f"custom backward), so that {type(estimator).__name__} differs from how the settled "
            f"params move with θ. Declare what settles a FixedPoint, whose map is a step of it "
            f"with nothing hidden, lambda p, m: {{n: p[n] - lr * gradient[n] for n in p}}, and use "
            f"GMRES()"
        )
        at_rest = estimator.traits.equilibrium and estimator.traits.energy
        if apart > WRONG and (at_rest or estimator.differentiates_twice):
            raise ProblemError(said)
        self._evaluation.tally.note(said)
        return False

    def _hidden(self, u: "_Move", ahead: _Slope) -> float | None:
        """How far second derivatives by autograd are from differences of the gradient, along u.

        None where there are no second derivatives, or nobody asks for them.
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
        return max(mismatch(seen.params, far.params), smooth * mismatch(seen.meta, far.meta))

    def _asymmetry(self, u: "_Move", v: "_Move", ahead: _Slope) -> float:
        """How far the gradient's derivative is from symmetric, along two directions."""
        v = _balanced(v, ahead)
        aside = self._slope(v).minus(self._first)
        size = max(_expected(u, aside), _expected(v, ahead))
        if not abs(_dot(u, aside) - _dot(v, ahead)) > SUSPICIOUS * size:  # also where NaN
            return 0.0
        found = []
        for scale in (1 / STRETCH, 1.0):
            ahead, aside = self._change(u, scale), self._change(v, scale)
            found.append(_dot(u, aside) - _dot(v, ahead))
        size = max(_expected(u, aside), _expected(v, ahead))
        near, far = found
        if abs(near - far) > ALIKE * abs(far) or not size:
            return 0.0
        return min(abs(near), abs(far)) / size

    def _change(self, move: "_Move", scale: float) -> _Slope:
        """What the gradient changes by along a direction, by central differences."""
        there, back = (self._slope(move.times(s)) for s in (scale, -scale))
        return there.minus(back).times(0.5 / scale)

    def _along(self, seed: int) -> "_Move":
        """A random direction: the first of φ, the second of φ and θ."""
        generator = torch.Generator().manual_seed(seed)
        step = torch.finfo(self.dtype).eps ** (1 / 3)

        def drawn(tensors: dict[str, Tensor], least: float) -> dict[str, Tensor]:
            raw = {n: torch.randn(t.shape, generator=generator).to(t) for n, t in tensors.items()}
            size = max(_flat(tensors).norm().item(), least)
            distance = step * (size or 1.0) / _flat(raw).norm().item()
            return {n: distance * t for n, t in raw.items()}

        params, meta = self._free.params, self._evaluation.meta_params
        moved = _flat(params) - _flat(self._evaluation.params)
        along = drawn(params, moved.norm().item())
        self._hold(list(along.values()))
        across = drawn(meta, 1.0) if seed else {n: torch.zeros_like(m) for n, m in meta.items()}
        return _Move(along, across)

    def _slope(
        self, move: "_Move | None" = None, *, shift: bool = False, graph: bool = False
    ) -> _Slope:
        """The gradient of what settles, at a distance, on fresh leaves."""
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
            value = evaluation.probe("inner", params, meta)
        with own.shifted() if shift else nullcontext():
            grads = torch.autograd.grad(
                value, leaves, create_graph=graph, allow_unused=True, materialize_grads=True
            )
        if graph:
            self._graph = leaves, grads
        return self._split(value, grads)

    def _hold(self, tensors: list[Tensor]) -> None:
        """Leave out what is kept from learning by design."""
        for name, row in _padding(self._evaluation.problem.modules or ()):
            if name in self._free.params and self._free.params[name].ndim == 2:
                tensors[list(self._free.params).index(name)][row] = 0

    def _split(self, value: Tensor, grads: Sequence[Tensor]) -> _Slope:
        grads, count = [g.detach().clone() for g in dense(tuple(grads))], len(self._free.params)
        self._hold(grads)
        params, meta = (flatten(part) for part in (grads[:count], grads[count:]))
        return _Slope(value.detach(), params, meta)


@dataclass(frozen=True)
class _Move:
    """A displacement of φ and θ."""

    params: dict[str, Tensor]
    meta: dict[str, Tensor]

    def times(self, scale: float) -> "_Move":
        """The same direction, as far."""
        params, meta = (
            {n: scale * t for n, t in part.items()} for part in (self.params, self.meta)
        )
        return _Move(params, meta)


def _padding(modules: Iterable[nn.Module]) -> Iterator[tuple[str, int]]:
    """Rows of embeddings that stand for no word, and get no gradient."""
    for module in modules:
        for path, part in module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None:
                yield f"{path}.weight".lstrip("."), part.padding_idx


def _balanced(move: _Move, change: _Slope) -> _Move:
    """A direction whose parts in φ and in θ see as much of a change of the gradient."""
    params, meta = (
        _expected(part, change) for part in (_Move(move.params, {}), _Move({}, move.meta))
    )
    ratio = params / meta if params and meta else 1.0
    longer, shorter = min(max(ratio, 1 / STRETCH), STRETCH), min(max(ratio / STRETCH, 1.0), STRETCH)
    return _Move(
        {n: t / shorter for n, t in move.params.items()},
        {n: t * longer for n, t in move.meta.items()},
    )


def _dot(move: _Move, slope: _Slope) -> float:
    return (_flat(move.params).dot(slope.params) + _flat(move.meta).dot(slope.meta)).item()


def _expected(move: _Move, slope: _Slope) -> float:
    """The size of the product of a random direction with a vector."""
    parts = ((move.params, slope.params), (move.meta, slope.meta))
    return sum(_flat(d).norm().item() * s.norm().item() / len(s) ** 0.5 for d, s in parts if d)


def _flat(tensors: Any) -> Tensor:
    return flatten([t.detach() for t in tensors.values()])


def problem_batches(problem: Any) -> list[Any]:
    """What hands out mini-batches."""
    return [b for b in (problem.inner_batches, problem.outer_batches) if b is not None]
