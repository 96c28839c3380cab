"""Meta-SGD: a learned initialisation and a learned step size for every weight."""

import torch
from torch import Tensor, nn

from equigrad.fields import Positive, expect
from equigrad.nn.functional import Functional
from equigrad.problems import Params


class LearnedRates(Functional):
    r"""Any module with all weights fast, and a meta-learned start and step size for each.

        φ_0 = θ,    φ ← φ - α ∘ ∂L/∂φ        (Li, Zhou, Chen, Li 2017)

    Both θ and α, one number of either sign for each weight, are learned. Pass `rates` to the solver
    as its `lr`, and use an estimator that differentiates the steps.

    Args:
        model: any module. Parameters with `requires_grad=False` stay constants.
        rate: initial value of every α.

    Example:
        >>> import torch, equigrad as eg
        >>> model = LearnedRates(torch.nn.Linear(3, 2), rate=0.1)
        >>> sorted(model.meta_params())
        ['rate.bias', 'rate.weight', 'start.bias', 'start.weight']
        >>> solver = eg.GradientDescent(lr=model.rates, max_steps=5)
    """

    regularizer = None

    def __init__(self, model: nn.Module, rate: float = 0.01) -> None:
        super().__init__(model)
        expect(Positive, rate=rate)
        self._rate = rate

    def meta_params(self) -> dict[str, Tensor]:
        """New leaves `start.NAME` and `rate.NAME`, which require a gradient."""
        start = {f"start.{name}": p.requires_grad_() for name, p in self.params().items()}
        rates = {
            f"rate.{name}": torch.full_like(p, self._rate).requires_grad_()
            for name, p in self.params().items()
        }
        return start | rates

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Initial fast weights of a new task."""
        return {name: meta_params[f"start.{name}"] for name in self._initial}

    def rates(self, meta_params: Params, step: int) -> dict[str, Tensor]:
        """The step sizes α, the same at every step."""
        return {name: meta_params[f"rate.{name}"] for name in self._initial}

    def weights(self, params: Params, meta_params: Params) -> Params:
        """The module's weights; all of them are fast."""
        return params
