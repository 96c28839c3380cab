"""A learned initialisation: what MAML and its relatives learn."""

from torch import Tensor

from equigrad.nn.functional import Functional
from equigrad.problems import Params


class LearnedStart(Functional):
    r"""Any module whose every weight is fast, and starts at a meta-learned value.

        φ_0 = θ        (Finn, Abbeel, Levine 2017)

    What has settled has forgotten where it started: only estimators that see the start, as `MAML`,
    `FirstOrderMAML` and `Reptile` do, learn anything here. `ComplexSynapse` with a learned centre
    is the counterpart for learners at equilibrium.

    Example:
        >>> import torch
        >>> start = LearnedStart(torch.nn.Linear(3, 2))
        >>> sorted(start.meta_params())
        ['bias', 'weight']
    """

    regularizer = None

    def meta_params(self) -> dict[str, Tensor]:
        """New leaves with the module's own names and values; each requires a gradient."""
        return {name: p.requires_grad_() for name, p in self.params().items()}

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Where a new task's fast weights begin: θ itself."""
        return dict(meta_params)

    def weights(self, params: Params, meta_params: Params) -> Params:
        """The module's weights: the fast ones, all of them."""
        return params
