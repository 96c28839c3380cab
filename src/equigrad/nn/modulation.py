"""Learning by modulation: a task adapts only gains, shifts and the readout."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from equigrad.errors import ProblemError
from equigrad.nn.batch_statistics import BatchStatistics
from equigrad.nn.functional import Functional
from equigrad.problems import Params

NORMALISATIONS = (_BatchNorm, BatchStatistics, nn.LayerNorm, nn.GroupNorm)


class Modulation(Functional):
    r"""Any module of which a task adapts only the normalisation's gains and shifts and the readout.

    Everything else is meta-learned: φ are the gains and shifts of every normalisation layer and the
    parameters of the head, θ all other weights (Zucchet et al., Section 4.2; after Zintgraf et al.
    2019). A task starts at the module's own gains, shifts and head. There is no regulariser.

    Args:
        model: any module with normalisation layers that have gains and shifts.
        head: name of the submodule that is the readout; by default the last one with parameters.

    Raises:
        ProblemError: the module has no normalisation layer with parameters, no head of that name,
            or nothing left to meta-learn.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> modulation = Modulation(net)
        >>> sorted(modulation.params()), sorted(modulation.meta_params())
        (['1.bias', '1.weight', '3.bias', '3.weight'], ['0.bias', '0.weight'])
    """

    regularizer = None

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        super().__init__(model)
        everything = set(self._initial)
        if head is None:
            head = list(self._initial)[-1].rpartition(".")[0]
        fast = {name for name in everything if name.startswith(f"{head}.")}
        if not fast:
            raise ProblemError(
                f"{type(model).__name__} has no submodule {head!r} with parameters; set head to "
                f"the name of one of its submodules"
            )
        gains = {
            f"{path}.{name}".lstrip(".")
            for path, part in self.model.named_modules()
            if isinstance(part, NORMALISATIONS)
            for name, _ in part.named_parameters()
        } & everything
        if not gains:
            raise ProblemError(
                f"{type(model).__name__} has no normalisation layer with gains and shifts to "
                f"modulate; add nn.BatchNorm2d, nn.LayerNorm or nn.GroupNorm"
            )
        self._fast = fast | gains
        if self._fast == everything:
            raise ProblemError(
                f"every parameter of {type(model).__name__} is a gain, a shift or in the head "
                f"{head!r}, so nothing is left to meta-learn"
            )

    def params(self) -> dict[str, Tensor]:
        """The initial φ, in new tensors."""
        return {n: p for n, p in super().params().items() if n in self._fast}

    def meta_params(self) -> dict[str, Tensor]:
        """θ as new leaves that require a gradient, by the module's own names."""
        everything = super().params()
        return {n: p.requires_grad_() for n, p in everything.items() if n not in self._fast}

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Initial φ of a new task: the module's own gains, shifts and head."""
        return self.params()

    def weights(self, params: Params, meta_params: Params) -> Params:
        """All weights of the module: the task's own and the shared ones."""
        return {**meta_params, **params}
