"""The outer loop, and what watches it.

`ProgressBar` and `TensorBoard` need the extra `experiments`; they are imported from their own
modules, so that the loop itself needs torch alone.
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
