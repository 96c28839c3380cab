"""Stop where rows that no one learns from say so, and keep what they liked best."""

from typing import ClassVar

from torch import Tensor

from equigrad.gradient import MetaGradient
from equigrad.training.loop import Callback, OuterState

NEXT, BEST = "looked at next", "best"


class EarlyStopping(Callback):
    """Ends the loop when a metric has not fallen for some steps, and keeps the θ of its minimum.

    A row's metrics are of the θ before the step, so that the last one is never looked at. Stands
    before a `Checkpoint` among the callbacks, which saves what it keeps.

    Args:
        metric: of the rows of the history.
        patience: steps without a new minimum.
    """

    acts: ClassVar[bool] = True

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def on_start(self, state: OuterState) -> None:
        """Keep what is looked at first."""
        state.copies |= {NEXT: _copied(state), BEST: _copied(state)}

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Compare."""
        seen = [float(row[self.metric]) for row in state.history]
        waited = len(seen) - 1 - seen.index(min(seen))
        if waited == 0:
            state.copies[BEST] = state.copies[NEXT]
        state.copies[NEXT] = _copied(state)
        state.stopped = waited >= self.patience


def _copied(state: OuterState) -> dict[str, Tensor]:
    return {name: m.detach().clone() for name, m in state.meta_params.items()}
