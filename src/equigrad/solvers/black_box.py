"""A solver that calls any learner: a function that returns a minimiser of a loss."""

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
    r"""A solver that settles by calling any learner, which is never differentiated.

        φ ← minimize(L, φ),    L = L_in + β L_out

    One step is one call of `minimize(objective, start)`. Its arguments are the phase's loss as a
    `FlatObjective`, a function of one flat float64 vector, and the initial vector; it returns the
    final vector, or named tensors or arrays. This is the interface of `scipy.optimize.minimize` and
    of CMA-ES. A learner with its own loss, such as one of scikit-learn, takes β from
    `objective.beta`, for example into its sample weights, and θ from `objective.meta_params`; it
    must minimise the problem's `inner_loss + β outer_loss`. See docs/any-learner.md.

    By default a phase is one call. With `max_steps` and `tol`, the learner is called again from its
    last result as long as a call at least halves the residual. The residual is evaluated before and
    after each call; further gradients are those that the learner takes.

    The contrast of phases divides their difference by β, and with it the learner's remaining error
    and random fluctuations. Give the learner a tolerance far below β, and let it draw the same
    random numbers in each call: torch's CPU generator is seeded here, while the learner must seed
    those of numpy and other libraries.

    Attributes:
        minimize: the learner, `(objective, start) -> params`.
        seed: seed of torch's CPU generator before each call, the same in every phase.

    Raises:
        ConfigurationError: `minimize` is not callable, or a value is out of range.

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
        Rule("(objective, start) -> params, and not a class", lambda f: not isinstance(f, type)),
    ]
    _: KW_ONLY
    max_steps: Count | None = 1
    check_every: Count = 1
    seed: int = 0

    def continues(self, other: Solver) -> bool:
        """True for any solver, since there is no state to continue from."""
        return True

    def init(self, params: list[Tensor], previous: Any = None) -> None:
        """An empty state."""

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
                "the learner of a BlackBox minimises a real loss, and with scheme='holomorphic' "
                "the loss of a nudged phase is complex. Use scheme='symmetric'"
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
                        ". If the learner cannot handle a negative weight of the outer loss, use "
                        "scheme='forward' with beta > 0"
                    )
                raise SettlingError(
                    f"the learner raised {type(error).__name__} {phase}: {error}{remedy}"
                ) from error
        flat.move(flat.read(found, f"{phase} the learner returned"))
        bad = [name for name, p in objective.params.items() if not torch.isfinite(p).all()]
        if bad:
            raise SettlingError(
                f"{phase} the learner returned NaN or infinite values for {bad[0]!r}. Limit its "
                f"step size, start nearer to a minimum, or lower beta"
            )


@dataclass(frozen=True)
class FlatObjective:
    """The loss of a phase, `L_in + β L_out`, as a function of one flat vector.

    A vector is a float64 numpy array (a tensor if numpy is not installed) that holds the params one
    after the other, in their order. Arguments may be arrays, lists or tensors of that length, or
    mappings from the names of the params to arrays or tensors.

    Raises:
        ProblemError: an argument does not fit the params.
    """

    _objective: Objective = field(repr=False)

    @property
    def beta(self) -> float:
        """Nudging strength β of the phase, of either sign; 0 in a free or matched phase."""
        return self._objective.beta.real

    @property
    def meta_params(self) -> Params:
        """A copy of θ, by name."""
        return {name: m.clone() for name, m in self._objective.meta_params.items()}

    def value(self, x: Any) -> float:
        """The loss at `x`, without computing a gradient."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self._objective.loss().item()

    def gradient(self, x: Any) -> Any:
        """The gradient at `x`, as a vector."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _gradient(self._objective.velocity())

    def value_and_gradient(self, x: Any) -> tuple[float, Any]:
        """The loss and its gradient, as `scipy.optimize.minimize` takes them with `jac=True`."""
        self._stand_at(x)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            value, velocity = self._objective()
        return value.item(), _gradient(velocity)

    def named(self, x: Any) -> dict[str, Tensor]:
        """The params in a vector, by name, in their shapes and dtypes."""
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
        """Tensors in the shapes of the params, from any accepted form.

        Args:
            x: a vector, or a mapping from names.
            got: the beginning of an error message.
        """
        leaves = self._objective.params
        hint = "; return result.x" if hasattr(x, "x") else ""
        if isinstance(x, Mapping):
            if x.keys() != leaves.keys():
                raise ProblemError(
                    f"{got} {_listed(x)}, but the params are {_listed(leaves)}. Use exactly these "
                    f"names{hint}"
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
        """Set the phase's params to these values."""
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
            f"{got} {type(x).__name__}, which cannot be read as numbers ({error}). Give an array, "
            f"a list, a tensor, or a dictionary of these by name{hint}"
        ) from error


def _fitting(tensor: Tensor, shape: torch.Size, got: str) -> Tensor:
    """The value in the param's shape, if the two differ only by dimensions of length one."""
    if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
        raise ProblemError(
            f"{got} shape {tuple(tensor.shape)}, but {tuple(shape)} is needed. Reshape it, or "
            f"check whether values are missing"
        )
    return tensor.reshape(shape)


def _array(vector: Tensor) -> Any:
    try:
        return vector.numpy()
    except RuntimeError:  # without numpy
        return vector


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "nothing"
