"""Any learner: a function that returns where a loss is smallest."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, EquigradError, ProblemError, SettlingError
from equigrad.fields import Count, Rule
from equigrad.problems import Params
from equigrad.solvers.solver import Objective, Solver
from equigrad.vectors import flatten, unflatten


@dataclass(frozen=True)
class BlackBox(Solver):
    r"""Settles with any learner, which is called and never differentiated.

        φ ← minimize(L, φ),    L = L_in + β L_out

    One step is one call of `minimize(objective, start)`. It is handed the phase's loss as a
    `FlatObjective`, a function of one flat float64 vector, and the vector to start from; it returns
    the vector where it ended, or named tensors or arrays. That is the interface of
    `scipy.optimize.minimize` and of CMA-ES. A learner with losses of its own, such as one of
    scikit-learn, takes `objective.beta` into its sample weights and θ from
    `objective.meta_params`; what it minimises has to be the `inner_loss + β outer_loss` of the
    problem. See docs/any-learner.md.

    By default a phase is one call. With `max_steps` and `tol`, the learner is called again from
    where it ended while that at least halves the residual. The residual is looked at before and
    after a call; only the learner's own gradients cost more.

    The contrast of phases divides their difference by β, and so whatever the learner leaves
    unsolved or draws at random. Ask it for a far tighter tolerance than β, and have it draw the
    same numbers at each call: torch's generator for the CPU is seeded here, those of numpy and
    other libraries are to be seeded by the learner.

    Attributes:
        minimize: the learner, `(objective, start) -> params`.
        seed: seeds torch's generator for the CPU before each call, in every phase alike.

    Raises:
        ConfigurationError: `minimize` is not callable, or a value is outside its range.

    Example:
        >>> import torch, equigrad as eg
        >>> def learner(objective, x):  # or scipy.optimize.minimize(objective.value, x).x
        ...     for _ in range(60):
        ...         x = x - 0.5 * objective.gradient(x)
        ...     return x
        >>> result = eg.meta_gradient(
        ...     eg.Bilevel(
        ...         inner_loss=lambda p, m: 0.5 * (p["w"] - m["target"]).square().sum(),
        ...         outer_loss=lambda p, m: 0.5 * (p["w"] - 3.0).square().sum(),
        ...     ),
        ...     params={"w": torch.zeros(1, dtype=torch.float64)},
        ...     meta_params={"target": torch.ones(1, dtype=torch.float64)},
        ...     solver=eg.BlackBox(learner, tol=1e-9),
        ...     estimator=eg.Contrastive(beta=1e-3, scheme="symmetric"),
        ... )
        >>> round(result.grads["target"].item(), 4), result.phases[0].outcome
        (-2.0, 'converged')
    """

    fixed_loss: ClassVar[bool] = True
    jumps: ClassVar[bool] = True

    minimize: Annotated[
        Callable[["FlatObjective", Any], Any],
        Rule("(objective, start) -> params, no class", lambda f: not isinstance(f, type)),
    ]
    _: KW_ONLY
    max_steps: Count | None = 1
    check_every: Count = 1
    seed: int = 0

    def continues(self, other: Solver) -> bool:
        """From any solver: there is no state to go on from."""
        return True

    def init(self, params: list[Tensor], previous: Any = None) -> None:
        """No state."""

    def update(
        self,
        params: list[Tensor],
        velocity: tuple[Tensor, ...],
        state: None,
        objective: Objective,
    ) -> None:
        """One call of the learner."""
        if isinstance(objective.beta, complex):
            raise ConfigurationError(
                "a learner of its own minimises a real loss, and a holomorphic scheme has complex "
                "ones; use scheme='symmetric'"
            )
        flat = FlatObjective(objective)
        phase = f"in the phase with β = {objective.beta:g}"
        start = flat.flat(objective.params)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(self.seed)
            try:
                found = self.minimize(flat, start)
            except EquigradError:
                raise
            except Exception as error:
                remedy = ""
                if flat.beta < 0:
                    remedy = (
                        ". If it cannot take a negative weight, use scheme='forward' with beta > 0"
                    )
                raise SettlingError(
                    f"the learner raised {type(error).__name__} {phase}: {error}{remedy}"
                ) from error
        flat.move(flat.read(found, f"{phase} the learner returned"))
        bad = [name for name, p in objective.params.items() if not torch.isfinite(p).all()]
        if bad:
            raise SettlingError(
                f"{phase} the learner returned NaN or infinite values for {bad[0]!r}: bound its "
                f"steps, start nearer to a minimum, or lower beta"
            )


@dataclass(frozen=True)
class FlatObjective:
    """The loss of a phase, `L_in + β L_out`, as a function of one flat vector.

    A vector is a float64 numpy array (a tensor where numpy is not installed) that holds the params
    one after the other, in their order. Arguments may be arrays, lists or tensors of as many
    numbers, or mappings from the names of the params to arrays or tensors.

    Raises:
        ProblemError: an argument that does not fit the params.
    """

    _objective: Objective = field(repr=False)

    @property
    def beta(self) -> float:
        """Nudging strength β of the phase, of either sign; 0 in a free or matched one."""
        return self._objective.beta.real

    @property
    def meta_params(self) -> Params:
        """A copy of θ of this call, by name."""
        return {name: m.clone() for name, m in self._objective.meta_params.items()}

    def value(self, x: Any) -> float:
        """The loss at `x`, without the cost of a gradient."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self._objective.loss().item()

    def gradient(self, x: Any) -> Any:
        """The gradient at `x`, a vector."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _gradient(self._objective.velocity())

    def value_and_gradient(self, x: Any) -> tuple[float, Any]:
        """Both: what `scipy.optimize.minimize` takes with `jac=True`."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value, velocity = self._objective()
        return value.item(), _gradient(velocity)

    def named(self, x: Any) -> dict[str, Tensor]:
        """The params that a vector holds, by name, in their shapes and dtypes."""
        tensors = self.read(x, "objective.named got")
        leaves = self._objective.params
        return {
            name: torch.empty_like(p, requires_grad=False).copy_(tensor)
            for (name, p), tensor in zip(leaves.items(), tensors, strict=True)
        }

    def flat(self, named: Any) -> Any:
        """The inverse of `named`."""
        tensors = self.read(named, "objective.flat got")
        return _array(flatten([t.detach().cpu().double() for t in tensors]))

    def read(self, x: Any, got: str) -> list[Tensor]:
        """Tensors in the shapes of the params, from whatever form they have.

        Args:
            x: a vector, or a mapping from names.
            got: how an error message begins.
        """
        leaves = self._objective.params
        hint = "; return result.x" if hasattr(x, "x") else ""
        if isinstance(x, Mapping):
            if x.keys() != leaves.keys():
                raise ProblemError(
                    f"{got} {_listed(x)}, where the params are {_listed(leaves)}; name exactly "
                    f"these{hint}"
                )
            return [
                _fitting(_tensor(x[name], f"{got} for {name!r}"), p.shape, f"{got} for {name!r}")
                for name, p in leaves.items()
            ]
        size = sum(p.numel() for p in leaves.values())
        vector = _fitting(_tensor(x, got, hint), torch.Size([size]), got)
        return unflatten(vector, list(leaves.values()))

    @torch.no_grad()
    def move(self, tensors: list[Tensor]) -> None:
        """Put the phase's params there."""
        for p, tensor in zip(self._objective.params.values(), tensors, strict=True):
            p.copy_(tensor)

    def _stand_at(self, x: Any) -> None:
        self.move(self.read(x, "the objective got"))


def _gradient(velocity: tuple[Tensor, ...]) -> Any:
    return _array(-flatten([v.cpu().double() for v in velocity]))


def _tensor(x: Any, got: str, hint: str = "") -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    try:
        try:
            return torch.tensor(x, dtype=torch.float64)
        except ValueError:  # an array that torch does not take: reversed, big-endian
            return torch.tensor(x.tolist(), dtype=torch.float64)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(
            f"{got} {type(x).__name__}, which is no vector of numbers ({error}); give an array, a "
            f"list, a tensor or a dict of named ones{hint}"
        ) from error


def _fitting(tensor: Tensor, shape: torch.Size, got: str) -> Tensor:
    """In a shape that differs by dimensions of length one at most."""
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        raise ProblemError(
            f"{got} shape {tuple(tensor.shape)}, where {tuple(shape)} is needed; reshape it, or "
            f"see which values it lacks"
        )
    return tensor.reshape(shape)


def _array(vector: Tensor) -> Any:
    try:
        return vector.numpy()
    except RuntimeError:  # without numpy
        return vector


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
