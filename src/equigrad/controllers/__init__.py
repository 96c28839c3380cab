"""Controllers that drive a learner to a small outer loss: one controller a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
