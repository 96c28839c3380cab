"""A linear decay of the outer step size."""

from typing import ClassVar

from equigrad.gradient import MetaGradient
from equigrad.training.loop import Callback, OuterState


class LinearDecay(Callback):
    """Decreases the outer optimiser's step size linearly to zero at the end of the loop.

    The step size is proportional to the share of the loop's steps, or time, that remains. Put it
    after a `Checkpoint` in the callbacks, so that a resumed run continues correctly.

    Args:
        lr: initial step size.
    """

    acts: ClassVar[bool] = True

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_start(self, state: OuterState) -> None:
        """Set the step size for the current step."""
        for group in state.optimizer.param_groups:
            group["lr"] = self.lr * (1 - state.share)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Set the step size for the next step."""
        self.on_start(state)
