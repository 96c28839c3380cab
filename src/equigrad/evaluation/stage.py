"""The surroundings of a problem's functions: buffers, training flags and random numbers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from equigrad.buffers import KeptBuffers
from equigrad.parallel import ALONE, Ranks
from equigrad.problems.lowered import full_precision
from equigrad.randomness import CommonRandomness
from equigrad.solvers import Moment


class Stage:
    """Module state and random numbers, which are the same at the start of every phase.

    As a context manager it seeds all random numbers and, on exit, also by an exception, restores
    the global generators and the modules' buffers and training flags. Inside, gradients are enabled
    and autocast is off, except within the problem's functions.

    Args:
        modules: modules that the problem's functions call.
        tensors: all tensors of the computation.
        seed: seed of an earlier stage, to repeat its random numbers; None to draw one.
        ranks: processes whose sharded modules hold full parameters within.

    Attributes:
        randomness: seeds the problem's functions.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        seed: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.randomness = CommonRandomness(tensors, seed)
        self._ranks = ranks
        self._modules, self._tensors = modules, tensors
        self._buffers = KeptBuffers(modules)
        self._flags: list[tuple[nn.Module, bool]] = []
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._exit.enter_context(self._ranks.inside())
        self._exit.enter_context(torch.enable_grad())
        self._flags = [(part, part.training) for m in self._modules for part in m.modules()]
        self._exit.callback(self._restore_flags)
        self._exit.enter_context(full_precision(self._tensors))
        self._exit.enter_context(self._buffers)
        self._exit.enter_context(self.randomness)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def on_exit(self, put_back: Callable[[], None]) -> None:
        """Register a further function to call on exit."""
        self._exit.callback(put_back)

    @property
    def seed(self) -> int:
        """The seed of all random numbers, with which a later stage can repeat them."""
        return self.randomness.base

    def sign(self) -> int:
        """1 or -1, drawn once for this meta-gradient."""
        return self.randomness.sign()

    @property
    def first_buffers(self) -> tuple[Tensor, ...]:
        """The modules' buffers before the meta-gradient."""
        return self._buffers.before

    def snapshot(self) -> tuple[Tensor, ...]:
        """A copy of the modules' current buffers."""
        return self._buffers.snapshot()

    def named_buffers(self, at: Moment) -> dict[str, Tensor]:
        """The modules' buffers at a moment of a phase, by name."""
        return self._buffers.named(at.buffers)

    def changed(self) -> list[str]:
        """Descriptions of the module state that has changed."""
        return self._buffers.changed()

    def stand_at(self, at: Moment) -> None:
        """Restore the modules' buffers of a moment of a phase, and their training flags."""
        self._stand(at.buffers)

    def stand_on_copies(self, at: Moment) -> None:
        """Restore a moment in copies of the buffers, which a graph can keep unchanged."""
        self.stand_at(at)
        self._buffers.use_copies()

    def stand_at_start(self) -> None:
        """Restore the modules' buffers and training flags from before the meta-gradient."""
        self._stand(self.first_buffers)

    def _stand(self, buffers: tuple[Tensor, ...]) -> None:
        self._buffers.restore(buffers)
        self._restore_flags()

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            part.training = training
