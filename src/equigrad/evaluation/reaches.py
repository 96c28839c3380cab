"""Which functions of a problem each meta-parameter reaches, found by evaluating them once."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from equigrad.errors import ProblemError
from equigrad.evaluation.start import Start
from equigrad.evaluation.tally import Tally
from equigrad.problems import Params, Problem, check_scalar
from equigrad.randomness import Stream
from equigrad.solvers.schedules import Schedule, asked
from equigrad.wording import listed

NO_STEP_SIZE = (
    "the solution of the inner problem does not depend on the step size of the solver, so use a "
    "constant that converges fast, and learn what changes the solution, such as the strength or "
    "the centre of a regulariser, weights of losses or samples, or parts of the model"
)
"""Why a learning rate has no meta-gradient, and what does, as part of a sentence."""


@dataclass(frozen=True)
class Reaches:
    """Names of the meta-parameters that each part of a problem depends on.

    Attributes:
        functions: names that the inner and the outer function depend on.
        regularizer: names that the regulariser of the inner loss depends on.
        start: names that the initial params were computed from.
        solver: names that the solver's settings are computed from.
    """

    functions: Mapping[Stream, list[str]]
    regularizer: frozenset[str]
    start: list[str]
    solver: list[str]

    def loss(self, stream: Stream) -> frozenset[str]:
        """Names that a loss depends on; for the inner loss, with its regulariser."""
        own = frozenset(self.functions[stream])
        return own | self.regularizer if stream == "inner" else own

    @property
    def only_start(self) -> list[str]:
        """Names that reach a loss only through the start."""
        seen = self.loss("inner") | self.loss("outer")
        return [name for name in self.start if name not in seen]

    @property
    def only_solver(self) -> list[str]:
        """Names that reach a loss only through the solver's settings."""
        seen = self.loss("inner") | self.loss("outer") | {*self.start}
        return [name for name in self.solver if name not in seen]


def find_reaches(
    problem: Problem,
    params: Params,
    meta_params: Params,
    start: Start,
    tally: Tally,
    schedules: Mapping[str, Schedule],
) -> Reaches:
    """Find which meta-parameters each function of a problem depends on, and check the functions.

    Unless the problem says which names reach what, its functions are evaluated on one batch, and on
    further batches until every meta-parameter is found.

    Args:
        problem: the problem.
        params: φ, detached.
        meta_params: θ, detached.
        start: both as they were given, with their graph.
        tally: counts the gradients, and notes params that no loss depends on.
        schedules: the solver's settings that are functions of θ.

    Raises:
        ProblemError: a function returns an invalid value or does not depend on φ, or a
            meta-parameter reaches nothing.
    """
    functions: dict[Stream, list[str]]
    if problem.reaches is None:
        functions = _Trial(problem, meta_params, tally).run(params)
    else:
        functions = {stream: [*names] for stream, names in problem.reaches.items()}
    regularizer = problem.regularizer
    pulling = frozenset[str]() if regularizer is None else regularizer.meta_names
    found = Reaches(functions, pulling, start.names, _scheduling(schedules, meta_params))
    _check_seen(found, problem, start)
    return found


def _scheduling(schedules: Mapping[str, Schedule], meta_params: Params) -> list[str]:
    """Names that the solver's settings at the first step are computed from."""
    meta = {name: m.clone().requires_grad_() for name, m in meta_params.items()}
    with torch.enable_grad():
        given = [asked(name, schedule, meta, 0) for name, schedule in schedules.items()]
    found = [s for s in tree_leaves(given) if isinstance(s, Tensor) and s.requires_grad]
    if not found:
        return []
    total = torch.stack([s.sum() for s in found]).sum()
    grads = torch.autograd.grad(total, list(meta.values()), allow_unused=True)
    return [name for name, grad in zip(meta, grads, strict=True) if grad is not None]


def _check_seen(found: Reaches, problem: Problem, start: Start) -> None:
    """Raise for meta-parameters that reach nothing."""
    seen = found.loss("inner") | found.loss("outer") | {*found.start} | {*found.solver}
    unseen = sorted(set(start.meta_params) - seen)
    given = {id(p) for p in start.params.values()}
    same = [name for name in unseen if id(start.meta_params[name]) in given]
    if same:
        raise ProblemError(
            f"meta-parameter {listed(same)} is also the initial value of params, but does not "
            f"require a gradient. Call requires_grad_() on it to learn the initialisation"
        )
    if unseen:
        raise ProblemError(
            f"neither {problem.name('inner')} nor outer_loss depends on meta-parameter "
            f"{listed(unseen)}, so its meta-gradient would always be zero. Use it in one of them "
            f"(.detach(), .item() and torch.no_grad() hide a dependence), or leave it out. (If it "
            f"is the initialisation of params, pass params that are computed from meta_params, "
            f"with their graph, or make it the centre of a proximal term, as in "
            f"equigrad.nn.ComplexSynapse(learn=('center',)), because a converged solution does "
            f"not depend on its initialisation. If it is a learning rate or another setting of "
            f"the solver: {NO_STEP_SIZE}; or make that setting of the solver a function of it, as "
            f"in docs/learned-rates.md.)"
        )


class _Trial:
    """Evaluates a problem's functions to find their dependences."""

    def __init__(self, problem: Problem, meta_params: Params, tally: Tally) -> None:
        self._ranks, self._problem = problem.ranks, problem.alone()
        self._tally = tally
        self._meta = {name: m.clone().requires_grad_() for name, m in meta_params.items()}

    def run(self, params: Params) -> dict[Stream, list[str]]:
        """The meta-parameters that each function depends on, on any of the ranks."""
        with self._ranks.together():
            reached, moved = self._run(params)
        said = self._ranks.gathered((reached, moved))
        idle = sorted(set(params).difference(*(moved for _, moved in said)))
        if idle:
            self._tally.note(f"neither loss depends on params {listed(idle)}")
        return {
            stream: [n for n in self._meta if any(n in theirs[stream] for theirs, _ in said)]
            for stream in reached
        }

    def _run(self, params: Params) -> tuple[dict[Stream, set[str]], set[str]]:
        """The meta-parameters that each function depends on, and the params, on this rank."""
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        found: dict[Stream, set[str]] = {}
        moved: set[str] = set()
        streams: tuple[Stream, ...] = ("inner", "outer")
        for stream in streams:
            moves, reached = self._first_batch(stream, leaves)
            moved |= moves
            for step in range(1, len(self._problem.batches(stream) or [None])):
                if len(reached) < len(self._meta):
                    reached |= self._later_batch(stream, params, step)
            found[stream] = reached
        if self._problem.regularizer is not None:
            penalty = self._problem.regularizer.penalty(leaves, self._meta)
            check_scalar("the regularizer", penalty)
        return found, moved

    def _first_batch(self, stream: Stream, params: Params) -> tuple[set[str], set[str]]:
        """The params and the meta-parameters that a function depends on, on its first batch."""
        loss = self._checked(stream, params)
        leaves = [*params.values(), *self._meta.values()]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        self._tally.spend(1)
        reached = [g is not None for g in grads]
        moves = {name for name, r in zip(params, reached, strict=False) if r}
        if not moves:
            raise ProblemError(
                f"{self._problem.name(stream)} does not depend on any of params {listed(params)}. "
                f"Compute it from the params that it is called with, for example by "
                f"equigrad.nn.Functional(module)"
            )
        there = zip(self._meta, reached[len(params) :], strict=True)
        return moves, {name for name, r in there if r}

    def _later_batch(self, stream: Stream, params: Params, step: int) -> set[str]:
        """The meta-parameters that a function depends on, on a later batch."""
        loss = self._probe(stream, params, step)
        if not loss.requires_grad:
            return set()
        self._tally.spend(1)
        grads = torch.autograd.grad(loss, list(self._meta.values()), allow_unused=True)
        return {name for name, g in zip(self._meta, grads, strict=True) if g is not None}

    def _checked(self, stream: Stream, params: Params) -> Tensor:
        """A function's scalar on its first batch; raises if it has no gradient."""
        name = self._problem.name(stream)
        try:
            probe = self._probe(stream, params, 0)
        except KeyError as error:
            raise ProblemError(
                f"{name} uses the name {error}, which does not exist: params has "
                f"{listed(params)}, meta_params has {listed(self._meta)}"
            ) from error
        if not probe.requires_grad:
            raise ProblemError(
                f"{name} returned a tensor that does not require a gradient. Compute it from the "
                f"params that it is called with, without .item(), .detach() or torch.no_grad()"
            )
        return probe

    def _probe(self, stream: Stream, params: Params, step: int) -> Tensor:
        return self._problem.probe(stream, params, self._meta, step)
