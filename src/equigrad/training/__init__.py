"""The outer loop, and what watches it.

The loop needs torch alone; `TensorBoard` needs the package tensorboard when it starts, and
`equigrad.training.progress.ProgressBar` is in a module of its own because it needs rich.
"""

from equigrad.training.checkpoint import Checkpoint
from equigrad.training.device import pick_device, pick_dtype
from equigrad.training.logs import JsonLines, TensorBoard
from equigrad.training.loop import Callback, OuterState, learn
from equigrad.training.scores import ExampleScores, example_scores
from equigrad.training.trainer import trainer_settings

__all__ = [
    "Callback",
    "Checkpoint",
    "ExampleScores",
    "JsonLines",
    "OuterState",
    "TensorBoard",
    "example_scores",
    "learn",
    "pick_device",
    "pick_dtype",
    "trainer_settings",
]
