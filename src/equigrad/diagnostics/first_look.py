"""What is looked at once, where a problem is seen for the first time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from equigrad.buffers import find_generators
from equigrad.diagnostics.own_weights import OwnWeights
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
from equigrad.problems import Params, pull_back
from equigrad.problems.pullback import dense
from equigrad.problems.refused import given
from equigrad.randomness import Stream
from equigrad.solvers import Settled
from equigrad.vectors import flatten, mismatch
from equigrad.wording import listed

WRONG = 1e-2
"""Relative error of a derivative that makes a gradient wrong."""

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
    - A map and an outer loss change along a direction by what autograd says.

    Takes four gradient evaluations at most and four values, more only where something is wrong, and
    none where the function that settles has been seen before, or another that the same object has
    made (the losses of a few-shot learner). They are not counted: what a meta-gradient takes does
    not depend on what has been called before it.

    Args:
        evaluation: of the problem.
        free: where it settled.
        estimator: the one that is asked for its gradient.

    Raises:
        ProblemError: a module computes with weights of its own in the place of those it is handed,
            or the gradient of the inner loss is none.
    """
    problem, twice = evaluation.problem, _twice(evaluation, free, estimator)
    function = given(problem.function("inner"))
    maker = getattr(function, "made_by", function if problem.reaches is None else None)
    known = maker is None or _seen[twice].get(id(maker)) is maker
    if all(problem.ranks.gathered(known)):
        return
    if look(evaluation, free, estimator) and maker is not None:
        with suppress(TypeError):  # cannot be referred to weakly: is looked at again
            _seen[twice][id(maker)] = maker


def look(
    evaluation: Evaluation, free: Settled, estimator: Estimator, caller: "Caller | None" = None
) -> bool:
    """What `first_look` does, seen before or not; whether all is well.

    Args:
        evaluation: of the problem.
        free: where it settled.
        estimator: the one that is asked for its gradient.
        caller: of the modules, where it is no loss of the user's.

    Raises:
        ProblemError: as `first_look`.
    """
    around = _Look(evaluation, free, _twice(evaluation, free, estimator), caller or Caller())
    if not around.outer_repeats() or not around.inner_repeats():
        return False
    if not _precise(evaluation, free):
        return True
    held = around.derivative_holds(estimator) if evaluation.problem.symmetric else True
    return around.nothing_is_hidden(estimator) and held


def _twice(evaluation: Evaluation, free: Settled, estimator: Estimator) -> bool:
    """Whether second derivatives by autograd are to be looked at."""
    derived = evaluation.problem.symmetric and estimator.differentiates_twice
    return derived and _precise(evaluation, free)


@dataclass(frozen=True)
class Caller:
    """Who calls a module, and what is to be said of it: by default, a loss of the user's.

    Attributes:
        moves: whether the module's own weights may be others than those that it is handed, so that
            it must not compute with its own in the backward.
        held: what to do about a parameter that it holds twice.
        changing: what it means that a call changes the next.
        state: where else a state may be, for which a note names the problem's class.
    """

    moves: bool = True
    held: str = "Call it by equigrad.nn.Functional(module), which binds them all"
    changing: str = (
        "Every phase starts with what the free one left, and the module is put back in the end; "
        "the gradient is that of a loss that changes as it settles"
    )
    state: str = "outside of the modules that it is seen to call (give them to {}(modules=…))"


def _precise(evaluation: Evaluation, at: Settled) -> bool:
    """Whether differences of gradients say anything about derivatives."""
    return not evaluation.lower and all(torch.finfo(p.dtype).bits >= 32 for p in at.params.values())


class _Look:
    """Evaluates a problem around where it settled.

    Args:
        evaluation: of the problem.
        free: where it settled.
        twice: whether gradients of what settles are to be differentiated.
        caller: of the modules.
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

    def outer_repeats(self) -> bool:
        """Whether the outer loss has one value; says so where not."""

        def value(shift: bool) -> Slope:
            with torch.no_grad(), self._own.shifted_in_calls() if shift else nullcontext():
                found = self._evaluation.evaluate(
                    "outer", self._free.params, self._evaluation.meta_params
                )
            return Slope(found.detach(), torch.zeros(1), torch.zeros(1))

        return self._repeats("outer", value)

    def inner_repeats(self) -> bool:
        """Whether what settles has one gradient; says so where not."""
        return self._repeats("inner", lambda shift: self._slope(shift=shift))

    def _first_slope(self, slope: Callable[[bool], Slope], stream: Stream) -> Slope:
        """With its graph where second derivatives are asked for, and there."""
        if stream == "inner" and self._twice:
            try:
                return self._slope(graph=True)
            except RuntimeError:  # a compiled function, whose backward records no graph
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
                f"{name} is no function of params and step: two calls differ by {apart:.1g}, with "
                f"the same params, the same seeds and the same state of modules. It draws from a "
                f"random generator of its own{self._generators()}, or keeps a state "
                f"{self._caller.state.format(type(evaluation.problem).__name__)}"
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
                f"put its own weights back. {self._caller.held}"
            )
        what = " and ".join(changed) or "the state of a module"
        evaluation.tally.note(
            f"{name} is no function of params and step: two calls in a row differ by "
            f"{first.differs(again):.1g}, since each changes {what}. {self._caller.changing}"
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

    def nothing_is_hidden(self, estimator: Estimator) -> bool:
        """Whether a map and the outer loss change as autograd says; says so where not."""
        slopes: dict[Stream, Slope | None] = {"outer": judged_slope(self._evaluation, self._free)}
        if self._is_map:
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

    def _asymmetry(self, u: "Move", v: "Move", ahead: Slope) -> float:
        """How far the gradient's derivative is from symmetric, along two directions."""
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
        if abs(near - far) > ALIKE * abs(far) or not size:
            return 0.0
        return min(abs(near), abs(far)) / size

    def _change(self, move: "Move", scale: float) -> Slope:
        """What the gradient changes by along a direction, by central differences."""
        there, back = (self._slope(move.times(s)) for s in (scale, -scale))
        return there.minus(back).times(0.5 / scale)

    def _along(self, seed: int) -> "Move":
        """A random direction: the first of φ, the second of φ and θ."""
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
            value = self._probed(params, meta)
        with own.shifted() if shift and self._caller.moves else nullcontext():
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

    def _split(self, value: Tensor, grads: Sequence[Tensor]) -> Slope:
        grads, count = [g.detach().clone() for g in dense(tuple(grads))], len(self._free.params)
        self._hold(grads)
        params, meta = (flatten(part) for part in (grads[:count], grads[count:]))
        return Slope(value.detach(), params, meta)


def _padding(modules: Iterable[nn.Module]) -> Iterator[tuple[str, int]]:
    """Rows of embeddings that stand for no word, and get no gradient."""
    for module in modules:
        for path, part in module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None:
                yield f"{path}.weight".lstrip("."), part.padding_idx


def problem_batches(problem: Any) -> list[Any]:
    """What hands out mini-batches."""
    return [b for b in (problem.inner_batches, problem.outer_batches) if b is not None]
