"""What an evaluation is given: checked here, and compared between ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from equigrad.errors import ProblemError
from equigrad.evaluation.tally import Tally
from equigrad.evaluation.tensors import check_tensors
from equigrad.parallel import Likeness, require_alike
from equigrad.problems import Params, Problem
from equigrad.randomness import Stream
from equigrad.wording import listed


def check_given(problem: Problem, params: Params, meta_params: Params, tally: Tally) -> None:
    """Refuse φ and θ that cannot be settled or learned, and note what is odd about them.

    Raises:
        ProblemError: they are no finite tensors by name, or φ is empty; or φ is frozen where
            several processes share a module.
    """
    check_tensors("params", params)
    check_tensors("meta_params", meta_params)
    if problem.samples and any(p.ndim and len(p) == 0 for p in params.values()):
        raise ProblemError(f"params {listed(params)} hold no samples; leave out empty batches")
    frozen = [n for n, p in params.items() if isinstance(p, nn.Parameter) and not p.requires_grad]
    if not frozen:
        return
    if problem.ranks.group is not None:
        raise ProblemError(
            f"params {listed(frozen)} are frozen (requires_grad=False) in their module, of which "
            f"data-parallel wrappers keep no copies in step: call requires_grad_() on them before "
            f"the module is wrapped, or leave them out of params"
        )
    tally.note(
        f"params {listed(frozen)} are frozen (requires_grad=False) in their module, and "
        f"settle all the same; leave them out of params to keep them"
    )


def agreed_seed(
    problem: Problem, params: Params, meta_params: Params, seed: int | None, tally: Tally
) -> int:
    """The seed of the first rank, once all ranks have been seen to be given the same.

    Raises:
        ProblemError: they have not.
    """
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
                f"{problem.name(stream)}: the mean of each counts alike, and so an example of a "
                f"small one for more; multiply the loss by its share of all examples, times the "
                f"number of ranks"
            )
    return said[0].seed


def _examples(batches: object) -> int | None:
    """How many examples the first mini-batch holds, where that can be seen."""
    if not isinstance(batches, Sequence) or not batches:
        return None
    sizes = [len(t) for t in tree_leaves(batches[0]) if isinstance(t, Tensor) and t.ndim]
    return sizes[0] if sizes else None
