"""Problems in which some samples are held where they stand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.problems.problem import Problem
from equigrad.problems.pullback import Params


def held(problem: Problem, params: Params, samples: Sequence[int]) -> Problem:
    """A problem whose functions see some samples as constants.

    What never settled has no gradient: nothing depends on such a sample any more, so that it gets
    no pressure and passes none on, in whatever phase or linear system follows. The outer loss keeps
    its value, and what it owes to θ directly.

    Args:
        problem: with samples.
        params: where they are held.
        samples: their numbers.
    """
    lost = torch.tensor(samples, device=next(iter(params.values())).device)
    rows = {name: p.detach().index_select(0, lost) for name, p in params.items()}
    functions = {
        problem.name(stream): _Held(problem.function(stream), lost, rows)
        for stream in ("inner", "outer")
    }
    return problem.with_(**functions)


@dataclass(frozen=True)
class _Held:
    function: Callable[..., Any]
    lost: Tensor
    rows: Params

    def __call__(self, params: Params, *others: Any) -> Any:
        constant = {
            name: p.index_copy(0, self.lost, self.rows[name].to(p.dtype))
            for name, p in params.items()
        }
        return self.function(constant, *others)
