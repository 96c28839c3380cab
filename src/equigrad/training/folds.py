"""Folds for cross-validation, as weights of the rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Folds:
    """Weights of the rows for one network a fold: folds × rows, which add up to one in each fold.

    Attributes:
        train: of the training loss; zero for the held-out rows of the fold.
        judge: of the outer loss: every other held-out row.
        stop: of the loss that decides when to stop: the other held-out rows.
        refit: of the final training on all rows; a vector.
        shrink: factor of the strengths in that training, below one since there are more rows.
    """

    train: Tensor
    judge: Tensor
    stop: Tensor
    refit: Tensor
    shrink: float

    @property
    def held(self) -> Tensor:
        """Weights of all held-out rows."""
        return 0.5 * (self.judge + self.stop)

    @classmethod
    def of(cls, weights: Tensor, held: Tensor, *, refit: Tensor | None = None) -> "Folds":
        """Folds from their held-out rows.

        Args:
            weights: weights of the rows, of any sum.
            held: folds × rows; whether a row is held out of a fold.
            refit: whether a row is in the final training; all are by default.
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
