"""The base class of all solvers, and the objective that a solver may evaluate."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from equigrad.fields import Checked, Count, Positive, Rule, require
from equigrad.problems import Params


@dataclass(frozen=True)
class Objective:
    """The loss and velocity of a phase at the current parameters.

    A call returns both.

    Attributes:
        beta: nudging strength β of the phase.
        samples: whether the first dimension counts samples that settle independently.
        params: the leaves that `Solver.update` moves, by name.
        meta_params: θ, detached.
        step: number of the current step.
        loss: evaluates `L = L_in + β L_out` without a gradient, and is not counted as one.
        evaluate: evaluates `-∂L/∂φ`, one tensor for each parameter, with a function that returns L
            at no further cost.
    """

    beta: complex
    samples: bool
    params: Params
    meta_params: Params
    step: Callable[[], int]
    loss: Callable[[], Tensor]
    evaluate: Callable[[], tuple[tuple[Tensor, ...], Callable[[], Tensor]]]

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the velocity."""
        velocity, value = self.evaluate()
        return value(), velocity

    def velocity(self) -> tuple[Tensor, ...]:
        """`-∂L/∂φ`, one tensor for each parameter."""
        return self.evaluate()[0]


NO_OBJECTIVE: Any = None
"""Stands for the objective of a `differentiable` solver, which evaluates none."""


@dataclass(frozen=True, kw_only=True)
class Solver(Checked):
    """A solver of the inner problem: a rule that moves the parameters, and a stopping criterion.

    Attributes:
        max_steps: number of steps after which a phase stops; None for no limit.
        tol: a phase has settled when the Euclidean norm of the velocity (`-∂L/∂φ` for a loss,
            `F(φ, θ) - φ` for a map) is at most this: over all parameters, or for each sample if
            samples settle independently. None to run all `max_steps`. A nudged phase must also
            reduce the norm to a hundredth of its first value.
        check_every: number of steps between two measurements of that norm.
        compile: whether to take many steps in one function, which is several times faster for a
            small network (docs/speed.md). `"inductor"` has torch's compiler make a loop of steps,
            which stops where single steps do; on a CUDA device, it compiles the `check_every` steps
            between two measurements and captures them. `"graph"` captures them alone, in less than
            a second; True is the graph on a CUDA device and the compiler elsewhere. Works without
            mini-batches and random numbers, for `differentiable` solvers only.
        fixed_loss: class attribute; whether the loss has to be the same at every evaluation.
        jumps: class attribute; whether one step may settle a phase. The norm is then also measured
            after the last step, and under a tolerance a further step is taken only if the last one
            at least halved it.
        differentiable: class attribute; whether `update` is pure tensor arithmetic on lists of
            tensors and evaluates no `objective`, so that it can be differentiated.
        functional: class attribute; whether `update`, while a graph is recorded, puts new tensors
            into its lists and does not change the old ones.
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
            "a solver needs max_steps, tol > 0, or both; with max_steps=None and tol=None it "
            "would never stop",
        )
        require(
            not self.compile or self.differentiable,
            f"compile=True can only compile steps that are plain tensor arithmetic, and those of "
            f"{type(self).__name__} are not; use GradientDescent, or compile=False",
        )

    @property
    def adaptive(self) -> bool:
        """Whether steps are scaled by past gradients, as in Adam."""
        return False

    def decay(self) -> tuple[float, bool]:
        """The weight decay that steps add, and whether it is decoupled from the gradient."""
        return 0.0, False

    def schedules(self) -> dict[str, Callable[[Params, int], Any]]:
        """The settings that are functions of `(meta_params, step)`, by name."""
        return {}

    def recorded(self) -> "Solver | None":
        """The same steps in differentiable form; None if there is none."""
        return self if self.differentiable else None

    def continues(self, other: "Solver") -> bool:
        """Whether `init` can continue from a state of the other solver."""
        return type(self) is type(other)

    def hindrance(self, state: Any) -> str | None:
        """Why phases that continue from a state cannot move as far as they should, in words.

        Args:
            state: solver state of the free phase; None if phases start with a new one.
        """
        return None

    @abstractmethod
    def init(self, params: list[Tensor], previous: Any = None) -> Any:
        """The solver's own state (momentum, for example) for a phase that starts at `params`.

        Args:
            params: the leaves that `update` will move.
            previous: final state of an earlier phase of the same solver class, to continue from. It
                is not changed.
        """

    @abstractmethod
    def update(
        self, params: list[Tensor], velocity: tuple[Tensor, ...], state: Any, objective: Objective
    ) -> bool | None:
        """Move `params` and `state` by one step, in place; called without recording a graph.

        Args:
            params: the leaves.
            velocity: `-∂L/∂φ` at `params`, one tensor for each parameter; must not be changed.
            state: the return value of `init`.
            objective: evaluates loss and velocity again, for rules that need them elsewhere.

        Returns:
            False if every step would make it worse, which ends the phase; otherwise anything else.
        """
