"""Checks of φ and θ and their comparison between ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from equigrad.errors import ProblemError
from equigrad.evaluation.tally import Tally
from equigrad.evaluation.tensors import check_samples, check_tensors
from equigrad.parallel import (
    Layout,
    OnShards,
    Ranks,
    is_fully_sharded,
    mesh_of,
    meshes,
    whole,
)
from equigrad.problems import Params, Problem
from equigrad.problems.refused import refuse_shards
from equigrad.randomness import Stream
from equigrad.wording import listed


@dataclass(frozen=True)
class Given:
    """A problem with its φ and θ as ordinary tensors.

    Attributes:
        problem: the problem, as a function of these tensors.
        params: φ.
        meta_params: θ.
        layouts: how the original φ and θ were distributed over processes.
    """

    problem: Problem
    params: Params
    meta_params: Params
    layouts: tuple[Layout, Layout] = (Layout(), Layout())


def gathered(problem: Problem, params: Params, meta_params: Params) -> Given:
    """The problem, φ and θ, with tensors that are spread over processes gathered on each process.

    A module of `fully_shard` has a share of the data on each process, and computes with whole
    tensors. Without one, tensors on processes have one loss, which is handed them as they lie.

    Raises:
        ProblemError: the tensors lie on different meshes or on one of several dimensions; or the
            problem is not a `Bilevel`, has its data spread over processes without such a module,
            or learns the start of φ.
    """
    tensors = (params, meta_params)
    if not all(isinstance(t, Mapping) for t in tensors):
        return Given(problem, params, meta_params)  # `check_given` will refuse it
    named = {n: t for part in tensors for n, t in part.items() if isinstance(t, Tensor)}
    found = meshes(named.values())
    modules = any(is_fully_sharded(part) for part in problem.ranks.wrapped)
    if not found or not (modules or any(mesh.size() > 1 for mesh in found)):
        return Given(problem, params, meta_params)
    if not problem.spreads:
        for name, tensor in named.items():
            refuse_shards(name, tensor)
    kind = f"{listed([n for n, t in named.items() if mesh_of(t) is not None])}: DTensors"
    learned = {id(m) for m in meta_params.values()}
    if len(found) > 1 or found[0].ndim > 1:
        raise ProblemError(
            f"{kind} must all be on the same one-dimensional device mesh, got {found}"
        )
    if problem.ranks.group is not None and not modules:
        raise ProblemError(
            f"{kind} share one loss over all processes, but group= or a data-parallel module says "
            f"that each process has a loss of its own. Gather them with .full_tensor(), or leave "
            f"group out"
        )
    if any(p.requires_grad and (not p.is_leaf or id(p) in learned) for p in params.values()):
        raise ProblemError(
            f"{kind} cannot be a start that is learned. Gather params and meta_params with "
            f".full_tensor()"
        )
    layouts = Layout.of(params, found[0]), Layout.of(meta_params, found[0])
    own_params, own_meta = ({n: _whole(t) for n, t in part.items()} for part in tensors)
    together = (
        problem
        if modules
        else _of_whole(problem, layouts, Ranks(found[0].get_group(), shares=False))
    )
    return Given(together, own_params, own_meta, layouts)


def _of_whole(problem: Problem, layouts: tuple[Layout, Layout], ranks: Ranks) -> Problem:
    """A problem of sharded tensors, as one of whole ones."""
    streams: tuple[Stream, ...] = ("inner", "outer")
    own = {problem.name(s): OnShards(problem.function(s), *layouts) for s in streams}
    return problem.with_(**own, ranks=ranks)


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor on each process, frozen if it was a frozen parameter."""
    if mesh_of(tensor) is None:
        return tensor
    found = whole(tensor.detach())
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return nn.Parameter(found, requires_grad=False)
    return found


def check_given(problem: Problem, params: Params, meta_params: Params, tally: Tally) -> None:
    """Refuse φ and θ that cannot settle or be learned, and note frozen and hooked parameters.

    Raises:
        ProblemError: they are not mappings from names to finite tensors, or φ is empty; φ has one
            parameter under two names, or is frozen in a module that several processes share; or a
            transform of torch.func is active.
    """
    if torch._C._are_functorch_transforms_active():
        raise ProblemError(
            "this is called inside of a transform of torch.func (vmap, grad, jvp, …), which cannot "
            "follow a loop whose length depends on values. Call it outside, in a loop over θ; for "
            "the gradient of what depends on the settled params, use equigrad.argmin or "
            "equigrad.fixed_point with torch.autograd"
        )
    check_tensors("params", params)
    check_tensors("meta_params", meta_params)
    _refuse_tied(params)
    own = {n: p for module in problem.modules or () for n, p in module.named_parameters()}
    hooked = [n for n, p in params.items() if p._backward_hooks or own.get(n, p)._backward_hooks]
    if hooked:
        tally.note(
            f"params {listed(hooked)} have backward hooks (register_hook), which are not called: "
            f"φ settles by the gradient of the loss. If they change gradients, change the loss "
            f"instead, for example by a mask on what is to stay as it is"
        )
    if problem.samples:
        check_samples(params)
    frozen = [n for n, p in params.items() if isinstance(p, nn.Parameter) and not p.requires_grad]
    if not frozen:
        return
    if problem.ranks.group is not None:
        raise ProblemError(
            f"params {listed(frozen)} are frozen (requires_grad=False) in their module, and "
            f"data-parallel wrappers do not synchronise frozen parameters. Call requires_grad_() "
            f"on them before the module is wrapped, or leave them out of params"
        )
    tally.note(
        f"params {listed(frozen)} are optimised although they are frozen (requires_grad=False) in "
        f"their module; leave them out of params to keep them as they are"
    )


def _refuse_tied(params: Params) -> None:
    """Raise a `ProblemError` if a module's parameter is in φ under two names."""
    first: dict[int, str] = {}
    for name, p in params.items():
        if isinstance(p, nn.Parameter) and first.setdefault(id(p), name) != name:
            raise ProblemError(
                f"params {first[id(p)]!r} and {name!r} are one parameter under two names (tied "
                f"weights), and would settle apart. Leave one of them out, as named_parameters() "
                f"does; torch.func.functional_call and equigrad.nn.Functional tie them"
            )


def agreed_seed(
    problem: Problem, params: Params, meta_params: Params, seed: int | None, tally: Tally
) -> int:
    """Check that all ranks have the same φ, θ and batches, and return the first rank's seed.

    Raises:
        ProblemError: they differ.
    """
    from equigrad.parallel.likeness import Likeness, require_alike

    streams: tuple[Stream, ...] = ("inner", "outer")
    given = [*params.values(), *meta_params.values()]
    mine = Likeness(
        params=Likeness.marks(params),
        meta_params=Likeness.marks(meta_params),
        constants=Likeness.marks(Likeness.constants_of(problem.modules or (), given)),
        batches={f"{s}_batches": len(problem.batches(s) or ()) for s in streams},
        seed=int(torch.randint(2**62, ())) if seed is None else seed,
        examples={s: examples for s in streams if (examples := _examples(problem.batches(s)))},
    )
    said = problem.ranks.gathered(mine)
    require_alike(said)
    for stream in streams:
        sizes = [rank.examples.get(stream) for rank in said]
        if len(set(sizes)) > 1:
            tally.note(
                f"ranks have mini-batches of {', '.join(map(str, sizes))} examples of "
                f"{problem.name(stream)}. The mean over ranks gives each rank the same weight, so "
                f"examples of a smaller batch count more. To avoid this, multiply the loss by the "
                f"rank's share of all examples and by the number of ranks"
            )
    return said[0].seed


def _examples(batches: object) -> int | None:
    """The number of examples in the first mini-batch; None if that is unknown."""
    if not isinstance(batches, Sequence) or not batches:
        return None
    sizes = [len(t) for t in tree_leaves(batches[0]) if isinstance(t, Tensor) and t.ndim]
    return sizes[0] if sizes else None
