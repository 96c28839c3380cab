"""A meta-learned initialisation, as in MAML and its relatives."""

from torch import Tensor

from equigrad.nn.functional import Functional
from equigrad.problems import Params


class LearnedStart(Functional):
    r"""Any module with all weights fast, starting at a meta-learned value.

        φ_0 = θ        (Finn, Abbeel, Levine 2017)

    A settled state does not depend on its start, so that only estimators which see the start
    (`MAML`, `FirstOrderMAML`, `Reptile`) learn anything here. `ComplexSynapse` with a learned
    centre is the counterpart for learners at equilibrium.

    Example:
        >>> import torch
        >>> start = LearnedStart(torch.nn.Linear(3, 2))
        >>> sorted(start.meta_params())
        ['bias', 'weight']
    """

    regularizer = None

    def meta_params(self) -> dict[str, Tensor]:
        """New leaves with the module's own names and values, which require a gradient."""
        return {name: p.requires_grad_() for name, p in self.params().items()}

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Initial fast weights of a new task: θ itself."""
        return dict(meta_params)

    def weights(self, params: Params, meta_params: Params) -> Params:
        """The module's weights; all of them are fast."""
        return params
