"""Stop where rows that no one learns from say so, and keep what they liked best."""

from typing import ClassVar

from torch import Tensor

from equigrad.gradient import MetaGradient
from equigrad.problems import Params
from equigrad.training.loop import Callback, OuterState

NEXT, BEST, BEST_PARAMS = "looked at next", "best", "best params"


class EarlyStopping(Callback):
    """Ends the loop when a metric has hardly fallen for some steps; keeps θ and φ of its minimum.

    A row's metrics are of the θ before the step, so that the last one is never looked at. Stands
    before a `Checkpoint` among the callbacks, which saves what it keeps.

    Args:
        metric: of the rows of the history.
        patience: steps that may bring no gain.
        gain: share by which the metric has to fall below its minimum.
    """

    acts: ClassVar[bool] = True

    def __init__(self, metric: str, patience: int, gain: float = 0.0) -> None:
        self.metric, self.patience, self.gain = metric, patience, gain

    def on_start(self, state: OuterState) -> None:
        """Keep what is looked at first."""
        copied = _copied(state.meta_params)
        state.copies |= {NEXT: copied, BEST: copied, BEST_PARAMS: _copied(state.params)}

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Compare."""
        seen = [float(row[self.metric]) for row in state.history]
        if seen.index(min(seen)) == len(seen) - 1:
            state.copies |= {BEST: state.copies[NEXT], BEST_PARAMS: _copied(state.params)}
        state.copies[NEXT] = _copied(state.meta_params)
        state.stopped = self._waited(seen) >= self.patience

    def _waited(self, seen: list[float]) -> int:
        """Steps since the last one that gained enough."""
        last, least = 0, seen[0]
        for step, value in enumerate(seen):
            if value < (1 - self.gain) * least:
                last, least = step, value
        return len(seen) - 1 - last


def _copied(tensors: Params) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
