"""Problems in which some samples are held constant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equigrad.problems.problem import Problem
from equigrad.problems.pullback import Params


def held(problem: Problem, params: Params, samples: Sequence[int]) -> Problem:
    """A problem whose functions treat some samples as constants.

    A sample that never settled has no gradient. Held constant, it contributes to no gradient or
    linear system in later phases. The outer loss keeps its value and its direct dependence on θ.

    Args:
        problem: a problem with samples.
        params: the values at which they are held.
        samples: indices of the samples to hold.
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
