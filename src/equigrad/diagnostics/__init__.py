"""Is this meta-gradient right, and if not, why: re-solving, contraction, optimality."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
