"""How rows are shared between learning and judging: folds, as weights of the rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Folds:
    """Weights of the rows for networks side by side, one a fold; folds × rows, sums of one a fold.

    Attributes:
        train: for the loss that a network learns by; zero for the rows held out of its fold.
        judge: for the loss that strengths are fitted to: every other row that is held out.
        stop: for the loss that says when to stop: the other rows that are held out.
        refit: rows; for the network that learns from all of them in the end.
        shrink: how much weaker strengths pull there, since more rows pull against them.
    """

    train: Tensor
    judge: Tensor
    stop: Tensor
    refit: Tensor
    shrink: float

    @property
    def held(self) -> Tensor:
        """Of all rows that are held out."""
        return 0.5 * (self.judge + self.stop)

    @classmethod
    def of(cls, weights: Tensor, held: Tensor, *, refit: Tensor | None = None) -> "Folds":
        """From the rows that are held out.

        Args:
            weights: of the rows, of any sum.
            held: folds × rows; whether a fold's network does not learn from a row.
            refit: whether a row is learned from in the end; all are by default.
        """
        turn = held.cumsum(1) % 2 == 0
        last = torch.ones_like(held[0]) if refit is None else refit
        learned = (~held & last) * weights
        return cls(
            _normalised(learned),
            _normalised((held & ~turn) * weights),
            _normalised((held & turn) * weights),
            _normalised(last * weights),
            (learned.sum(1).mean() / (last * weights).sum()).item(),
        )

    @classmethod
    def draw(cls, groups: Tensor, weights: Tensor, count: int, seed: int) -> "Folds":
        """Folds in which every group has its share, drawn by the seed.

        Args:
            groups: a number for every row: its class, or zero for all.
            weights: of the rows.
            count: of the folds.
            seed: draws them.

        Example:
            >>> folds = Folds.draw(torch.zeros(8, dtype=torch.long), torch.ones(8), 2, seed=0)
            >>> folds.train.sum(0), (folds.train * folds.held).sum().item()
            (tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500]), 0.0)
        """
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
        order = order[groups.cpu()[order].argsort(stable=True)]
        fold = torch.empty_like(order)
        fold[order] = torch.arange(len(order)) % count
        held = fold.to(weights.device) == torch.arange(count, device=weights.device)[:, None]
        return cls.of(weights, held)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
