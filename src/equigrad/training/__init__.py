"""The outer loop, and what watches it.

The loop needs torch alone; `TensorBoard` needs the package tensorboard when it starts, and
`equigrad.training.progress.ProgressBar` is in a module of its own because it needs rich.
"""

from equigrad.training.checkpoint import Checkpoint
from equigrad.training.device import pick_device, pick_dtype
from equigrad.training.directions import AdaptiveBeta, Contrasts, Direction, LinearSystem
from equigrad.training.logs import JsonLines, TensorBoard
from equigrad.training.loop import Callback, OuterState, learn
from equigrad.training.single_loop import learn_jointly

__all__ = [
    "AdaptiveBeta",
    "Callback",
    "Checkpoint",
    "Contrasts",
    "Direction",
    "JsonLines",
    "LinearSystem",
    "OuterState",
    "TensorBoard",
    "learn",
    "learn_jointly",
    "pick_device",
    "pick_dtype",
]
