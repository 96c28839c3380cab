"""The outer loop, and callbacks that watch it.

The loop needs torch alone. `TensorBoard` needs the package tensorboard when it starts.
`equigrad.training.progress.ProgressBar` is in a module of its own because it needs rich, and so is
`equigrad.training.scores.example_scores`, which no loop needs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
