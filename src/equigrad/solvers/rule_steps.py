"""The steps of a torch optimiser by its update rule, so that they can be differentiated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from equigrad.solvers.schedules import settings
from equigrad.solvers.solver import Objective, Solver
from equigrad.solvers.update_rules import UpdateRule


@dataclass(frozen=True, kw_only=True)
class RuleSteps(Solver):
    """The steps of a `TorchOptimizer`, without torch's optimiser.

    Attributes:
        rule: the update rule of one parameter.
        options: all settings of the optimiser by torch's names; some may be schedules.
    """

    differentiable: ClassVar[bool] = True
    functional: ClassVar[bool] = True

    rule: UpdateRule
    options: Mapping[str, Any]

    def init(self, params: list[Tensor], previous: list[Tensor] | None = None) -> list[Tensor]:
        """The buffers of each parameter in turn, initially zero, and the number of steps taken."""
        if previous:
            return [s.clone() for s in previous]
        zeros = [torch.zeros_like(p, requires_grad=False) for p in params]
        count = torch.zeros((), dtype=torch.float64)
        return [z.clone() for z in zeros for _ in range(self.rule.buffers)] + [count]

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: list[Tensor],
        objective: Objective,
    ) -> None:
        """One step."""
        names = list(self.options)
        columns = [settings(name, self.options[name], objective) for name in names]
        state[-1] = state[-1] + 1
        t, width = int(state[-1].item()), self.rule.buffers
        sign = 1.0 if self.options["maximize"] else -1.0
        for i, (p, v) in enumerate(zip(params, velocity, strict=True)):
            chosen = {n: column[i] for n, column in zip(names, columns, strict=True)}
            own = slice(i * width, (i + 1) * width)
            after, state[own] = self.rule.step(p, sign * v, state[own], chosen, t)
            if torch.is_grad_enabled():
                params[i] = after  # the previous tensor is part of the graph
            else:
                p.copy_(after)
