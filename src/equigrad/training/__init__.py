"""The outer loop, and what watches it.

The loop needs torch alone; `TensorBoard` needs the package tensorboard when it starts, and
`equigrad.training.progress.ProgressBar` is in a module of its own because it needs rich. So is
`equigrad.training.scores.example_scores`, which no loop needs.
"""

from equigrad.training.checkpoint import Checkpoint
from equigrad.training.device import pick_device, pick_dtype
from equigrad.training.logs import JsonLines, TensorBoard
from equigrad.training.loop import Callback, OuterState, learn

__all__ = [
    "Callback",
    "Checkpoint",
    "JsonLines",
    "OuterState",
    "TensorBoard",
    "learn",
    "pick_device",
    "pick_dtype",
]
