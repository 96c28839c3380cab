"""A bilevel problem whose inner parameters minimise a loss."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from equigrad.fields import Rule
from equigrad.parallel import ALONE, is_group
from equigrad.problems.problem import Batches, Loss, Problem, Regularizer
from equigrad.problems.pullback import Params, Velocity, dense, filled, pushed, scalar
from equigrad.randomness import Stream


@dataclass(frozen=True)
class Bilevel(Problem):
    r"""A bilevel problem: the settled state minimises the inner loss.

        min_θ L_out(φ*(θ), θ)    with    φ*(θ) = argmin_φ L_in(φ, θ)

    (Zucchet et al., Eq. 1). Phases settle the augmented loss `L = L_in + β L_out` (Eq. 2).

    Args:
        inner_loss: `(params, meta_params) -> scalar`, the loss that the inner parameters φ
            minimise; with `inner_batches`, `(params, meta_params, batch) -> scalar`.
        outer_loss: the same for the outer loss of the settled φ. May depend on θ directly.
        regularizer: an optional further term of the inner loss in closed form, for example
            `equigrad.nn.ComplexSynapse`. The inner loss is then `inner_loss + regularizer`.
        inner_batches: mini-batches of the inner loss, which as a whole is the mean over batches.
            With a sequence, step t of the free phase, from t = 0, sees batch `t mod len`. Nudged
            phases continue the count: after T free steps, the k-th step of every nudged phase sees
            batch `(T + k) mod len` (if the free phase met a tolerance, T is rounded up to a whole
            pass). A `DataLoader`, or any other repeatable iterable, is drawn from when a step needs
            a batch; each pass has its own random order, which is the same in every phase, and
            tensors are moved to the device of φ.
        outer_batches: the same for the outer loss, with the same step numbers.
        modules: modules that the losses call. Their buffers and training flags are the same at the
            start of every nudged phase and are restored after the call. By default the modules are
            found in the closures and named globals of the losses.
        reaches: names of the meta-parameters that the losses depend on, under `inner` and `outer`,
            to save work when many similar problems are made. If None, both losses are evaluated
            once before anything settles, to find these names and to check the losses.
        samples: whether the first dimension of every parameter counts samples, whose losses are
            independent and summed. Each sample then settles, and is reported, separately.
        group: the processes of `torch.distributed` that each hold a share of the data, for example
            `torch.distributed.group.WORLD`, with the same φ and θ on each. Both losses are then the
            means over processes (for equal shares and mean losses, those of one process with all
            the data), and all processes get the same results. Not needed if a module is wrapped by
            `DistributedDataParallel`, `fully_shard`, Accelerate or Fabric, whose group is used.
            None is one process. See docs/several-processes.md.

    Raises:
        ProblemError: a loss is not callable, batches cannot be iterated over again, or a module is
            wrapped twice or for another group.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.Bilevel(
        ...     inner_loss=lambda params, meta: (params["w"] - meta["target"]).square().sum(),
        ...     outer_loss=lambda params, meta: params["w"].square().sum() / 2,
        ... )
        >>> params, meta = {"w": torch.zeros(2)}, {"target": torch.tensor([1.0, 2.0])}
        >>> problem.velocity(params, meta)["w"]
        tensor([2., 4.])
    """

    energy: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    inner_loss: Loss
    outer_loss: Loss
    regularizer: Regularizer | None = None
    inner_batches: Batches | None = None
    outer_batches: Batches | None = None
    modules: tuple[nn.Module, ...] | None = None
    reaches: Mapping[Stream, Collection[str]] | None = None
    samples: bool = False
    group: Annotated[
        Any,
        Rule(
            "torch.distributed.group.WORLD, another process group that includes this process, or "
            "None",
            lambda group: group is None or is_group(group),
        ),
    ] = None

    def function(self, stream: Stream) -> Loss:
        """The inner or the outer loss."""
        return self.inner_loss if stream == "inner" else self.outer_loss

    def name(self, stream: Stream) -> str:
        """The name of a function: `inner_loss` or `outer_loss`."""
        return f"{stream}_loss"

    def evaluate(self, stream: Stream, params: Params, meta_params: Params, step: int = 0) -> Any:
        """The inner or outer loss on a step's batch, over all ranks, without regulariser."""
        own = super().evaluate
        if self.ranks is ALONE:
            return own(stream, params, meta_params, step)
        return self.ranks.mean(
            lambda params, meta_params: own(stream, params, meta_params, step),
            params,
            meta_params,
            name=self.name(stream),
            stamp=2 * step + (stream == "outer"),
        )

    def total_inner_loss(self, params: Params, meta_params: Params, step: int = 0) -> Tensor:
        """The inner loss with its regulariser, with its graph."""
        loss = self.evaluate("inner", params, meta_params, step)
        if self.regularizer is not None:
            loss = loss + self.regularizer.penalty(params, meta_params)
        return loss

    def residual(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """`∂L_in/∂φ`, with its graph: differentiating it takes a double backward."""
        return self._slope(params, meta_params, step, 1.0)

    def moves(self, params: Params, meta_params: Params, step: int = 0) -> tuple[Tensor, ...]:
        """`-∂L_in/∂φ`, with its graph: the sign is that of the backward pass's seed."""
        return self._slope(params, meta_params, step, -1.0)

    def _slope(
        self, params: Params, meta_params: Params, step: int, scale: float
    ) -> tuple[Tensor, ...]:
        loss = self.total_inner_loss(params, meta_params, step)
        return dense(
            torch.autograd.grad(
                loss,
                list(params.values()),
                scalar(scale, loss),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def velocity_at(
        self, meta_params: Params, beta: complex, force: Params | None = None
    ) -> Velocity:
        """`-∂(L_in + β L_out)/∂φ` at fixed θ and β, as a function for a solver's loop."""
        if force is not None and beta != 0:
            return pushed(self.velocity_at(meta_params, 0.0), beta, force)
        pull = None if self.regularizer is None else self.regularizer.bind(meta_params)

        def velocity(params: Params, step: int) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
            with torch.enable_grad():
                loss = self.evaluate("inner", params, meta_params, step)
                if beta != 0:
                    outer = self.evaluate("outer", params, meta_params, step)
                    loss = loss + scalar(beta, outer) * outer
            leaves = tuple(params.values())
            grads = torch.autograd.grad(loss, leaves, scalar(-1.0, loss), allow_unused=True)
            grads = filled(grads, leaves)
            if loss.is_complex():  # autograd conjugates the holomorphic derivative
                grads = tuple(g.conj().resolve_conj() for g in grads)
            if self.regularizer is None or pull is None:
                return grads, loss.detach
            regularizer = self.regularizer
            value = lambda: loss.detach() + regularizer.penalty(params, meta_params)  # noqa: E731
            return pull.add_velocity(grads, params), value

        return velocity
