"""The group of processes that share a problem's data."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equigrad.errors import ConfigurationError, EquigradError, ProblemError, RunError
from equigrad.parallel.sums import Gather, Spread, summed
from equigrad.parallel.wrappers import inside

T = TypeVar("T")
Params = Mapping[str, Tensor]

STAMPS = 2**20
"""The number of an evaluation is compared between ranks modulo this."""

MOST_NAMED = 50
"""The last rank that is named individually if its loss is not finite; later ones share its bit."""


@dataclass(frozen=True, eq=False)
class Ranks:
    r"""All processes of a problem, with the same φ and θ and each with its share of the data.

    The loss is the mean over ranks, `L = (1/n) Σ_r L_r`, and so is every derivative of it. Results
    are the same on all ranks, to the last bit, so that all of them take the same decisions; nothing
    else in the library knows of processes. With equal shares and mean losses, the result is that of
    one process with all the data.

    Attributes:
        group: the processes; None for this one alone.
        wrapped: data-parallel and sharded modules that the losses call; their hooks are bypassed.
        shares: whether each process has its own data, rather than a part of the tensors; random
            numbers then differ between ranks.
        unfinite: the ranks whose loss was the first not to be finite, since all were finite.
    """

    group: Any = None
    wrapped: tuple[nn.Module, ...] = ()
    shares: bool = True
    unfinite: list[int] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The number of this process in the group, from 0."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def stream(self) -> int:
        """The number of this rank's stream of random numbers."""
        return self.rank if self.shares else 0

    def alone(self) -> "Ranks":
        """This process without the others."""
        return self if self.group is None else Ranks(None, self.wrapped)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While wrapped modules do no more than what is inside of them, with whole parameters.

        Raises:
            RunError: a rank is lost.
        """
        with ExitStack() as opened:
            with self._reaching():
                opened.enter_context(inside(self.wrapped))
            yield

    def mean(
        self,
        loss: Callable[[Params, Params], Tensor],
        params: Params,
        meta_params: Params,
        *,
        name: str,
        stamp: int,
    ) -> Tensor:
        """The mean of a loss over ranks, differentiable as often as the loss is.

        Args:
            loss: function of `(params, meta_params)`, on this rank's share of the data.
            params: φ, the same on every rank.
            meta_params: θ, the same on every rank.
            name: name of the loss.
            stamp: number of this evaluation, the same on every rank.

        Raises:
            EquigradError: the loss fails on a rank. Its own error is raised there.
            RunError: a rank is lost, or evaluates something else.
        """
        if self.group is None:
            with self.inside():
                return loss(params, meta_params)
        *tensors, zero = Spread.apply(self._reduce, *params.values(), *meta_params.values())
        own = dict(zip(params, tensors, strict=False))
        other = dict(zip(meta_params, tensors[len(own) :], strict=True))
        wide = torch.promote_types(tensors[0].dtype, torch.float64)
        error, mine = None, zero
        try:
            with self.inside():
                mine = loss(own, other)
            if not (isinstance(mine, Tensor) and mine.ndim == 0):
                found = getattr(mine, "shape", type(mine).__name__)
                raise ProblemError(f"{name} must return a scalar, got {found}")
        except Exception as raised:
            error, mine = raised, zero
        fate = [float(error is not None), stamp % STAMPS, 2.0 ** min(self.rank, MOST_NAMED)]
        side = torch.tensor(fate, dtype=wide).to(mine.device)
        side[2] *= ~torch.isfinite(mine.detach())
        # zero² has a first and a second derivative, so that backward passes reach all ranks
        total, side = Gather.apply(self._reduce, mine.to(wide) + zero.to(wide).square(), side)
        failed, stamps, unfinite = map(int, side.real.tolist())
        if failed:
            with self.together():
                if error is not None:
                    raise error
        if stamps != self.size * (stamp % STAMPS):
            raise RunError(f"{self._who} evaluates {name} while other ranks do not. {OUT_OF_STEP}")
        if not (unfinite and self.unfinite):  # keep the first: NaN soon spreads to all ranks
            self.unfinite[:] = [rank for rank in range(self.size) if unfinite >> rank & 1]
        return (total / self.size).to(mine.dtype)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context whose errors on one rank are raised on all; inside, ranks do not communicate.

        Raises:
            EquigradError: of the same kind as on the rank that fails, which is named.
            RunError: a rank is lost.
        """
        try:
            yield
        except Exception as error:
            self.tell(error)
            raise
        if self.group is not None:
            _raise_first(self.gathered(None))

    def tell(self, error: Exception) -> None:
        """Tell the other ranks in `together` that this one fails; returns once they know."""
        if self.group is not None:
            self.gathered(_described(error))

    def gathered(self, mine: T) -> list[T]:
        """The values of all ranks, in their order.

        Args:
            mine: anything that can be pickled.

        Raises:
            RunError: a rank is lost.
        """
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def require_same(self, **settings: object) -> None:
        """Raise a `ConfigurationError` unless all ranks have the same settings.

        Args:
            settings: settings of the computation; compared by `repr`, without memory addresses.
        """
        if self.group is None:
            return
        said = self.gathered({n: re.sub(r" at 0x\w+", "", repr(s)) for n, s in settings.items()})
        for rank, theirs in enumerate(said):
            for name, value in theirs.items():
                if value != said[0][name]:
                    raise ConfigurationError(
                        f"{name} is {said[0][name]} on rank 0, but {value} on rank {rank}; pass "
                        f"the same value on every rank"
                    )

    def averaged(self, tensors: Params) -> dict[str, Tensor]:
        """The means of floating-point tensors over ranks; other tensors are not changed."""
        floats = {n: t for n, t in tensors.items() if t.is_floating_point()}
        if self.group is None or not floats:
            return dict(tensors)
        means = [t / self.size for t in summed(self._reduce, list(floats.values()))]
        return {**tensors, **dict(zip(floats, means, strict=True))}

    @property
    def _who(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def _reduce(self, flat: Tensor) -> None:
        with self._reaching():
            dist.all_reduce(flat, group=self.group)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn an error of communication into one that says what happened and what to do."""
        try:
            yield
        except RuntimeError as error:  # the base class of torch.distributed's errors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"{self._who} cannot reach the other ranks ({reason}). One of them failed, was "
                f"killed, took longer than the timeout of the process group, or made another "
                f"call; its own output may say more. {OUT_OF_STEP}"
            ) from error


OUT_OF_STEP = (
    "All ranks must make the same calls in the same order, with the same solver and estimator, "
    "on machines of the same kind and with the same OMP_NUM_THREADS"
)
"""The condition for ranks to stay in step, as a sentence."""

ALONE = Ranks()
"""A single process."""


def _described(error: Exception) -> tuple[type[EquigradError], str]:
    """An error's class, as other ranks can raise it, and its message."""
    if isinstance(error, EquigradError):
        return type(error), str(error)
    return ProblemError, f"{type(error).__name__}: {error}"


def _raise_first(failed: list[tuple[type[EquigradError], str] | None]) -> None:
    """Raise the error of the first rank that has one."""
    for rank, error in enumerate(failed):
        if error is not None:
            kind, said = error
            raise kind(f"on rank {rank}: {said}")
