"""Solvers of the inner problem: one algorithm a file, and one loop for all of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
