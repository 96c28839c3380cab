"""What a solver is."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from equigrad.fields import Checked, Count, Positive, Rule, require
from equigrad.problems import Params


@dataclass(frozen=True)
class Objective:
    """What a phase settles: loss and velocity at the parameters as they now are.

    Calling it gives both.

    Attributes:
        beta: nudging strength β of the phase.
        samples: whether the first dimension is one of samples that settle on their own.
        params: the leaves that `Solver.update` moves, by name.
        meta_params: θ, detached.
        step: the number of the step that is being taken.
        loss: evaluates `L = L_in + β L_out` without a gradient, which does not count as one.
        evaluate: evaluates `-∂L/∂φ`, one tensor a parameter, and what gives L at no further cost.
    """

    beta: complex
    samples: bool
    params: Params
    meta_params: Params
    step: Callable[[], int]
    loss: Callable[[], Tensor]
    evaluate: Callable[[], tuple[tuple[Tensor, ...], Callable[[], Tensor]]]

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and velocity."""
        velocity, value = self.evaluate()
        return value(), velocity

    def velocity(self) -> tuple[Tensor, ...]:
        """`-∂L/∂φ`, one tensor a parameter."""
        return self.evaluate()[0]


@dataclass(frozen=True, kw_only=True)
class Solver(Checked):
    """How a phase settles: a rule that moves the parameters, and when to stop.

    Attributes:
        max_steps: steps after which a phase stops, settled or not; None for no limit.
        tol: a phase has settled when the Euclidean norm of the velocity (of a loss `-∂L/∂φ`, of a
            map `F(φ, θ) - φ`), over all parameters, or of each sample where samples settle on
            their own, is at most this; None to run all `max_steps`. A nudged phase goes on until a
            hundredth of its first norm is left, too.
        check_every: steps between two looks at that norm.
        compile: take the `check_every` steps between two looks by one function, several times
            faster for a small network (docs/speed.md): `"graph"` captures them as a CUDA graph, in
            less than a second; `"inductor"` has torch's compiler make it, in tens of seconds, and
            captures that on a CUDA device; True takes the graph on a CUDA device, the compiler
            elsewhere. Not with mini-batches or random numbers, and only for solvers that are
            `differentiable`.
        fixed_loss: class attribute; whether the loss has to be the same at every evaluation.
        jumps: class attribute; whether one step may settle a phase. The norm is then looked at
            where the last step landed, too, and under a tolerance a further step is taken only
            where the one before at least halved it.
        differentiable: class attribute; whether `update` is tensor arithmetic on lists of tensors
            alone and evaluates no `objective`, so that it can be differentiated as it stands.
        functional: class attribute; whether `update`, where a graph is recorded, puts new tensors
            into its lists and leaves those that were there as they are.
    """

    fixed_loss: ClassVar[bool] = False
    jumps: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    functional: ClassVar[bool] = False

    max_steps: Count | None = 1000
    tol: Annotated[Positive | None, Rule(remedy="None runs all max_steps")] = None
    check_every: Count = 10
    compile: bool | Literal["graph", "inductor"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.tol is None and self.max_steps is None),
            "a solver needs max_steps, or a tol > 0, or both: with neither it never stops",
        )
        require(
            not self.compile or self.differentiable,
            f"compile=True needs steps that are plain tensor arithmetic, and those of "
            f"{type(self).__name__} are not; use GradientDescent, or compile=False",
        )

    @property
    def adaptive(self) -> bool:
        """Whether steps are scaled by the gradients that were seen, as Adam scales them."""
        return False

    def schedules(self) -> dict[str, Callable[[Params, int], Any]]:
        """The settings that are functions of `(meta_params, step)`, by name."""
        return {}

    def recorded(self) -> "Solver | None":
        """The same steps such that they can be differentiated; None where they cannot be."""
        return self if self.differentiable else None

    def continues(self, other: "Solver") -> bool:
        """Whether `init` can go on from a state of the other solver."""
        return type(self) is type(other)

    def hindrance(self, state: Any) -> str | None:
        """What keeps phases that go on from a state from moving as far as they should, in words.

        Args:
            state: of the free phase; None where they begin anew.
        """
        return None

    @abstractmethod
    def init(self, params: list[Tensor], previous: Any = None) -> Any:
        """The solver's own state (momentum, for example) for a phase that starts at `params`.

        Args:
            params: the leaves that `update` will move.
            previous: the state in which an earlier phase of the same solver class ended, to go on
                from. It is not changed.
        """

    @abstractmethod
    def update(
        self, params: list[Tensor], velocity: tuple[Tensor, ...], state: Any, objective: Objective
    ) -> bool | None:
        """Move `params` and `state` by one step, in place; called without recording a graph.

        Args:
            params: the leaves.
            velocity: `-∂L/∂φ` at `params`, one tensor a parameter; not to be changed.
            state: what `init` returned.
            objective: evaluates loss and velocity again, for rules that look around.

        Returns:
            False where no step could be found that does not make it worse; the phase ends there.
        """
