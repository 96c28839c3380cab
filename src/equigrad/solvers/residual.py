"""The residual of a phase: the norm by which the loop decides when to stop."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from equigrad.solvers.phase import numbered


class Residual:
    """The norm of the velocity, over all parameters or for each sample.

    With several mini-batches, the velocity is averaged over the last whole passes. A sample that
    diverges is reset to its start and no longer counts.

    Args:
        leaves: the parameters that move.
        start: their initial values.
        every: steps between two measurements, a multiple of `batches`.
        batches: number of mini-batches that make up the loss.
        samples: whether samples settle independently.
        apart: whether the others continue when samples diverge.

    Attributes:
        first: the norm at the first measurement, NaN before it.
        norm: the norm at the last measurement; the largest over the samples that continue.
        before: the norm at the measurement before.
        each: the norm of each sample, infinite if it has diverged; None without samples.
        lost: a mask of the samples that have diverged; None if there are none.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        start: Iterable[Tensor],
        *,
        every: int,
        batches: int,
        samples: bool,
        apart: bool,
    ) -> None:
        self.first = self.norm = self.before = math.nan
        self.each: Tensor | None = None
        self.lost: Tensor | None = None
        self._leaves, self._start = leaves, list(start)
        self._every, self._batches = every, batches
        self._samples, self._apart = samples, apart
        self._sum: list[Tensor] = []
        self._summed = 0

    def see(self, velocity: tuple[Tensor, ...], step: int, *, last: bool) -> bool:
        """Account for the velocity of a step.

        Args:
            velocity: the velocity before the step.
            step: number of steps taken before.
            last: whether to measure in any case.

        Returns:
            Whether the norm was measured.
        """
        due = step % self._every == 0
        if self._batches > 1:
            self._sum = list(torch._foreach_add(self._sum, velocity)) if self._sum else [*velocity]
            self._summed += 1
            due = self._summed == self._every
        if due or last:
            self._measure(velocity)
        return due or last

    def put_back(self) -> None:
        """Reset the samples that have diverged to their start."""
        if self.lost is None:
            return
        for leaf, start in zip(self._leaves, self._start, strict=True):
            leaf[self.lost] = start.detach()[self.lost]

    def diverged(self) -> tuple[int, ...]:
        """Indices of the samples that have diverged."""
        return () if self.lost is None else tuple(torch.nonzero(self.lost).flatten().tolist())

    def where(self) -> str:
        """A description of the samples whose norm is not finite."""
        if self.each is None:
            return ""
        bad = torch.nonzero(~self.each.isfinite()).flatten().tolist()
        return f" in {numbered(bad)} of {len(self.each)}"

    def _measure(self, velocity: tuple[Tensor, ...]) -> None:
        mean = [m.detach() for m in self._sum or velocity]  # also drops forward-mode tangents
        seen = max(self._summed, 1)
        self._sum, self._summed = [], 0
        self.before = self.norm
        if self._samples:
            self._measure_each(mean, seen)
        else:
            self.norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(mean))).item()
            self.norm /= seen
        if math.isnan(self.first):
            self.first = self.norm

    def _measure_each(self, mean: list[Tensor], seen: int) -> None:
        norms = [torch.linalg.vector_norm(m.reshape(len(m), -1), dim=1) for m in mean]
        self.each = torch.stack(norms).norm(dim=0)
        self.each /= seen
        self.norm = self.each.max().item()
        if self.lost is not None or (self._apart and not math.isfinite(self.norm)):
            now = ~self.each.isfinite()
            self.lost = now if self.lost is None else now | self.lost
            self.each = torch.where(self.lost, math.inf, self.each)
            if not self.lost.all():  # the others continue
                self.norm = self.each[~self.lost].max().item()
                self.put_back()
