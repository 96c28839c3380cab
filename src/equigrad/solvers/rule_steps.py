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
        state[-1] = state[-1] + 1
        t, width = int(state[-1].item()), self.rule.buffers
        chosen = self._chosen(objective)
        for i, (p, v, options) in enumerate(zip(params, velocity, chosen, strict=True)):
            own = slice(i * width, (i + 1) * width)
            upward = -v if options["maximize"] else v
            after, state[own] = self.rule.step(p, upward, state[own], options, t)
            if torch.is_grad_enabled():
                params[i] = after  # the previous tensor is part of the graph
            else:
                p.copy_(after)

    def _chosen(self, objective: Objective) -> list[dict[str, Any]]:
        """The settings of each of the params at this step."""
        plain = {n: o for n, o in self.options.items() if not callable(o)}
        moving = {n: settings(n, o, objective) for n, o in self.options.items() if n not in plain}
        return [
            {**plain, **{n: column[i] for n, column in moving.items()}}
            for i in range(len(objective.params))
        ]
