"""Step sizes that shrink while θ is learned."""

from typing import ClassVar

from equigrad.gradient import MetaGradient
from equigrad.training.loop import Callback, OuterState


class LinearDecay(Callback):
    """Lets the outer optimiser's step size fall linearly, to zero where the loop ends.

    What is left of it is what is left of the loop, of its steps or of its time. Stands after a
    `Checkpoint` among the callbacks, so that a resumed run finds its place.

    Args:
        lr: step size at the beginning.
    """

    acts: ClassVar[bool] = True

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_start(self, state: OuterState) -> None:
        """Find the place."""
        for group in state.optimizer.param_groups:
            group["lr"] = self.lr * (1 - state.share)

    def on_step(self, state: OuterState, result: MetaGradient) -> None:
        """Shrink."""
        self.on_start(state)
