"""What a problem's functions find around them: buffers, training flags and random numbers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from equigrad.buffers import KeptBuffers
from equigrad.problems.lowered import full_precision
from equigrad.randomness import CommonRandomness
from equigrad.solvers import Moment


class Stage:
    """Holds what all phases share, so that each finds it as the others do.

    As a context manager it seeds all random numbers, and puts back the global generators, the
    modules' buffers and their training flags on leaving, also by an exception. Within, gradients
    are recorded, and autocast is off around the problem's functions.

    Args:
        modules: that the problem's functions call.
        tensors: whatever is computed with.
        seed: of an earlier stage, to see the same random numbers again; None to draw one.

    Attributes:
        randomness: seeds the problem's functions.
    """

    def __init__(
        self, modules: Sequence[nn.Module], tensors: Sequence[Tensor], seed: int | None = None
    ) -> None:
        self.randomness = CommonRandomness(tensors, seed)
        self._modules, self._tensors = modules, tensors
        self._buffers = KeptBuffers(modules)
        self._flags: list[tuple[nn.Module, bool]] = []
        self._exit = ExitStack()

    def __enter__(self) -> Self:
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
        """Have something further put back on leaving."""
        self._exit.callback(put_back)

    @property
    def seed(self) -> int:
        """The seed of all random numbers, to see the same ones again."""
        return self.randomness.base

    def sign(self) -> int:
        """1 or -1, drawn once for this meta-gradient."""
        return self.randomness.sign()

    @property
    def first_buffers(self) -> tuple[Tensor, ...]:
        """The modules' buffers as the user left them."""
        return self._buffers.before

    def snapshot(self) -> tuple[Tensor, ...]:
        """The modules' buffers as they are now."""
        return self._buffers.snapshot()

    def named_buffers(self, at: Moment) -> dict[str, Tensor]:
        """The modules' buffers as they were at a moment of a phase, by name."""
        return self._buffers.named(at.buffers)

    def changed(self) -> list[str]:
        """What the modules hold that is other than it was, in words."""
        return self._buffers.changed()

    def stand_at(self, at: Moment) -> None:
        """Put the modules' buffers and training flags as they were at a moment of a phase."""
        self._stand(at.buffers)

    def stand_on_copies(self, at: Moment) -> None:
        """The same, with buffers that nothing writes into later, for a graph that keeps them."""
        self.stand_at(at)
        self._buffers.use_copies()

    def stand_at_start(self) -> None:
        """Put them as the user left them."""
        self._stand(self.first_buffers)

    def _stand(self, buffers: tuple[Tensor, ...]) -> None:
        self._buffers.restore(buffers)
        self._restore_flags()

    def _restore_flags(self) -> None:
        for part, training in self._flags:
            part.training = training
